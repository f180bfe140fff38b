"""One video in every container: frames, times and parts as in its MP4, over joints too."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from knet_runtime.errors import SourceError
from knet_runtime.sources import open_source
from knet_runtime.sources.base import SourceOptions
from knet_runtime.sources.times import FrameOrder
from knet_runtime.types import Frame

FRAMES, RATE = 60, 25
CODECS = {
    "h264": ("libx264", "bf=3 b-pyramid=normal threads=1"),
    "open": ("libx264", "bf=3 x264-params=open-gop=1:scenecut=0:threads=1"),
    "plain": ("libx264", "bf=0 threads=1"),
    "hevc": ("libx265", "x265-params=log-level=none:bframes=3:open-gop=1:pools=none"),
    "mpeg2": ("mpeg2video", "bf=2"),
    "mpeg4": ("mpeg4", "bf=2"),
}


def write_clip(path: Path, codec: str, form: str | None = None) -> Path:
    """60 frames of noise, told from each other by it, at 25 frames/s with a key frame every 12."""
    name, given = CODECS[codec]
    noise = np.random.default_rng(0)
    with av.open(str(path), "w", format=form) as container:
        options = dict(pair.split("=", 1) for pair in given.split())
        stream = container.add_stream(name, rate=RATE, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.gop_size = 12
        for _ in range(FRAMES):
            blocks = noise.integers(0, 256, (6, 8, 3), np.uint8)
            image = np.kron(blocks, np.ones((8, 8, 1), np.uint8))
            frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format="yuv420p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def remux(source: Path, target: Path, first: int = 0, **options: str) -> Path:
    """The same packets in another container; ``first`` is the packet that becomes time 0."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [packet for packet in old.demux(video=0) if packet.size]
        shift = packets[first].pts or 0
        for packet in packets:
            assert packet.pts is not None
            assert packet.dts is not None
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            packet.stream = stream
            new.mux(packet)
    return target


def read(path: Path, **options: object) -> list[Frame]:
    with open_source(path, SourceOptions(**options)) as source:  # type: ignore[arg-type]
        return list(source)


def assert_same(seen: Sequence[Frame], expected: Sequence[Frame]) -> None:
    assert [frame.pts for frame in seen] == [frame.pts for frame in expected]
    for one, other in zip(seen, expected, strict=True):
        np.testing.assert_array_equal(one.image, other.image)


CONTAINERS = [
    *(("h264", suffix) for suffix in ("mp4", "mkv", "avi", "ts", "mov", "flv", "nut", "asf")),
    *(("open", suffix) for suffix in ("mp4", "mkv", "avi", "ts", "flv", "asf")),
    *(("plain", suffix) for suffix in ("avi", "ts")),
    *(("hevc", suffix) for suffix in ("mp4", "mkv", "ts", "mov")),
    *(("mpeg2", suffix) for suffix in ("mpg", "ts", "mkv", "m2v")),
    *(("mpeg4", suffix) for suffix in ("avi", "mkv", "mov")),
]


@pytest.mark.parametrize(("codec", "suffix"), CONTAINERS)
def test_every_container_gives_the_frames_times_and_parts_of_the_mp4(
    tmp_path: Path, codec: str, suffix: str
) -> None:
    mp4 = write_clip(tmp_path / "first.mp4", codec)
    annexb = ("avi", "asf") if codec != "mpeg4" else ()
    # AVI and ASF take H.264 as a transport stream has it.
    through = remux(mp4, tmp_path / "through.ts") if suffix in annexb else mp4
    path = remux(through, tmp_path / f"second.{suffix}")
    whole = read(mp4)
    assert [frame.pts for frame in whole] == [Fraction(i, RATE) for i in range(FRAMES)]
    assert_same(read(path), whole)
    for start, end in ((0.04, 0.2), (0.5, 1.0), (0.96, 1.0), (1.48, 2.0), (2.3, None)):
        part = [frame for frame in whole if start <= float(frame.pts or 0) < (end or FRAMES)]
        assert_same(read(path, start=start, end=end), part)
        assert_same(read(mp4, start=start, end=end), part)


@pytest.mark.parametrize(
    ("codec", "form"),
    [("mpeg4", "m4v"), ("mpeg2", "mpeg2video"), ("h264", "avi"), ("mpeg4", "avi")],
)
def test_times_are_those_of_the_mp4_without_a_detour(tmp_path: Path, codec: str, form: str) -> None:
    whole = read(write_clip(tmp_path / "first.mp4", codec))
    path = write_clip(tmp_path / f"second.{form}", codec, form)
    seen = read(path)
    assert [frame.pts for frame in seen] == [frame.pts for frame in whole]
    assert_same(read(path, start=1.1, end=2), seen[28:50])


@pytest.mark.parametrize("offset", ["95441.5", "95443", "95442.9", "50000"])
def test_a_clock_of_33_bits_that_wraps_changes_nothing(tmp_path: Path, offset: str) -> None:
    mp4 = write_clip(tmp_path / "a.mp4", "h264")
    path = remux(mp4, tmp_path / "wrapped.ts", output_ts_offset=offset)
    assert_same(read(path), read(mp4))
    assert_same(read(path, start=1.2, end=2), read(mp4, start=1.2, end=2))


