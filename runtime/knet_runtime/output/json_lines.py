"""The sinks that write a line of JSON per frame: the classes' shares, or their masks as RLE."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from knet_runtime.frames import Frame
from knet_runtime.labels import LabelMap
from knet_runtime.output.pipe import STDOUT, Pipe
from knet_runtime.output.rle import Rle, class_rles
from knet_runtime.pending import Keep, PendingFile, output_error

if TYPE_CHECKING:
    from knet_runtime.segmenter import Mask


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

    def write(self, frame: Frame, mask: Mask) -> None:
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

    def close(self, keep: Keep = "complete") -> None:
        """Give the file its name; without frames nothing is left. Raises OutputError."""
        self._lines.close(keep)


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

    def write(self, frame: Frame, mask: Mask) -> None:
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

    def close(self, keep: Keep = "complete") -> None:
        """Give the file its name; without frames nothing is left. Raises OutputError."""
        self._lines.close(keep)


class _Stdout:
    """Whole lines of JSON on stdout, each as soon as it is there."""

    path: Path | None = None

    def __init__(self) -> None:
        self.name = "JSON lines on stdout"
        self._pipe = Pipe(self.name)

    def add(self, record: msgspec.Struct) -> None:
        self._pipe.send(msgspec.json.encode(record) + b"\n")

    def close(self, keep: Keep) -> None:
        self._pipe.close()


class _File:
    """Whole lines of JSON in a pending file."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.path: Path | None = path
        self._file: FileIO | None = None
        self._bytes = 0
        self._pending: PendingFile | None = PendingFile(path)

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

    def close(self, keep: Keep) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if self._file is not None:
            with contextlib.suppress(OSError):  # unbuffered: nothing is left to be written
                self._file.close()
        if self._bytes:
            pending.commit(keep)
        else:
            pending.discard()


def _lines(path: str | Path) -> _File | _Stdout:
    return _Stdout() if str(path) == STDOUT else _File(Path(path))


def _seconds(frame: Frame) -> float | None:
    return None if frame.pts is None else float(frame.pts)
