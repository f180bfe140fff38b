"""Files in a loop and at their own pace: times and names go on, and nothing comes too early."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from ros_bags import SECOND, START, record

from knet_runtime.errors import ConfigError, SourceError
from knet_runtime.sources import open_source
from knet_runtime.sources.base import Source, SourceOptions
from knet_runtime.sources.playback import Pace
from knet_runtime.types import Frame, RosHeader

FRAMES = 6


def write_clip(path: Path, rate: int = 25, frames: int = FRAMES, codec: str = "mpeg4") -> Path:
    """Grey frames, each brighter by 30 than the one before."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for index in range(frames):
            image = np.full((48, 64, 3), 20 + 30 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode(None))
    return path


def write_images(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for index, name in enumerate(names):
        cv2.imwrite(str(folder / name), np.full((8, 8, 3), 40 * index, np.uint8))
    return folder


def opened(path: Path, **options: object) -> Source:
    return open_source(path, SourceOptions(**options))  # type: ignore[arg-type]


def some(path: Path, count: int, **options: object) -> list[Frame]:
    with opened(path, **options) as source:
        return list(islice(source, count))


def test_a_looped_video_goes_on_where_it_ended(tmp_path: Path) -> None:
    frames = some(write_clip(tmp_path / "a.mp4"), 2 * FRAMES + 2, loop=True)
    assert [frame.index for frame in frames] == list(range(14))
    assert [frame.pts for frame in frames] == [Fraction(index, 25) for index in range(14)]
    assert [frame.name for frame in frames[5:8]] == ["000005", "000006", "000007"]
    assert [frame.scene for frame in frames] == [0] * 6 + [1] * 6 + [2] * 2
    for frame, again in zip(frames, frames[FRAMES:], strict=False):
        np.testing.assert_array_equal(frame.image, again.image)


def test_a_looped_part_begins_anew_at_its_start(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mkv")
    frames = some(clip, 6, loop=True, start=0.04, end=0.2, every=2)
    assert [frame.scene for frame in frames] == [0, 0, 1, 1, 2, 2]
    assert [float(frame.pts or 0) for frame in frames] == [0.04, 0.12, 0.2, 0.28, 0.36, 0.44]
    means = [round(float(frame.image.mean()) / 30) for frame in frames]
    assert means == means[:2] * 3
    assert means[0] != means[1]


def test_one_frame_is_a_loop_too(tmp_path: Path) -> None:
    frames = some(write_clip(tmp_path / "a.mp4", frames=1), 3, loop=True)
    assert [frame.pts for frame in frames] == [0, Fraction(1, 25), Fraction(2, 25)]


def test_what_a_looped_source_says_of_itself(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4")
    with opened(clip) as once, opened(clip, loop=True) as looped:
        assert (once.info.frames, once.info.endless) == (FRAMES, False)
        assert (looped.info.frames, looped.info.endless, looped.info.live) == (None, True, False)
        assert looped.info.rate == once.info.rate
    photo = write_images(tmp_path / "photos", "a.png") / "a.png"
    with opened(photo, loop=True) as source:
        assert source.info.kind == "images"  # as there are several


def test_names_of_looped_images_all_differ(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "photos", "a.png", "a.2.png", "b..3.png", "c.jpg")
    frames = some(folder, 12, loop=True)
    names = [frame.name for frame in frames]
    assert names[:6] == ["a.2", "a", "b..3", "c", "a.2...2", "a...2"]
    assert len(set(names)) == 12
    assert {frame.pts for frame in frames} == {None}
    assert [frame.index for frame in frames] == list(range(12))
    plain = some(write_images(tmp_path / "x", "a.png", "b.png"), 5, loop=True)
    assert [frame.name for frame in plain] == ["a", "b", "a.2", "b.2", "a.3"]


def test_a_loop_ends_when_it_is_stopped_and_when_the_file_is_gone(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4")
    with opened(clip, loop=True) as source:
        frames = iter(source)
        seen = [next(frames) for _ in range(FRAMES + 3)]
        source.stop()
        assert len(seen) + len(list(frames)) <= FRAMES + 4
    with opened(clip, loop=True) as source:
        frames = iter(source)
        for _ in range(FRAMES):
            next(frames)
        clip.unlink()
        with pytest.raises(SourceError, match=r"a\.mp4"):
            next(frames)


def test_nothing_stays_open_of_the_rounds_before(tmp_path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("open files are counted in /proc, which Linux has")
    with opened(write_clip(tmp_path / "a.mp4"), loop=True) as source:
        frames = iter(source)
        next(frames)
        before = len(list(descriptors.iterdir()))
        for _ in range(20 * FRAMES):
            next(frames)
        assert len(list(descriptors.iterdir())) <= before


def test_frames_are_due_by_their_times() -> None:
    pace = Pace()
    assert pace.wait(3.0, 100.0) == 0
    assert pace.wait(3.5, 100.2) == pytest.approx(0.3)
    assert pace.wait(60.0, 101.0) == pytest.approx(56)  # a gap is one, however long
    assert pace.wait(61.0, 158.5) == 0  # late
    assert pace.wait(62.0, 158.5) == pytest.approx(0.5)  # which is made up for
    assert pace.wait(63.0, 163.0) == 0  # too late for that
    assert pace.wait(64.0, 163.0) == pytest.approx(1)


@pytest.mark.parametrize("options", [{}, {"loop": True}, {"start": 0.1, "every": 2, "loop": True}])
def test_no_frame_of_a_video_in_real_time_comes_early(
    tmp_path: Path, options: dict[str, object]
) -> None:
    clip = write_clip(tmp_path / "a.mp4", rate=50)
    came = []
    with opened(clip, realtime=True, **options) as source:
        began = time.monotonic()
        for frame in islice(source, 8):
            came.append((frame.pts or Fraction(0), time.monotonic()))
    assert len(came) >= FRAMES
    for pts, at in came:
        assert at - began >= float(pts - came[0][0])
    assert all(early < late for (early, _), (late, _) in pairwise(came))


def test_a_wait_ends_when_it_is_stopped(tmp_path: Path) -> None:
    with opened(write_clip(tmp_path / "slow.mp4", rate=1), realtime=True) as source:
        frames = iter(source)
        next(frames)
        threading.Timer(0.1, source.stop).start()
        began = time.monotonic()
        assert next(frames, None) is None
        assert time.monotonic() - began < 0.9


def test_a_recording_of_ros_is_played_too(tmp_path: Path) -> None:
    record(tmp_path / "drive", "mcap", [START, START + SECOND // 50, START + SECOND // 10])
    gaps = [0, Fraction(1, 50), Fraction(1, 10), Fraction(3, 20)]  # of 0 and 100 ms: 50 on average
    began = time.monotonic()
    with opened(tmp_path / "drive", loop=True, realtime=True) as source:
        assert (source.info.kind, source.info.endless) == ("bag", True)
        frames = []
        for frame in islice(source, 5):
            assert time.monotonic() - began >= float(frame.pts or 0)
            frames.append(frame)
    assert [frame.pts for frame in frames] == [*gaps, gaps[-1] + gaps[1]]
    assert [frame.scene for frame in frames] == [0, 0, 0, 1, 1]
    assert [frame.name for frame in frames[2:4]] == ["000002", "000003"]
    for frame, pts in zip(frames, gaps, strict=False):
        assert frame.ros is not None
        assert (frame.ros.stamp - START, frame.ros.logged - START - 1000) == (pts * SECOND,) * 2
    assert RosHeader(0, "camera", 5).later(Fraction(1)) == RosHeader(0, "camera", 5 + SECOND)


def images(folder: Path) -> Path:
    return write_images(folder / "photos", "a.png", "b.png")


def raw_stream(folder: Path) -> Path:
    return write_clip(folder / "a.h264", codec="libx264")


@pytest.mark.parametrize("make", [images, raw_stream])
def test_what_states_no_times_has_no_pace(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path)
    with pytest.raises(ConfigError, match="state no times, which realtime goes by") as refused:
        opened(path, realtime=True, loop=True)
    assert str(refused.value).startswith(str(path))
    assert len(some(path, 9, loop=True)) == 9


@pytest.mark.parametrize("option", ["loop", "realtime"])
@pytest.mark.parametrize(
    "source", ["-", "0", "/dev/video7", "rtsp://u:p@127.0.0.1:1/x", "http://h/x"]
)
def test_what_is_no_file_is_refused(source: str, option: str) -> None:
    with pytest.raises(
        ConfigError, match="loop and realtime are for files, and this is none; leave"
    ) as refused:
        open_source(source, SourceOptions(**{option: True}))  # type: ignore[arg-type]
    assert "u:p" not in str(refused.value)
