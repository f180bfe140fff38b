"""What travels between the batch and its workers, and what is left on disk."""

from __future__ import annotations

import hashlib
import os
from fractions import Fraction
from pathlib import Path
from typing import Literal

import msgspec

from knet_runtime.atomic import json_bytes, partial_path
from knet_runtime.bundle.manifest import SegmentRules
from knet_runtime.bundle.store import Bundle
from knet_runtime.sources.base import SourceOptions
from knet_runtime.types import Size

RESULTS_NAME = "results.json"
FINISHED_NAME = "finished.json"
LINES_NAME = "frames.jsonl"
MASKS_NAME = "masks"
COCO_NAME = "coco.json"
PANOPTIC_NAME = "panoptic"
_BLOCK = 1 << 20
_FORMAT = 3  # of what is left on disk; another number makes everything anew


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a batch is asked for: the ``bundle``'s folder (on every machine that works), the
    ``engine``, the ``size`` (height, width) that the model sees if not the bundle's own, whether
    class maps are written as PNG, and whether only what verify has passed may run. ``rules`` say
    which objects are kept, if not the bundle's own. ``track`` gives objects ids that last; ``coco``
    and ``coco_panoptic`` write COCO's files: for these no video is cut. Each engine first has to
    give the bundle's golden results."""

    bundle: str
    engine: str = "auto"
    size: Size | None = None
    masks: bool = True
    require_verified: bool = False
    rules: SegmentRules | None = None
    track: bool = False
    coco: bool = False
    coco_panoptic: bool = False

    @property
    def uncut(self) -> bool:
        """Whether each video is to be done from its beginning to its end by one worker: tracks go
        on from frame to frame, and COCO's files are one for a video."""
        return self.track or self.coco or self.coco_panoptic


class Chunk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a video: the frames with ``first`` <= time < ``until``, in ticks of ``tick``
    (numerator and denominator of seconds) on the clock of ``Frame.pts``.

    None is the video's beginning or end. Decoding begins at the key frame ``run_up``, one before
    ``first``, for codecs whose key frames are whole only some frames later. ``times`` are those
    that the frames must have; None says that nothing is known of them.
    """

    number: int = 0
    tick: tuple[int, int] = (1, 1)
    run_up: int | None = None
    first: int | None = None
    until: int | None = None
    times: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """A file name that tells it from every other chunk of the video."""
        if self.is_whole:
            return "whole"
        ends = ("" if end is None else str(end) for end in (self.first, self.until))
        return f"{self.number:05d}_{'_'.join(ends)}"

    @property
    def is_whole(self) -> bool:
        """Whether it is the video uncut."""
        return self.first is None and self.until is None

    def options(self) -> SourceOptions:
        """What opens the source at it; frames before ``first`` are still to be passed over."""
        return SourceOptions(start=self._seconds(self.run_up), end=self._seconds(self.until))

    def ticks(self, time: Fraction | None) -> int | None:
        """A frame's time in ticks, None if it has none or lies between two."""
        if time is None:
            return None
        ticks = time / Fraction(*self.tick)
        return int(ticks) if ticks.denominator == 1 else None

    def _seconds(self, ticks: int | None) -> float | None:
        # A source compares times as floats too: equal ticks are equal floats.
        return None if ticks is None else float(ticks * Fraction(*self.tick))


WHOLE = Chunk()


class Job(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing for a worker: a video to be cut into chunks of ``seconds`` (no ``chunk``), or a
    chunk of it to be done, in the folder ``work``. ``stamp`` is size and mtime of the video."""

    source: str
    work: str
    stamp: tuple[int, int]
    seconds: float
    chunk: Chunk | None = None


Status = Literal["cut", "done", "inexact", "partial", "failed", "fatal"]


class Outcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What became of a job.

    "cut" has ``chunks``; "done" is whole on disk; "inexact" says that the chunk is not what the
    whole video would give, which then has to be done uncut; "partial" that a damaged video gave
    ``frames`` before ``error``; "failed" that this video gave nothing, "fatal" that no video can.
    ``digest`` is that of what is on disk.
    """

    source: str
    status: Status
    chunk: str = ""
    chunks: tuple[Chunk, ...] = ()
    frames: int = 0
    engine: str = ""
    error: str = ""
    digest: str = ""


class SourceResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a batch has of one video.

    ``folder`` is within the output folder; ``chunks`` are their numbers of frames; ``shares`` is
    the mean over the frames of each class's part (0 … 1); ``engines`` are those that took part,
    ``error`` why it is not whole, ``digest`` that of the folder's lines and masks.
    """

    source: str
    folder: str
    key: str
    frames: int = 0
    chunks: tuple[int, ...] = ()
    engines: tuple[str, ...] = ()
    shares: dict[str, float] = {}
    error: str | None = None
    digest: str = ""


class BatchResults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The manifest of results: the model, each video, and a line for each that failed."""

    model: str
    bundle: str
    engines: tuple[str, ...]
    frames: int
    sources: tuple[SourceResult, ...]
    failures: dict[str, str]


def stamp(path: Path) -> tuple[int, int]:
    """Size and time of the last change of a file. Raises OSError."""
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def key_of(bundle: Bundle, settings: Settings, source: str, state: tuple[int, int]) -> str:
    """What a result must have been made from to be used again: every file of the bundle, the
    options, and the video as it was."""
    files = sorted((name, record.sha256) for name, record in bundle.manifest.files.items())
    spec, labels = bundle.manifest.input, bundle.manifest.labels
    made = settings.masks, settings.track, settings.coco, settings.coco_panoptic
    rules = settings.rules or bundle.manifest.segment_rules
    options = (settings.engine, settings.size, rules, made)
    parts = (
        _FORMAT,
        bundle.model_id,
        files,
        spec,
        [graph.outputs for graph in bundle.manifest.graphs],
        labels,
        bundle.manifest.task,
        options,
        source,
        state,
    )
    return hashlib.sha256(json_bytes(parts)).hexdigest()[:24]


def digest_of(folder: Path) -> str:
    """A number that changes when a line, a mask or a file of COCO's in the folder is changed, lost
    or added; other files do not count. All of it is read. Raises OSError."""
    digest = hashlib.sha256()
    grown = (Path(LINES_NAME), Path(COCO_NAME))
    names = [name for whole in grown for name in (whole, partial_path(whole))]
    files = [folder / name for name in names if (folder / name).exists()]
    masks = sorted((folder / MASKS_NAME).glob("*.png"))
    for path in (*files, *masks, *sorted((folder / PANOPTIC_NAME).glob("*.*"))):
        content = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                content.update(block)
        digest.update(os.fsencode(path.name) + content.digest())
    return digest.hexdigest()
