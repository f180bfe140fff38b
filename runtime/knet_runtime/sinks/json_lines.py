"""The sinks that write a line of JSON per frame: shares and segments, or masks as COCO RLE."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

import msgspec
from msgspec import UNSET, UnsetType

from knet_runtime.atomic import output_error
from knet_runtime.growing import GrowingFile
from knet_runtime.rle import Rle, rles_of
from knet_runtime.segmentation import Segment, Segmentation
from knet_runtime.sinks.raw_masks import STDOUT, Pipe
from knet_runtime.types import Frame, Size

_BLOCK = 1 << 16

Stamp = tuple[int, int]
"""A time of ROS since the epoch: seconds and nanoseconds."""


class SegmentRecord(msgspec.Struct, frozen=True, rename={"label": "class"}):
    """One segment of an instance or panoptic result; see ``segmentation.Segment``. ``label`` is
    the key "class" in JSON; ``rle`` is there in the lines of ``RleLines``."""

    id: int
    label: str
    score: float | None
    area: int
    box: tuple[int, int, int, int]
    track: int | None
    rle: Rle | UnsetType = UNSET


class _FrameRecord(msgspec.Struct, frozen=True):
    """What every line begins with.

    ``pts`` is in seconds; ``wall``, of live sources, in seconds since the epoch; ``stale`` marks a
    frame that is shown again because no newer one came; ``size`` is (height, width).
    """

    frame: int
    name: str
    pts: float | None
    wall: float | None
    stale: bool
    size: Size


class Record(_FrameRecord, frozen=True):
    """One line of ``JsonLines``. ``shares`` are 0 … 1; ``segments`` are there for instance and
    panoptic results, and ``stamp`` for frames out of a recording of ROS."""

    shares: dict[str, float]
    timings_ms: dict[str, float]
    model: str
    segments: tuple[SegmentRecord, ...] | UnsetType = UNSET
    stamp: Stamp | UnsetType = UNSET


class ClassRecord(msgspec.Struct, frozen=True):
    """One class in a line of ``RleLines``: its mask, its pixels, and its share (0 … 1)."""

    rle: Rle
    area: int
    share: float


class RleRecord(_FrameRecord, frozen=True):
    """One line of ``RleLines``. ``classes`` holds those that are in the frame of a semantic result;
    the other tasks have ``segments`` instead, each with its mask; ``stamp`` as in ``Record``."""

    classes: dict[str, ClassRecord] | UnsetType
    model: str
    segments: tuple[SegmentRecord, ...] | UnsetType = UNSET
    stamp: Stamp | UnsetType = UNSET


class LineSink:
    """What every sink of lines is: a file that is ``path``, or stdout ("-")."""

    def __init__(self, path: str | Path) -> None:
        self.path: Path | None = None if str(path) == STDOUT else Path(path)
        self._lines: Pipe | LineFile
        self._lines = LineFile(self.path) if self.path else Pipe("JSON lines on stdout")
        self.name = self._lines.name

    def _add(self, record: msgspec.Struct) -> None:
        self._lines.send(msgspec.json.encode(record) + b"\n")

    def close(self, *, complete: bool = True) -> None:
        """Give the file its name, which ``path`` is then; without frames nothing is left, and
        ``path`` is None. Raises OutputError."""
        self.path = None
        self._lines.close(complete=complete)
        if isinstance(self._lines, LineFile):
            self.path = self._lines.final


class JsonLines(LineSink):
    """Writes one ``Record`` per frame and line to ``path``, in UTF-8; "-" is stdout.

    ``model`` is the id of the model (``Segmenter.model_id``). Until ``close`` the file has a hidden
    name beside ``path``; a partial one is called ``NAME.partial.SUFFIX``, and so is, from the next
    start on, what a killed run left. Raises OutputError when
    it cannot be written; ``raw_masks.Pipe`` says what becomes of a slow reader of stdout.

        >>> from knet_deploy import JsonLines, Segmenter, open_source
        >>> with open_source("drive.mp4") as source, Segmenter() as segment:
        ...     sink = JsonLines("out.jsonl", model=segment.model_id)
        ...     for frame in source:
        ...         sink.write(frame, segment(frame.image))
        ...     sink.close()
        >>> import json
        >>> with open("out.jsonl") as lines:
        ...     round(sum(json.loads(next(lines))["shares"].values()), 3)
        1.0
    """

    def __init__(self, path: str | Path, model: str) -> None:
        super().__init__(path)
        self._model = model

    def write(self, frame: Frame, result: Segmentation) -> None:
        """Add one line. Raises OutputError; the lines before stay whole."""
        semantic = result.task == "semantic"
        record = Record(
            *_about(frame, frame.image.shape[:2]),
            shares={name: round(share, 6) for name, share in result.shares().items()},
            timings_ms={stage: round(value, 3) for stage, value in result.timings.items()},
            model=self._model,
            segments=UNSET if semantic else tuple(map(segment_record, result.segments)),
            stamp=_stamp(frame),
        )
        self._add(record)


class RleLines(LineSink):
    """Writes one ``RleRecord`` per frame and line to ``path``, in UTF-8; "-" is stdout.

    The masks are COCO's compressed run lengths, which pycocotools and other tools decode.
    ``classes`` names those that are written (none: all). The file is written and named as that of
    ``JsonLines``. ``write`` raises ConfigError for classes that the model does not have.

        >>> from knet_deploy import RleLines, Segmenter, open_source
        >>> with open_source("drive.mp4") as source, Segmenter() as segment:
        ...     sink = RleLines("rle.jsonl", model=segment.model_id, classes=["Road"])
        ...     for frame in source:
        ...         sink.write(frame, segment(frame.image))
        ...     sink.close()
        >>> import json
        >>> with open("rle.jsonl") as lines:
        ...     list(json.loads(next(lines))["classes"])
        ['Road']
    """

    def __init__(self, path: str | Path, model: str, *, classes: Sequence[str] = ()) -> None:
        super().__init__(path)
        self._model = model
        self._names = tuple(classes)

    def write(self, frame: Frame, result: Segmentation) -> None:
        """Add one line. Raises OutputError; the lines before stay whole."""
        wanted = result.labels.indices(self._names or result.labels.names)
        semantic = result.task == "semantic"
        record = RleRecord(
            *_about(frame, result.size),
            classes=_by_class(result, wanted) if semantic else UNSET,
            model=self._model,
            segments=UNSET if semantic else _by_segment(result, wanted),
            stamp=_stamp(frame),
        )
        self._add(record)


def _about(frame: Frame, size: Size) -> tuple[int, str, float | None, float | None, bool, Size]:
    pts = None if frame.pts is None else float(frame.pts)
    return frame.index, frame.name, pts, frame.wall, frame.stale, size


def _stamp(frame: Frame) -> Stamp | UnsetType:
    return UNSET if frame.ros is None else frame.ros.parts


def _by_class(result: Segmentation, wanted: Sequence[int]) -> dict[str, ClassRecord]:
    return {
        result.labels.names[index]: ClassRecord(rle, area, round(area / result.class_map.size, 6))
        for index, (rle, area) in rles_of(result.class_map, wanted).items()
    }


def _by_segment(result: Segmentation, wanted: Sequence[int]) -> tuple[SegmentRecord, ...]:
    rles = result.rle()
    shown = (segment for segment in result.segments if segment.class_id in wanted)
    return tuple(segment_record(segment, rles[segment.id]) for segment in shown)


def segment_record(one: Segment, rle: Rle | UnsetType = UNSET) -> SegmentRecord:
    """What is written of a segment."""
    score = None if one.score is None else round(one.score, 6)
    return SegmentRecord(one.id, one.label, score, one.area, one.box, one.track, rle)


class LineFile:
    """Whole lines in a file that gets its name at the end; what ``Pipe`` is for stdout.

    ``last_line`` is what a file that a killed run left is ended by, unless it has such a line.
    """

    def __init__(self, path: Path, last_line: bytes = b"") -> None:
        self.name = str(path)
        self._file: FileIO | None = None
        self._bytes = 0
        self._target: GrowingFile | None = GrowingFile(path)
        self.final: Path | None = None
        """Where it is, once it is closed."""
        for rescued in self._target.rescued:
            _cut_torn_line(rescued)
            if last_line:
                _end(rescued, last_line)

    def send(self, line: bytes) -> None:
        if self._target is None:
            raise ValueError(f"{self.name} is closed")
        try:
            if self._file is None:
                self._target.start()
                # Unbuffered: a killed run leaves whole lines.
                self._file = self._target.temporary.open("wb", buffering=0)
            if self._file.write(line) != len(line):
                self._file.truncate(self._bytes)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise output_error(Path(self.name), error) from error
        self._bytes += len(line)

    def close(self, *, complete: bool) -> None:
        target, self._target = self._target, None
        if target is None:
            return
        if self._file is not None:
            with contextlib.suppress(OSError):  # unbuffered: nothing is left to be written
                self._file.close()
        if self._bytes:
            self.final = target.commit(complete=complete)
        else:
            target.discard()


def _end(path: Path, line: bytes) -> None:
    with contextlib.suppress(OSError), path.open("r+b") as file:
        if not file.read().rpartition(b"\n")[0].rpartition(b"\n")[2].startswith(line[:1]):
            file.write(line)


def _cut_torn_line(path: Path) -> None:
    """A power cut may take the end of the last line."""
    with contextlib.suppress(OSError), path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - _BLOCK)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                file.truncate(start + found + 1)
                return
            end = start
