"""Frames from stdin: what comes whole, what is cut off, and who waits for whom."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numbered import number_of, numbered

from knet_runtime.errors import ConfigError, SourceError
from knet_runtime.sources import open_source
from knet_runtime.sources.base import SourceOptions
from knet_runtime.sources.pipe import PIXEL_FORMATS, PipeSource
from knet_runtime.types import Rgb

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes are POSIX's")


@contextmanager
def piped(data: bytes | Callable[[int], None]) -> Iterator[int]:
    """The reading end of a pipe, into whose other end a thread writes."""
    reading, writing = os.pipe()

    def write() -> None:
        try:
            if callable(data):
                data(writing)
                return
            left = memoryview(data)
            while left:
                left = left[os.write(writing, left) :]
        except BrokenPipeError:
            pass
        finally:
            os.close(writing)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield reading
    finally:
        os.close(reading)
        thread.join(10)


def packed(image: Rgb, form: str) -> bytes:
    """The image's bytes in a pixel format, plane after plane."""
    if form == "gray16le":  # FFmpeg's threads leave holes on the way there
        grey = np.frombuffer(packed(image, "gray"), np.uint8)
        return (grey.astype("<u2") * 257).tobytes()
    encoder = av.CodecContext.create("rawvideo", "w")
    assert isinstance(encoder, av.VideoCodecContext)
    encoder.height, encoder.width = image.shape[:2]
    encoder.pix_fmt, encoder.time_base = form, Fraction(1, 25)
    return bytes(
        encoder.encode(av.VideoFrame.from_ndarray(image, "rgb24").reformat(format=form))[0]
    )


def y4m(frames: int, words: str = "W32 H24 F30000:1001 Ip A1:1 C444") -> bytes:
    planes = [packed(numbered(index), "yuv444p") for index in range(frames)]
    return b"YUV4MPEG2 " + words.encode() + b"\n" + b"".join(b"FRAME\n" + one for one in planes)


def read(data: bytes, **options: object) -> list[tuple[Rgb, Fraction | None]]:
    chosen = SourceOptions(**options)  # type: ignore[arg-type]
    with piped(data) as descriptor, PipeSource(chosen, descriptor) as source:
        return [(frame.image, frame.pts) for frame in source]


