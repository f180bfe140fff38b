"""A part of a video: from, to, and each n-th frame, exact whatever the container and codec."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from knet_runtime.errors import ConfigError, SourceError
from knet_runtime.sources import open_source
from knet_runtime.sources.base import SourceOptions
from knet_runtime.types import Frame

FRAMES, RATE = 90, 30


def write_clip(path: Path, codec: str = "libx264", options: str = "", gop: int = 24) -> Path:
    """90 frames of 48 × 64 at 30 frames/s, each told from the others by its bars."""
    given = dict(pair.split("=", 1) for pair in options.split()) if options else {}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options=given)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = (
            48,
            64,
            "yuvj420p" if codec == "mjpeg" else "yuv420p",
        )
        stream.codec_context.gop_size = gop
        for index in range(FRAMES):
            image = np.full((48, 64, 3), 20, np.uint8)
            for bit in range(8):
                if index >> bit & 1:
                    image[:, 8 * bit : 8 * bit + 8] = 230
            frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format=stream.pix_fmt)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def number(frame: Frame) -> int:
    bars = frame.image[24, 4::8].mean(1) > 128
    return int(sum(2**bit for bit in range(8) if bars[bit]))


def read(path: Path, **options: object) -> list[Frame]:
    with open_source(path, SourceOptions(**options)) as source:  # type: ignore[arg-type]
        return list(source)


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("b.mp4", "libx264", "bf=3 b-pyramid=normal"),
        ("open.mp4", "libx264", "bf=3 x264-params=open-gop=1:scenecut=0"),
        ("open.ts", "libx264", "bf=3 x264-params=open-gop=1:scenecut=0"),
        ("a.ts", "libx264", "bf=2"),
        ("a.mkv", "libx264", "bf=2"),
        ("hevc.mp4", "libx265", "x265-params=log-level=none:bframes=3:open-gop=1"),
        ("a.avi", "mjpeg", ""),
        ("vp9.webm", "libvpx-vp9", "deadline=realtime cpu-used=8"),
        ("mpeg2.ts", "mpeg2video", "bf=2"),
    ],
)
def test_a_part_is_what_the_whole_has_there(
    tmp_path: Path, name: str, codec: str, options: str
) -> None:
    path = write_clip(tmp_path / name, codec, options)
    whole = read(path)
    assert [number(frame) for frame in whole] == list(range(FRAMES))
    for first in range(0, FRAMES, 7):
        start = whole[first].pts
        assert start is not None
        end = start + Fraction(5, RATE)
        part = read(path, start=float(start), end=float(end) - 0.001)
        expected = whole[first : first + 5]
        assert [frame.pts for frame in part] == [frame.pts for frame in expected]
        assert [frame.index for frame in part] == list(range(len(expected)))
        for ours, theirs in zip(part, expected, strict=True):
            assert np.array_equal(ours.image, theirs.image)


def test_neighbouring_parts_make_the_whole(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4")
    cuts = [0.0, 0.4, 0.45, 1.2, 2.0, 9.0]
    parts = [read(path, start=a, end=b) for a, b in pairwise(cuts[:-1])]
    parts.append(read(path, start=cuts[-2]))
    assert [number(frame) for part in parts for frame in part] == list(range(FRAMES))


def test_every_counts_from_the_first_frame_read(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4")
    with open_source(path, SourceOptions(every=10)) as source:
        assert source.info.rate == 3
        assert source.info.frames == 9
        frames = list(source)
    assert [number(frame) for frame in frames] == list(range(0, FRAMES, 10))
    assert [frame.name for frame in frames] == [f"{i:06d}" for i in range(9)]
    part = read(path, start=0.5, every=20)
    assert [number(frame) for frame in part] == [15, 35, 55, 75]
    assert [frame.pts for frame in part] == [Fraction(n, RATE) for n in (15, 35, 55, 75)]


def test_a_part_states_how_many_frames_it_may_have(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4")
    options = SourceOptions(start=1, end=2, every=3)
    with open_source(path, options) as source:
        assert source.info.frames == len(list(source)) == 10


def test_a_part_behind_the_end_is_refused_with_the_length(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4")
    with pytest.raises(SourceError, match=r"no frame from 5 s to its end of its 3.000 s; choose"):
        open_source(path, SourceOptions(start=5))
    with pytest.raises(SourceError, match=r"no frame from 1.01 s to 1.02 s"):
        open_source(path, SourceOptions(start=1.01, end=1.02))


def test_a_video_without_times_has_no_parts(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.h264")
    if read(path)[0].pts is None:
        with pytest.raises(SourceError, match=r"state no times.*convert it to MP4"):
            open_source(path, SourceOptions(end=1))
    else:
        assert [number(frame) for frame in read(path, end=0.5)] == list(range(15))


def test_images_have_no_times_but_each_nth_can_be_taken(tmp_path: Path) -> None:
    import cv2

    for index in range(7):
        cv2.imwrite(str(tmp_path / f"p{index}.png"), np.full((4, 4, 3), index, np.uint8))
    frames = read(tmp_path, every=3)
    assert [frame.name for frame in frames] == ["p0", "p3", "p6"]
    assert [frame.index for frame in frames] == [0, 1, 2]
    with pytest.raises(ConfigError, match="start and end choose a part of a video"):
        open_source(tmp_path, SourceOptions(start=1))


def test_a_stopped_source_ends_without_complaint(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.ts")
    path.write_bytes(path.read_bytes()[:-1000])
    with open_source(path) as source:
        frames = iter(source)
        next(frames)
        source.stop()
        assert len(list(frames)) < FRAMES - 1
