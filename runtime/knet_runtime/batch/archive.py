"""A batch over many videos: what is done already, what is left, and one manifest of results.

From segments to what one run of the video would have written: the same files, byte for byte.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from knet_runtime.atomic import AtomicFolder, check_folder, make_folder, output_error, write_json
from knet_runtime.batch.chunks import WHOLE, Chunk
from knet_runtime.batch.records import (
    FINISHED_NAME,
    LINES_NAME,
    MASKS_NAME,
    RESULTS_NAME,
    BatchResults,
    Job,
    Outcome,
    Settings,
    SourceResult,
    key_of,
    stamp,
)
from knet_runtime.batch.worker import settings_bundle
from knet_runtime.errors import ConfigError, EngineError, SourceError
from knet_runtime.sinks.image_files import MaskFolder
from knet_runtime.sinks.json_lines import Record


def join(target: Path, work: Path, pieces: Sequence[Outcome], result: SourceResult) -> SourceResult:
    """Make the folder ``target`` of the finished ``pieces`` in ``work``, which is then removed.

    Frames are numbered through. An old ``target`` that a batch wrote is exchanged whole. The result
    is also in it, for the next batch. Raises OutputError.
    """
    try:
        with AtomicFolder(target) as folder:
            fresh = folder.path
            totals: dict[str, float] = {}
            count = 0
            with (fresh / LINES_NAME).open("wb") as lines:
                for piece in pieces:
                    lines.writelines(_renumbered(work / piece.segment / LINES_NAME, count, totals))
                    _link_masks(work / piece.segment / MASKS_NAME, count, fresh / MASKS_NAME)
                    count += piece.frames
            whole = msgspec.structs.replace(
                result,
                frames=count,
                segments=tuple(piece.frames for piece in pieces),
                engines=tuple(sorted({piece.engine for piece in pieces})),
                shares={name: round(total / count, 6) for name, total in totals.items()},
            )
            if whole.error:  # as a run that fails names what it keeps
                name = Path(LINES_NAME)
                (fresh / name).rename(fresh / f"{name.stem}.partial{name.suffix}")
                if (fresh / MASKS_NAME).is_dir():
                    text = f"The run ended early: {count} masks were written.\n"
                    (fresh / MASKS_NAME / MaskFolder.MARK).write_text(text)
            (fresh / FINISHED_NAME).write_bytes(msgspec.json.encode(whole))
            folder.commit()
        shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise output_error(target, error) from error
    return whole


def _renumbered(lines: Path, offset: int, totals: dict[str, float]) -> Iterator[bytes]:
    """The lines with frames counted from ``offset``; their shares are added to ``totals``."""
    with lines.open("rb") as file:
        for line in file:
            record = msgspec.json.decode(line, type=Record)
            for name, share in record.shares.items():
                totals[name] = totals.get(name, 0.0) + share
            index = record.frame + offset
            moved = msgspec.structs.replace(record, frame=index, name=f"{index:06d}")
            yield msgspec.json.encode(moved) + b"\n"


def _link_masks(masks: Path, offset: int, target: Path) -> None:
    """A second name for each mask, so that the segment stays whole until the video is."""
    if not masks.is_dir():
        return
    target.mkdir(exist_ok=True)
    for mask in masks.glob("*.png"):
        named = target / f"{int(mask.stem) + offset:06d}.png"
        try:
            named.hardlink_to(mask)
        except OSError:  # a file system without links
            shutil.copyfile(mask, named)


_log = logging.getLogger(__name__)
_WORK = ".work"
_DIED = "a part of it was lost with its worker; run the batch again"


class Pool(Protocol):
    """Workers that do jobs and give their outcomes in any order; a job whose worker died each time
    has none."""

    def __call__(self, jobs: Sequence[Job]) -> Iterator[Outcome]: ...


def find_sources(patterns: Sequence[str]) -> dict[str, Path]:
    """The files that names and patterns ("archive/**/*.mp4") stand for, absolute, by the name of
    their output folder: their path below what the patterns share.

    Raises SourceError for a pattern that finds nothing and ConfigError for two that would share a
    folder.
    """
    found: dict[Path, None] = {}
    roots = []
    for pattern in patterns:
        # A file's own name may hold what would be a pattern.
        exact = Path(pattern).is_file()
        names = [pattern] if exact else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
        files = [Path(name).absolute() for name in names if Path(name).is_file()]
        if not files:
            raise SourceError(f"{pattern}: no file is found there; check the path")
        parts = Path(pattern).absolute().parts
        magic = (i for i, part in enumerate(parts) if not exact and glob.has_magic(part))
        roots.append(Path(*parts[: next(magic, len(parts) - 1)]))
        found.update(dict.fromkeys(files))
    root = Path(os.path.commonpath(roots))
    named: dict[str, Path] = {}
    for path in found:
        name = path.relative_to(root).as_posix()
        if name.startswith(".") or ".." in name.split("/"):
            raise ConfigError(f"{path}: hidden files and '..' are not read; name it otherwise")
        named[name] = path
    return named


def run_batch(
    sources: dict[str, Path],
    out: Path,
    settings: Settings,
    pool: Pool,
    *,
    seconds: float = 30.0,
    on_progress: Callable[[], None] | None = None,
) -> BatchResults:
    """Chunk every video of ``sources`` (folder name to file) into ``out``/name, and write
    ``out``/results.json.

    Videos are cut into parts of about ``seconds`` at key frames. Videos and parts that an earlier
    batch finished with the same bundle, options and file are kept. A video that fails has a line in
    ``failures`` and stops no other; ``on_progress`` is called after each part.

    Raises BundleError, EngineError, ParityError when the model can not be run and OutputError when
    ``out`` can not be written.
    """
    bundle = settings_bundle(settings)
    check_folder(out)
    batch = _Batch(out.absolute(), seconds, on_progress or (lambda: None))
    results: dict[str, SourceResult] = {}
    for name, path in sources.items():
        try:
            state = stamp(path)
        except OSError as error:
            why = f"{path}: {error.strerror}; check the name and its permissions"
            results[name] = SourceResult(str(path), name, "", error=why)
            continue
        key = key_of(bundle, settings, str(path), state)
        kept = _finished(out / name, key)
        if kept is None:
            batch.add(SourceResult(str(path), name, key), state)
        else:
            results[name] = kept
    results.update(batch.go(pool))
    ordered = tuple(results[name] for name in sources)
    whole = BatchResults(
        model=bundle.model_id,
        bundle=str(settings.bundle),
        engines=tuple(sorted({engine for result in ordered for engine in result.engines})),
        frames=sum(result.frames for result in ordered),
        sources=ordered,
        failures={result.source: result.error for result in ordered if result.error},
    )
    if len(whole.engines) > 1:
        _log.warning(
            "several engines took part (%s), whose masks may differ in single pixels; name one "
            "with --engine",
            ", ".join(whole.engines),
        )
    target = out / RESULTS_NAME
    try:
        make_folder(out)
    except OSError as error:
        raise output_error(target, error) from error
    write_json(target, whole)
    return whole


class _Batch:
    def __init__(self, out: Path, seconds: float, on_progress: Callable[[], None]) -> None:
        self._out = out
        self._seconds = seconds
        self._on_progress = on_progress
        self._todo: dict[str, tuple[SourceResult, Job]] = {}
        self._segments: dict[str, tuple[Chunk, ...]] = {}
        self._done: dict[str, dict[str, Outcome]] = {}
        self._failed: dict[str, str] = {}
        self._results: dict[str, SourceResult] = {}

    def add(self, result: SourceResult, state: tuple[int, int]) -> None:
        """Plan a video."""
        place = hashlib.sha256(result.folder.encode()).hexdigest()[:12]
        work = self._out / _WORK / f"{place}-{result.key}"
        job = Job(result.source, str(work), state, self._seconds)
        self._todo[result.source] = (result, job)

    def go(self, pool: Pool) -> dict[str, SourceResult]:
        """Do all of it; the results by name."""
        jobs = [job for _, job in self._todo.values()]
        for outcome in self._outcomes(pool, jobs):
            if outcome.status == "cut":
                self._segments[outcome.source] = outcome.segments
        self._run(pool)
        # What could not be had in parts is done uncut, which is what a single run does.
        self._run(pool, again=True)
        for source, (result, _) in self._todo.items():
            if result.folder not in self._results:
                error = f"{source}: {_DIED}"
                failed = msgspec.structs.replace(result, error=self._failed.get(source, error))
                self._results[result.folder] = failed
        self._tidy()
        return self._results

    def _run(self, pool: Pool, *, again: bool = False) -> None:
        jobs = []
        for source, segments in self._segments.items():
            result, job = self._todo[source]
            if result.folder in self._results or (again and segments != (WHOLE,)):
                continue
            jobs += [msgspec.structs.replace(job, segment=segment) for segment in segments]
        for outcome in self._outcomes(pool, jobs):
            self._on_progress()
            if outcome.status == "inexact":
                self._segments[outcome.source] = (WHOLE,)
            elif outcome.status in ("done", "partial"):
                self._take(outcome)

    def _take(self, outcome: Outcome) -> None:
        done = self._done.setdefault(outcome.source, {})
        done[outcome.segment] = outcome
        names = [segment.name for segment in self._segments[outcome.source]]
        if not all(name in done for name in names):
            return
        result, job = self._todo[outcome.source]
        if outcome.error:
            result = msgspec.structs.replace(result, error=outcome.error)
        target = self._out / result.folder
        pieces = [done[name] for name in names]
        self._results[result.folder] = join(target, Path(job.work), pieces, result)

    def _outcomes(self, pool: Pool, jobs: Sequence[Job]) -> Iterable[Outcome]:
        if not jobs:
            return
        for outcome in pool(jobs):
            if outcome.status == "fatal":
                raise EngineError(outcome.error)
            if outcome.status == "failed":
                self._failed[outcome.source] = outcome.error
            yield outcome

    def _tidy(self) -> None:
        """Take the folder for parts away when nothing is left in it."""
        try:
            (self._out / _WORK).rmdir()
        except OSError as error:
            _log.debug("parts are kept for the next batch: %s", error)


def _finished(folder: Path, key: str) -> SourceResult | None:
    try:
        result = msgspec.json.decode((folder / FINISHED_NAME).read_bytes(), type=SourceResult)
    except (OSError, msgspec.DecodeError):
        return None
    return result if result.key == key and result.error is None else None