@pytest.mark.parametrize("name", PIXEL_FORMATS)
def test_raw_frames_of_every_format_come_as_they_were_sent(name: str) -> None:
    form = PIXEL_FORMATS[name]
    rng = np.random.default_rng(0)
    images = [np.kron(rng.integers(64, 192, (3, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)] * 2
    data = b"".join(packed(image, form) for image in images)
    got = read(data, raw_input=f"32x24:{name.upper()}@10")
    assert [pts for _, pts in got] == [0, Fraction(1, 10)]
    expected = images[0]
    if form.startswith("gray"):
        grey = np.round(images[0] @ [0.299, 0.587, 0.114])
        expected = np.repeat(grey[..., None], 3, 2).astype(np.uint8)
    exact = form.startswith(("rgb", "bgr"))
    # Chroma of neighbouring pixels is mixed at the edges of the 8×8 blocks.
    inner = np.abs(got[0][0].astype(int) - expected)[4::8, 4::8]
    assert inner.max() <= (0 if exact else 6), name


def test_odd_sizes_are_read_whole() -> None:
    rng = np.random.default_rng(1)
    images = [np.full((17, 33, 3), rng.integers(0, 256, 3), np.uint8) for _ in range(3)]
    got = read(b"".join(packed(one, "yuv420p") for one in images), raw_input="33x17:i420")
    for (image, _), sent in zip(got, images, strict=True):
        assert np.abs(image.astype(int) - sent).max() <= 4


def test_y4m_says_what_it_is() -> None:
    with piped(y4m(3)) as descriptor, PipeSource(SourceOptions(), descriptor) as source:
        assert source.info.rate == Fraction(30000, 1001)
        assert (source.info.hw, source.info.kind, source.info.live) == ((24, 32), "video", False)
        frames = list(source)
    assert [number_of(frame.image) for frame in frames] == [0, 1, 2]
    assert [frame.pts for frame in frames] == [Fraction(1001 * n, 30000) for n in range(3)]


@pytest.mark.parametrize("words", ["C420jpeg", "C420", "C420mpeg2", "C422", "Cmono", ""])
def test_y4m_of_every_colour_space_and_a_pipe_give_the_same(tmp_path: Path, words: str) -> None:
    form = {"C422": "yuv422p", "Cmono": "gray"}.get(words, "yuv420p")
    data = b"YUV4MPEG2 W32 H24 F25:1 " + words.encode() + b"\n"
    data += b"".join(b"FRAME\n" + packed(numbered(index), form) for index in (5, 6))
    (tmp_path / "a.y4m").write_bytes(data)
    with open_source(tmp_path / "a.y4m") as source:
        stored = [frame.image for frame in source]
    got = [image for image, _ in read(data)]
    np.testing.assert_array_equal(got, stored)
    assert [number_of(image) for image in got] == [5, 6]


def test_a_part_and_each_nth_frame_are_taken() -> None:
    data = b"".join(numbered(index).tobytes() for index in range(50))
    got = read(data, raw_input="32x24:rgb24@10", start=1.0, end=3.0, every=5)
    assert [(number_of(image), pts) for image, pts in got] == [
        (10, 1),
        (15, Fraction(3, 2)),
        (20, 2),
        (25, Fraction(5, 2)),
    ]


def test_a_cut_off_frame_at_the_end_is_said_and_the_whole_ones_are_kept(
    caplog: pytest.LogCaptureFixture,
) -> None:
    raw = b"".join(numbered(index).tobytes() for index in range(4))
    for data, options in ((raw, {"raw_input": "32x24:rgb24"}), (y4m(4), {})):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            got = read(data[:-100], **options)
        assert [number_of(image) for image, _ in got] == [0, 1, 2]
        (record,) = caplog.records
        assert "the 3 whole frames before it are kept" in record.getMessage()
        caplog.clear()
        assert len(read(data, **options)) == 4
        assert not caplog.records


@pytest.mark.parametrize(
    ("data", "raw_input", "error", "text"),
    [
        (b"", None, SourceError, "nothing came"),
        (b"", "32x24:rgb24", SourceError, "nothing came"),
        (b"\x00" * 99, None, SourceError, "is no y4m; say what raw frames they are"),
        (b"\x00" * 99, "32x24:rgb24", SourceError, "only 99 bytes came, which is less than one"),
        (y4m(1)[:200], None, SourceError, "only 200 bytes came"),
        (b"YUV4MPEG2 W0 H0\nFRAME\n", None, SourceError, "header cannot be read"),
        (b"YUV4MPEG2 W32 H24 C999\nFRAME\n", None, SourceError, "header cannot be read"),
        (b"YUV4MPEG2 " + b"x" * 9000, None, SourceError, "header cannot be read"),
        (y4m(1), "32x24:rgb24", ConfigError, "leave --raw-input out"),
        (y4m(2) + b"no frame, surely" * 20, None, SourceError, "after 2 frames is no frame of y4m"),
        (b"", "32x24", ConfigError, "write WIDTHxHEIGHT:FORMAT"),
        (b"", "32x24:rgb25", ConfigError, "no pixel format 'rgb25'; use one of rgb24, bgr24"),
        (b"", "0x24:rgb24", ConfigError, "must be 1 to 200 million"),
        (b"", "99999x99999:gray", ConfigError, "must be 1 to 200 million"),
        (b"", "32x24:gray@0", ConfigError, "the rate '0' must be"),
        (b"", "32x24:gray@1/0", ConfigError, "the rate '1/0' must be"),
        (b"", "32x24:gray@1.2.3", ConfigError, "the rate '1.2.3' must be"),
    ],
)
def test_what_is_no_frame_is_refused(
    data: bytes, raw_input: str | None, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        read(data, raw_input=raw_input)


def test_stdin_that_is_a_terminal_is_refused() -> None:
    leader, follower = os.openpty()
    with pytest.raises(SourceError, match="stdin is a terminal"):
        PipeSource(SourceOptions(), follower)
    os.close(leader)
    os.close(follower)


def test_raw_input_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--raw-input says what comes on stdin"):
        open_source(tmp_path / "a.rgb", SourceOptions(raw_input="1x1:gray"))


def test_a_slow_reader_makes_the_writer_wait_and_gets_every_frame() -> None:
    sent = 0

    def write(descriptor: int) -> None:
        nonlocal sent
        for index in range(1000):
            left = memoryview(numbered(index).tobytes())
            while left:
                left = left[os.write(descriptor, left) :]
            sent += 1

    options = SourceOptions(raw_input="32x24:rgb24")
    with piped(write) as descriptor, PipeSource(options, descriptor) as source:
        frames = iter(source)
        got = [number_of(next(frames).image)]
        time.sleep(0.3)
        assert sent < 1000  # what fits into pipe and buffer, and no more
        got += [number_of(frame.image) for frame in frames]
    assert got == list(range(1000))


def test_it_stops_while_nothing_comes() -> None:
    release = threading.Event()

    def write(descriptor: int) -> None:
        os.write(descriptor, y4m(3))
        release.wait(10)

    with piped(write) as descriptor:
        try:
            with PipeSource(SourceOptions(), descriptor) as source:
                threading.Timer(0.3, source.stop).start()
                began = time.monotonic()
                assert len(list(source)) <= 3
                assert time.monotonic() - began < 5
        finally:
            release.set()
