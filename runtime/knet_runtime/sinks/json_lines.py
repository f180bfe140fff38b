"""The sinks that write a line of JSON per frame: the classes' shares, or their masks as RLE.

Class maps as COCO's run-length encoding, compressed to text.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Sequence
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_runtime.atomic import AtomicFile, output_error
from knet_runtime.labels import LabelMap
from knet_runtime.sinks.raw_masks import STDOUT, Pipe
from knet_runtime.types import ClassMap, Frame

if TYPE_CHECKING:
    from knet_runtime.segmenter import Segmentation


_GROUP, _MORE, _FIRST = 5, 0x20, 48  # bits per character, "another one follows", character of 0


class Rle(msgspec.Struct, frozen=True):
    """A mask as pycocotools takes it: ``size`` (height, width), ``counts`` compressed to ASCII."""

    size: tuple[int, int]
    counts: str


def class_rles(class_map: ClassMap, classes: Iterable[int]) -> dict[int, tuple[Rle, int]]:
    """The mask and the area in pixels of each of ``classes`` that is in the map [H, W], in order.

    Masks run down the columns, and lengths begin with what is outside of the mask, as COCO has it.
    """
    height, width = class_map.shape
    flat = np.ascontiguousarray(class_map.T).ravel()
    if not flat.size:
        return {}
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    ends = np.append(starts[1:], flat.size)
    values = flat[starts]
    found = {}
    for index in classes:
        runs = np.flatnonzero(values == index)
        if not runs.size:
            continue
        begin, end = starts[runs], ends[runs]
        bounds = np.empty(2 * runs.size + 1, np.int64)
        bounds[0:-1:2], bounds[1:-1:2], bounds[-1] = begin, end, flat.size
        lengths = np.diff(bounds, prepend=0)
        if not lengths[-1]:  # the mask reaches the last pixel
            lengths = lengths[:-1]
        found[index] = (Rle((height, width), compress(lengths)), int((end - begin).sum()))
    return found


def compress(lengths: NDArray[np.int64]) -> str:
    """Run lengths as COCO's text.

    From the fourth on, each stands as its difference to the one two before. A number is written in
    groups of five bits, lowest first, as many as two's complement takes; a sixth bit says whether
    another group follows; 48 is added to make it a character.
    """
    numbers = lengths.copy()
    numbers[3:] -= lengths[1:-2]
    groups = 1
    while not _fits(numbers, groups).all():
        groups += 1
    shifts = _GROUP * np.arange(groups)
    characters = (numbers[:, None] >> shifts) & (2**_GROUP - 1)
    needed = np.ones(len(numbers), np.int64)
    for count in range(1, groups):
        needed += ~_fits(numbers, count)
    place = np.arange(groups)
    characters += np.where(place + 1 < needed[:, None], _MORE, 0) + _FIRST
    return str(characters[place < needed[:, None]].astype(np.uint8).tobytes(), "ascii")


def _fits(numbers: NDArray[np.int64], groups: int) -> NDArray[np.bool_]:
    half = 1 << (_GROUP * groups - 1)
    return np.asarray((numbers >= -half) & (numbers < half))


class Record(msgspec.Struct, frozen=True):
    """One line of ``JsonLines``.

    ``pts`` is in seconds; ``wall``, of live sources, in seconds since the epoch; ``stale`` marks a
    picture that is shown again because no newer one came; ``size`` is (height, width); ``shares``
    are 0 … 1.
    """

    frame: int
    name: str
    pts: float | None
    wall: float | None
    stale: bool
    size: tuple[int, int]
    shares: dict[str, float]
    timings_ms: dict[str, float]
    model: str


class ClassRecord(msgspec.Struct, frozen=True):
    """One class in a line of ``RleLines``: its mask, its pixels, and its share (0 … 1)."""

    rle: Rle
    area: int
    share: float


class RleRecord(msgspec.Struct, frozen=True):
    """One line of ``RleLines``; see ``Record``. ``classes`` holds those that are in the frame."""

    frame: int
    name: str
    pts: float | None
    wall: float | None
    stale: bool
    size: tuple[int, int]
    classes: dict[str, ClassRecord]
    model: str


class JsonLines:
    """Writes one ``Record`` per frame and line to ``path``, in UTF-8; "-" is stdout.

    ``model`` is the id of the model (``Segmenter.model_id``). Until ``close`` the file has a hidden
    name beside ``path``; a partial one is called ``NAME.partial.SUFFIX``. Raises OutputError when
    it can not be written; ``output.pipe.Pipe`` says what becomes of a slow reader of stdout.
    """

    def __init__(self, path: str | Path, model: str) -> None:
        self._model = model
        self._lines = _lines(path)

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return self._lines.name

    @property
    def path(self) -> Path | None:
        """Where the finished file will be; None for stdout."""
        return self._lines.path

    def write(self, frame: Frame, mask: Segmentation) -> None:
        """Add one line. Raises OutputError; the lines before stay whole."""
        record = Record(
            frame=frame.index,
            name=frame.name,
            pts=_seconds(frame),
            wall=frame.wall,
            stale=frame.stale,
            size=(frame.image.shape[0], frame.image.shape[1]),
            shares={name: round(share, 6) for name, share in mask.shares().items()},
            timings_ms={stage: round(value, 3) for stage, value in mask.timings.items()},
            model=self._model,
        )
        self._lines.add(record)

    def close(self, *, complete: bool = True) -> None:
        """Give the file its name; without frames nothing is left. Raises OutputError."""
        self._lines.close(complete=complete)


class RleLines:
    """Writes one ``RleRecord`` per frame and line to ``path``, in UTF-8; "-" is stdout.

    The masks are COCO's compressed run lengths, which pycocotools and other tools decode.
    ``classes`` names those that are written (none: all). Until ``close`` the file has a hidden name
    beside ``path``; a partial one is called ``NAME.partial.SUFFIX``. Raises OutputError when it can
    not be written, ConfigError for classes that the model does not have.
    """

    def __init__(self, path: str | Path, model: str, *, classes: Sequence[str] = ()) -> None:
        self._model = model
        self._names = tuple(classes)
        self._labels: LabelMap | None = None
        self._classes: tuple[int, ...] = ()
        self._lines = _lines(path)

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return self._lines.name

    @property
    def path(self) -> Path | None:
        """Where the finished file will be; None for stdout."""
        return self._lines.path

    def write(self, frame: Frame, mask: Segmentation) -> None:
        """Add one line. Raises OutputError; the lines before stay whole."""
        labels, class_map = mask.labels, mask.class_map
        if self._labels is not labels:
            self._labels = labels
            self._classes = labels.indices(self._names or labels.names)
        found = class_rles(class_map, self._classes)
        record = RleRecord(
            frame=frame.index,
            name=frame.name,
            pts=_seconds(frame),
            wall=frame.wall,
            stale=frame.stale,
            size=(class_map.shape[0], class_map.shape[1]),
            classes={
                labels.names[index]: ClassRecord(rle, area, round(area / class_map.size, 6))
                for index, (rle, area) in found.items()
            },
            model=self._model,
        )
        self._lines.add(record)

    def close(self, *, complete: bool = True) -> None:
        """Give the file its name; without frames nothing is left. Raises OutputError."""
        self._lines.close(complete=complete)


class _Stdout:
    """Whole lines of JSON on stdout, each as soon as it is there."""

    path: Path | None = None

    def __init__(self) -> None:
        self.name = "JSON lines on stdout"
        self._pipe = Pipe(self.name)

    def add(self, record: msgspec.Struct) -> None:
        self._pipe.send(msgspec.json.encode(record) + b"\n")

    def close(self, *, complete: bool) -> None:
        self._pipe.close()


class _File:
    """Whole lines of JSON in a pending file."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.path: Path | None = path
        self._file: FileIO | None = None
        self._bytes = 0
        self._pending: AtomicFile | None = AtomicFile(path)

    def add(self, record: msgspec.Struct) -> None:
        if self._pending is None:
            raise ValueError(f"{self.name} is closed")
        line = msgspec.json.encode(record) + b"\n"
        try:
            if self._file is None:
                self._pending.start()
                # Unbuffered: a killed run leaves whole lines.
                self._file = self._pending.temporary.open("wb", buffering=0)
            if self._file.write(line) != len(line):
                self._file.truncate(self._bytes)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise output_error(Path(self.name), error) from error
        self._bytes += len(line)

    def close(self, *, complete: bool) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if self._file is not None:
            with contextlib.suppress(OSError):  # unbuffered: nothing is left to be written
                self._file.close()
        if self._bytes:
            pending.commit(complete=complete)
        else:
            pending.discard()


def _lines(path: str | Path) -> _File | _Stdout:
    return _Stdout() if str(path) == STDOUT else _File(Path(path))


def _seconds(frame: Frame) -> float | None:
    return None if frame.pts is None else float(frame.pts)
