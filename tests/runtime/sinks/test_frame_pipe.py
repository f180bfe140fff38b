"""Frames on stdout, as other programs read them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import fakes
import numpy as np
import pytest

from knet_runtime.errors import ConfigError, OutputClosed, OutputError
from knet_runtime.labels import LabelMap
from knet_runtime.segmentation import Segmentation
from knet_runtime.sinks import Look, MaskPipe, OverlayPipe
from knet_runtime.sources import open_source
from knet_runtime.sources.base import SourceInfo, SourceOptions
from knet_runtime.sources.pipe import PIXEL_FORMATS, PipeSource
from knet_runtime.types import Frame

INFO = SourceInfo("video", (17, 33), Fraction(30000, 1001), None, sample_aspect=Fraction(4, 3))
Make = Callable[[int], OverlayPipe | MaskPipe]


def pairs(hw: tuple[int, int] = (17, 33)) -> list[tuple[Frame, Segmentation]]:
    rng = np.random.default_rng(0)
    images = [np.full((*hw, 3), rng.integers(64, 192, 3), np.uint8) for _ in range(3)]
    return [fakes.a_frame(index, image=image) for index, image in enumerate(images)]


def written(path: Path, make: Make, frames: list[tuple[Frame, Segmentation]]) -> bytes:
    with path.open("wb") as file:
        sink = make(file.fileno())
        for frame, result in frames:
            sink.write(frame, result)
        sink.close()
    return path.read_bytes()


def test_y4m_is_read_again_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "o.y4m"
    written(path, lambda fd: OverlayPipe(INFO, descriptor=fd), pairs())
    with open_source(path) as source:
        info, frames = source.info, list(source)
    assert (info.hw, info.rate, info.sample_aspect) == ((17, 33), INFO.rate, INFO.sample_aspect)
    for frame, (sent, result) in zip(frames, pairs(), strict=True):
        shown = result.overlay(sent.image)
        # Chroma is mixed where the two colours meet.
        assert np.abs(frame.image.astype(int) - shown)[[2, -3]].max() <= 6


@pytest.mark.parametrize(
    "name", [name for name, form in PIXEL_FORMATS.items() if form != "gray16le"]
)
def test_raw_frames_of_every_format_are_read_again(tmp_path: Path, name: str) -> None:
    path = tmp_path / "o.raw"
    written(path, lambda fd: OverlayPipe(INFO, Look(alpha=0), form=name, descriptor=fd), pairs())
    with path.open("rb") as file:
        options = SourceOptions(raw_input=f"33x17:{name}")
        with PipeSource(options, file.fileno()) as source:
            frames = list(source)
    for frame, (sent, _) in zip(frames, pairs(), strict=True):
        expected = sent.image.astype(int)
        if PIXEL_FORMATS[name].startswith("gray"):
            expected = np.round(expected @ [0.299, 0.587, 0.114])[..., None]
        exact = PIXEL_FORMATS[name].startswith(("rgb", "bgr"))
        assert np.abs(frame.image - expected).max() <= (0 if exact else 6)


@pytest.mark.parametrize("form", ["y4m", "gray", "GRAY8"])
@pytest.mark.parametrize("classes", [3, 300])
def test_masks_are_class_indices(tmp_path: Path, form: str, classes: int) -> None:
    labels = LabelMap(tuple(map(str, range(classes))), ((1, 1, 1),) * classes, ignore_index=65535)
    dtype = np.uint8 if classes < 256 else np.uint16
    maps = np.random.default_rng(0).integers(0, classes, (3, 17, 33)).astype(dtype)
    frames = [
        (frame, Segmentation(class_map, labels))
        for (frame, _), class_map in zip(pairs(), maps, strict=True)
    ]
    frames.insert(1, (fakes.a_frame(0, hw=(17, 33), stale=True)[0], frames[0][1]))
    data = written(tmp_path / "o", lambda fd: MaskPipe(INFO, form=form, descriptor=fd), frames)
    if form == "y4m":
        header, _, data = data.partition(b"\n")
        assert header.startswith(b"YUV4MPEG2 W33 H17 F30000:1001 Ip A4:3 Cmono")
        data = data.replace(b"FRAME\n", b"")
    assert data == maps.astype(maps.dtype.newbyteorder("<")).tobytes()


def test_frames_of_another_size_are_letterboxed_and_masks_refused(tmp_path: Path) -> None:
    frames = [*pairs(), fakes.a_frame(3, hw=(40, 20))]
    data = written(
        tmp_path / "o", lambda fd: OverlayPipe(INFO, form="rgb24", descriptor=fd), frames
    )
    assert len(data) == 4 * 17 * 33 * 3
    with pytest.raises(OutputError, match="a frame is 40×20, and the first one is not"):
        written(tmp_path / "m", lambda fd: MaskPipe(INFO, form="gray", descriptor=fd), frames)
    assert (tmp_path / "m").stat().st_size == 3 * 17 * 33


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda fd: OverlayPipe(INFO, form="png", descriptor=fd), "no pixel format 'png'"),
        (lambda fd: OverlayPipe(INFO, form="gray16_le", descriptor=fd), "8 bits: take gray"),
        (lambda fd: MaskPipe(INFO, form="rgb24", descriptor=fd), "take y4m or gray"),
    ],
)
def test_other_forms_are_refused(tmp_path: Path, make: Make, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        written(tmp_path / "o", make, [])


def test_a_terminal_is_refused_and_a_reader_that_goes_is_a_quiet_end() -> None:
    leader, follower = os.openpty()
    with pytest.raises(ConfigError, match="no text for a terminal"):
        OverlayPipe(INFO, descriptor=follower)
    os.close(leader)
    os.close(follower)
    reading, writing = os.pipe()
    sink = OverlayPipe(INFO, descriptor=writing)
    sink.write(*pairs()[0])
    os.close(reading)
    with pytest.raises(OutputClosed, match="nobody reads it any more"):
        sink.write(*pairs()[1])
    sink.close()
    os.close(writing)


def test_a_slow_reader_gets_every_frame() -> None:
    reading, writing = os.pipe()
    got = bytearray()

    def read() -> None:
        while data := os.read(reading, 10_000):
            got.extend(data)

    thread = threading.Thread(target=read)
    thread.start()
    sink = OverlayPipe(INFO, Look(alpha=0), form="rgb24", descriptor=writing)
    for index in range(300):
        sink.write(*fakes.a_frame(index % 200, hw=(17, 33)))
    sink.close()
    os.close(writing)
    thread.join(10)
    os.close(reading)
    shown = np.frombuffer(got, np.uint8).reshape(300, -1)
    assert shown[:, 0].tolist() == [40 + index % 200 for index in range(300)]
