"""Frames, sources, sinks and segmenters for tests, which do and fail as they are told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from time import time

import numpy as np

from knet_runtime.segmentation import Segmentation
from knet_runtime.sources.base import SourceInfo, SourceKind, SourceStatus
from knet_runtime.types import ClassMap, Closeable, Frame, Rgb
from knet_synthetic import CAMVID11

TIMINGS = {"preprocess": 1.0, "infer": 2.5, "postprocess": 0.25}


def a_frame(
    index: int = 0,
    pts: Fraction | None = None,
    hw: tuple[int, int] = (48, 64),
    *,
    name: str | None = None,
    wall: float | None = None,
    stale: bool = False,
    image: Rgb | None = None,
    class_map: ClassMap | None = None,
) -> tuple[Frame, Segmentation]:
    """A frame and its result: grey, sky above and road below, unless it is told otherwise."""
    if image is None:
        image = np.full((*hw, 3), 40 + index, np.uint8)
    if class_map is None:
        class_map = np.zeros(image.shape[:2], np.uint8)
        class_map[len(image) // 2 :] = 3
    frame = Frame(image, index, pts, name or f"{index:06d}", wall, stale)
    return frame, Segmentation(class_map, CAMVID11, TIMINGS)


class Frames(Closeable):
    """``count`` small frames (None: no end), and then ``error`` if there is one; ``on_frame`` is
    called with each index before it."""

    def __init__(
        self,
        count: int | None,
        on_frame: Callable[[int], object] | None = None,
        kind: SourceKind = "video",
        error: BaseException | None = None,
    ) -> None:
        self.info = SourceInfo(kind, (8, 12), Fraction(25), None, Fraction(1, 25))
        self.status = SourceStatus()
        self.stopped = threading.Event()
        self.closed = 0
        self.read = 0
        self._error = error
        self._count = count
        self._on_frame = on_frame

    def __iter__(self) -> Iterator[Frame]:
        while self.read != self._count and not self.stopped.is_set():
            if self._on_frame is not None:
                self._on_frame(self.read)
            index = self.read
            self.read += 1
            image = np.full((8, 12, 3), index % 251, np.uint8)
            wall = time() if self.info.live else None
            yield Frame(image, index, Fraction(index, 25), f"{index:06d}", wall)
        if self._error is not None and not self.stopped.is_set():
            raise self._error

    def stop(self) -> None:
        self.stopped.set()

    def close(self) -> None:
        self.closed += 1
        self.stop()


def raises(error: BaseException) -> Callable[..., None]:
    """A step of a source or sink that fails."""

    def fail(*_: object) -> None:
        raise error

    return fail


class Recorder:
    """A sink that remembers; ``on_write`` and ``on_close`` may wait or raise."""

    def __init__(
        self,
        name: str = "recorder",
        on_write: Callable[[Frame], object] | None = None,
        on_close: Callable[[], object] | None = None,
    ) -> None:
        self.name = name
        self.path: Path | None = None
        self.frames: list[int] = []
        self.stale: list[int] = []
        self.closed: list[bool] = []
        self._on_write = on_write
        self._on_close = on_close

    def write(self, frame: Frame, result: Segmentation) -> None:
        assert not self.closed
        assert result.class_map.flat[0] == frame.index % 251 % 11
        if self._on_write is not None:
            self._on_write(frame)
        (self.stale if frame.stale else self.frames).append(frame.index)

    def close(self, *, complete: bool = True) -> None:
        self.closed.append(complete)
        if self._on_close is not None:
            self._on_close()


def segment_one(image: Rgb) -> Segmentation:
    """The image's value, modulo the number of classes."""
    class_map = np.full(image.shape[:2], int(image.flat[0]) % 11, np.uint8)
    return Segmentation(class_map, CAMVID11, {"preprocess": 1.0, "infer": 4.0, "postprocess": 2.0})


class Batches:
    """A segmenter of batches that remembers which there were."""

    max_batch = 3

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.warmed: list[int] = []

    def __call__(self, image: Rgb) -> Segmentation:
        raise AssertionError("batch is there")

    def batch(self, frames: list[Rgb]) -> list[Segmentation]:
        self.batches.append([int(frame.flat[0]) for frame in frames])
        return [segment_one(frame) for frame in frames]

    def warm_up(self, largest: int) -> None:
        self.warmed.append(largest)


def entries(name: str) -> int:
    """How many open files or threads the system knows of; 0 where it does not say."""
    folder = Path(name)
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def pipeline_threads() -> list[str]:
    """The names of the pipeline's threads that live."""
    return [t.name for t in threading.enumerate() if t.name.startswith("knet-")]