def test_what_an_edit_list_hides_is_no_frame(tmp_path: Path) -> None:
    mp4 = write_clip(tmp_path / "a.mp4", "h264")
    path = remux(mp4, tmp_path / "edited.mov", first=15, avoid_negative_ts="disabled")
    whole, seen = read(mp4), read(path)
    skipped = FRAMES - len(seen)
    assert 0 < skipped < 20
    assert [frame.pts for frame in seen] == [Fraction(i, RATE) for i in range(len(seen))]
    for one, other in zip(seen, whole[skipped:], strict=True):
        np.testing.assert_array_equal(one.image, other.image)
    assert_same(read(path, start=0.4, end=1), seen[10:25])


@pytest.mark.parametrize("codec", ["h264", "plain", "open", "hevc", "mpeg2"])
@pytest.mark.parametrize(
    "offsets", [("0", "0", "0"), ("0", "1000"), ("1000", "0"), ("1", "3.4"), ("0", "95442.6")]
)
def test_joined_recordings_lose_no_frame_and_their_times_go_on(
    tmp_path: Path, codec: str, offsets: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    mp4 = write_clip(tmp_path / "a.mp4", codec)
    parts = [
        remux(mp4, tmp_path / f"{n}.ts", output_ts_offset=offset)
        for n, offset in enumerate(offsets)
    ]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    with caplog.at_level(logging.WARNING):
        seen = read(path)
    images = read(mp4) * len(parts)
    assert [frame.pts for frame in seen] == [Fraction(i, RATE) for i in range(len(images))]
    for one, other in zip(seen, images, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
    said = caplog.text
    assert "the counters of its packets jump" in said
    if offsets[-1] != "3.4":  # there the clock goes on
        assert len(re.findall(r"its clock jumps by [+-][\d.]+ s at", said)) == len(parts) - 1
    for start, end in ((0.5, 1.0), (2.0, 3.0), (2.48, 2.6), (3.9, 4.5)):
        part = [frame for frame in seen if start <= float(frame.pts or 0) < end]
        assert_same(read(path, start=start, end=end), part)


def test_a_second_video_in_a_file_is_not_left_out_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mp4 = write_clip(tmp_path / "a.mp4", "h264")
    with av.open(str(mp4)) as old, av.open(str(tmp_path / "two.ts"), "w") as new:
        streams = [new.add_stream_from_template(old.streams.video[0]) for _ in range(2)]
        for packet in old.demux(video=0):
            if packet.size:
                again = av.Packet(bytes(packet))
                again.pts, again.dts, again.time_base = packet.pts, packet.dts, packet.time_base
                for one, stream in zip((packet, again), streams, strict=True):
                    one.stream = stream
                    new.mux(one)
    with caplog.at_level(logging.WARNING):
        assert len(read(tmp_path / "two.ts")) == FRAMES
    assert "two.ts: has 2 videos in it, of which one is read" in caplog.text


def test_a_joined_program_stream_goes_on_too(tmp_path: Path) -> None:
    mp4 = write_clip(tmp_path / "a.mp4", "mpeg2")
    part = remux(mp4, tmp_path / "a.mpg").read_bytes()
    path = tmp_path / "joined.mpg"
    path.write_bytes(part + part)
    seen = read(path)
    assert [frame.pts for frame in seen] == [Fraction(i, RATE) for i in range(2 * FRAMES)]
    assert_same(read(path, start=3, end=4), seen[75:100])


def test_what_comes_before_the_first_key_frame_delays_no_time() -> None:
    order = FrameOrder()
    for stamp in range(20):  # a stream that is joined between two key frames, stamped in order
        packet = av.Packet(b"data")
        packet.pts = packet.dts = stamp
        packet.is_keyframe = stamp == 10
        order.sent(packet)
    frames = []
    for stamp in range(10, 20):
        frame = av.VideoFrame(16, 16)
        frame.pts = stamp
        frames.append(order.stamp_of(frame, reorders=True))
    assert frames == list(range(10, 20))


@pytest.mark.parametrize("codec", ["h264", "hevc", "mpeg2"])
def test_bytes_lost_inside_pictures_are_reported(tmp_path: Path, codec: str) -> None:
    data = write_clip(tmp_path / "a.ts", codec).read_bytes()
    pictures = [at for at in range(0, len(data), 188) if data[at + 1] == 0x41]  # video's begin
    dice = random.Random(codec)
    for at in dice.sample(pictures[15:-15], 6):
        inside = at + 188  # the second packet of a picture
        if data[inside + 1] & 0x40:
            continue
        path = tmp_path / "lost.ts"
        path.write_bytes(data[:inside] + data[inside + 188 :])
        frames: list[Fraction | None] = []
        with open_source(path) as source, pytest.raises(SourceError, match="damaged after") as said:
            frames.extend(frame.pts for frame in source)
        assert FRAMES - 3 <= len(frames) <= FRAMES
        assert f"({len(frames)} could be read)" in str(said.value)
        assert all(a is not None and b is not None and a < b for a, b in pairwise(frames))


@pytest.mark.parametrize(("codec", "suffix"), [("h264", "h264"), ("hevc", "hevc")])
def test_a_raw_stream_states_no_times_and_has_no_parts(
    tmp_path: Path, codec: str, suffix: str
) -> None:
    path = write_clip(tmp_path / f"raw.{suffix}", codec)
    frames = read(path)
    assert len(frames) == FRAMES
    assert {frame.pts for frame in frames} == {None}
    for part in ({"start": 1}, {"end": 1}, {"start": 0.5, "end": 1}):
        with pytest.raises(SourceError, match=r"state no times.*convert it to MP4"):
            read(path, **part)
