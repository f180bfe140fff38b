"""Interlaced video and hardware decoding."""

from __future__ import annotations

import logging
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from knet_runtime.sources import open_source
from knet_runtime.sources.base import SourceOptions
from knet_runtime.types import Frame

HEIGHT, WIDTH, STEP = 64, 128, 8


def bar(position: int) -> NDArray[np.uint8]:
    """A grey frame with a white bar 16 wide."""
    image = np.full((HEIGHT, WIDTH, 3), 40, np.uint8)
    image[:, position : position + 16] = 220
    return image


def write_interlaced(path: Path, frames: int = 8, *, interlaced: bool = True) -> Path:
    """A bar that moves by ``STEP`` per field: the odd lines of a frame show it further right."""
    with av.open(str(path), "w") as container:
        options = {"x264-params": "tff=1"} if interlaced else {}
        stream = container.add_stream("libx264", rate=25, options={"crf": "10", **options})
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv422p"
        for index in range(frames):
            image = bar(2 * STEP * (index % 6))
            image[1::2] = bar(2 * STEP * (index % 6) + STEP)[1::2]
            frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format="yuv422p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def combing(frame: Frame) -> float:
    """How much neighbouring lines differ beyond those two apart: high where fields are mixed."""
    grey = frame.image[8:-8, :, 0].astype(int)
    return float(np.abs(grey[1:] - grey[:-1]).mean() - np.abs(grey[2:] - grey[:-2]).mean())


def test_interlaced_frames_come_out_whole_with_all_their_times(tmp_path: Path) -> None:
    with open_source(write_interlaced(tmp_path / "a.mkv")) as source:
        base = source.info.time_base
        frames = list(source)
    with open_source(write_interlaced(tmp_path / "b.mkv", interlaced=False)) as source:
        mixed = list(source)
    assert len(frames) == len(mixed) == 8
    assert [frame.pts for frame in frames] == [Fraction(i, 25) for i in range(8)]
    assert base is not None
    assert all(combing(frame) > 15 for frame in mixed)
    assert all(combing(frame) < 4 for frame in frames)
    for ours, theirs in zip(frames, mixed, strict=True):  # colours are left alone
        assert np.abs(ours.image[:, -8:].astype(int) - theirs.image[:, -8:]).max() <= 4


def test_interlaced_and_progressive_parts_may_follow_each_other(tmp_path: Path) -> None:
    data = b"".join(
        write_interlaced(tmp_path / f"{name}.h264", interlaced=interlaced).read_bytes()
        for name, interlaced in (("a", False), ("b", True), ("c", False))
    )
    path = tmp_path / "all.h264"
    path.write_bytes(data)
    with open_source(path) as source:
        frames = list(source)
    assert len(frames) == 24
    assert all(combing(frame) < 4 for frame in frames[8:16])
    assert all(combing(frame) > 15 for frame in frames[:8] + frames[16:])


def test_a_part_of_an_interlaced_video_is_what_the_whole_has_there(tmp_path: Path) -> None:
    path = write_interlaced(tmp_path / "a.mp4", frames=30)
    with open_source(path) as source:
        whole = list(source)
    with open_source(path, SourceOptions(start=0.4, end=0.6)) as source:
        part = list(source)
    assert [frame.pts for frame in part] == [Fraction(i, 25) for i in range(10, 15)]
    for ours, theirs in zip(part, whole[10:15], strict=True):
        assert np.array_equal(ours.image, theirs.image)


def test_without_a_hardware_decoder_it_decodes_in_software_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.mkv"  # FFV1: no hardware has a decoder for it
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for index in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(bar(8 * index), "rgb24")))
        container.mux(stream.encode(None))
    with open_source(path) as source:
        expected = [frame.image for frame in source]
    with caplog.at_level(logging.INFO), open_source(path, SourceOptions(hwaccel=True)) as source:
        images = [frame.image for frame in source]
    assert all(np.array_equal(a, b) for a, b in zip(images, expected, strict=True))
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"{path}: no hardware decoder for it works here; decoding in software"]


def test_h264_is_read_with_hardware_asked_for_whatever_there_is(tmp_path: Path) -> None:
    path = write_interlaced(tmp_path / "a.mp4", interlaced=False)
    with open_source(path, SourceOptions(hwaccel=True)) as source:
        assert len(list(source)) == 8
