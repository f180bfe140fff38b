"""A batch over many videos: what is done already, what is left, and one manifest of results.

Each video is cut into chunks, which workers do in any order. ``join`` makes of them what one run of
the video writes, byte for byte but for the times.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from knet_runtime.atomic import (
    AtomicFolder,
    json_bytes,
    make_folder,
    output_error,
    partial_path,
    remove_empty,
    write_json,
)
from knet_runtime.batch.records import (
    COCO_NAME,
    FINISHED_NAME,
    LINES_NAME,
    MASKS_NAME,
    PANOPTIC_NAME,
    RESULTS_NAME,
    WHOLE,
    BatchResults,
    Chunk,
    Job,
    Outcome,
    Settings,
    SourceResult,
    digest_of,
    key_of,
    stamp,
)
from knet_runtime.batch.worker import settings_bundle
from knet_runtime.bundle.store import Bundle
from knet_runtime.errors import ConfigError, EngineError, OutputError, SourceError
from knet_runtime.locks import FileLock
from knet_runtime.sinks.json_lines import Record
from knet_runtime.types import as_utf8

_log = logging.getLogger(__name__)
_WORK = ".work"
_LOCK = ".lock"


Pool = Callable[[Sequence[Job]], Iterator[Outcome]]
"""Workers that do jobs and give their outcomes in any order; a job whose worker died each time has
none."""


def find_sources(patterns: Sequence[str]) -> dict[str, Path]:
    """The files that names and patterns ("archive/**/*.mp4") stand for, absolute, by the name of
    their output folder: their path below what the patterns share.

    Raises SourceError for a pattern that finds nothing and ConfigError for a hidden file.
    """
    found: dict[Path, None] = {}
    roots = []
    for pattern in patterns:
        # A file's own name may hold what would be a pattern.
        exact = Path(pattern).is_file()
        names = [pattern] if exact else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
        files = [Path(name).absolute() for name in names if Path(name).is_file()]
        if not files:
            if Path(pattern).is_dir():
                raise SourceError(f"{pattern}: is a folder; name files in it: '{pattern}/*.mp4'")
            raise SourceError(f"{pattern}: no file is found there; check the path")
        parts = Path(pattern).absolute().parts
        magic = (i for i, part in enumerate(parts) if not exact and glob.has_magic(part))
        roots.append(Path(*parts[: next(magic, len(parts) - 1)]))
        found.update(dict.fromkeys(files))
    root = Path(os.path.commonpath(roots))
    named: dict[str, Path] = {}
    for path in found:
        name = as_utf8(path.relative_to(root).as_posix())
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
    """Segment every video of ``sources`` (folder name to file) into ``out``/name, and write
    ``out``/results.json.

    Videos are cut into chunks of about ``seconds`` at key frames. Videos and chunks that an earlier
    batch finished with the same bundle, options and file are kept, unless they were damaged since:
    all of them are read for it. A video that fails has a line in
    ``failures`` and stops no other; ``on_progress`` is called after each chunk.

    Raises BundleError, EngineError, ParityError when the model cannot be run and OutputError when
    ``out`` cannot be written, or another batch is writing there.
    """
    bundle = settings_bundle(settings)
    with _locked(out):
        whole = _run(sources, out, settings, pool, bundle, seconds, on_progress)
        write_json(out / RESULTS_NAME, whole)
    return whole


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """The folder, made if it is missing, for this batch alone. Raises OutputError."""
    created: list[Path] = []
    try:
        created = make_folder(out)
        lock = FileLock(out / _LOCK)
    except BlockingIOError as error:
        raise OutputError(
            f"{out}: another batch is writing there; wait for its end, or name another --out"
        ) from error
    except OSError as error:
        remove_empty(created)
        raise output_error(out, error) from error
    try:
        with lock:
            yield
    finally:
        remove_empty(created)


def _run(
    sources: dict[str, Path],
    out: Path,
    settings: Settings,
    pool: Pool,
    bundle: Bundle,
    seconds: float,
    on_progress: Callable[[], None] | None,
) -> BatchResults:
    results: dict[str, SourceResult] = {}
    videos: dict[str, _Video] = {}
    for name, path in sources.items():
        source, folder = str(path), out.absolute() / name
        try:
            state = stamp(path)
        except OSError as error:
            why = f"{path}: {error.strerror}; check the name and its permissions"
            results[name] = SourceResult(source, name, "", error=why)
            continue
        key = key_of(bundle, settings, source, state)
        if (kept := _finished(folder, key)) is not None:
            results[name] = kept
            continue
        place = hashlib.sha256(name.encode()).hexdigest()[:12]
        job = Job(source, str(out.absolute() / _WORK / f"{place}-{key}"), state, seconds)
        videos[source] = _Video(job, folder, SourceResult(source, name, key))
    _do_all(videos, pool, on_progress or (lambda: None))
    with contextlib.suppress(OSError):  # chunks that are left there are kept for the next batch
        (out / _WORK).rmdir()
    results |= {video.result.folder: video.result for video in videos.values()}
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
    return whole


@dataclass
class _Video:
    """A video that is to be done, and how far it is; ``joined`` when its ``folder`` is there."""

    job: Job
    folder: Path
    result: SourceResult
    chunks: tuple[Chunk, ...] = ()
    done: dict[str, Outcome] = field(default_factory=dict)
    joined: bool = False

    def __post_init__(self) -> None:
        self.fail(f"{self.job.source}: a part of it was lost with its worker; run the batch again")

    def fail(self, error: str) -> None:
        """What there is to say of it, unless it is joined later on."""
        self.result = msgspec.structs.replace(self.result, error=error)

    def take(self, outcome: Outcome) -> None:
        """Note a chunk that is written; the last one makes the whole."""
        self.done[outcome.chunk] = outcome
        if all(chunk.name in self.done for chunk in self.chunks):
            result = msgspec.structs.replace(self.result, error=outcome.error or None)
            pieces = [self.done[chunk.name] for chunk in self.chunks]
            self.result = join(self.folder, Path(self.job.work), pieces, result)
            self.joined = True


def _do_all(videos: dict[str, _Video], pool: Pool, on_progress: Callable[[], None]) -> None:
    """Cut the videos, do their chunks, and then uncut, as a single run does, what cannot be had in
    chunks."""
    for outcome in _outcomes(videos, pool, [video.job for video in videos.values()]):
        videos[outcome.source].chunks = outcome.chunks
    for again in (False, True):
        jobs = [
            msgspec.structs.replace(video.job, chunk=chunk)
            for video in videos.values()
            for chunk in video.chunks
            if not video.joined and (chunk == WHOLE or not again)
        ]
        for outcome in _outcomes(videos, pool, jobs):
            on_progress()
            if outcome.status == "inexact":
                videos[outcome.source].chunks = (WHOLE,)
            elif outcome.status in ("done", "partial"):
                videos[outcome.source].take(outcome)


def _outcomes(videos: dict[str, _Video], pool: Pool, jobs: Sequence[Job]) -> Iterator[Outcome]:
    for outcome in pool(jobs) if jobs else ():
        if outcome.status == "fatal":
            raise EngineError(outcome.error)
        if outcome.status == "failed":
            videos[outcome.source].fail(outcome.error)
        yield outcome


def _finished(folder: Path, key: str) -> SourceResult | None:
    try:
        result = msgspec.json.decode((folder / FINISHED_NAME).read_bytes(), type=SourceResult)
    except (OSError, msgspec.DecodeError):
        return None
    if result.key != key or result.error is not None:
        return None
    try:
        same = digest_of(folder) == result.digest
    except OSError:
        same = False
    if not same:
        _log.warning("%s was changed or damaged since it was finished: it is done again", folder)
    return result if same else None


def join(target: Path, work: Path, pieces: Sequence[Outcome], result: SourceResult) -> SourceResult:
    """Make the folder ``target`` of the finished ``pieces`` in ``work``, which is then removed.

    Frames are numbered through. An old ``target`` that a batch wrote is exchanged whole. The result
    is also in it, for the next batch. Raises OutputError.
    """
    name = partial_path(Path(LINES_NAME)) if result.error else Path(LINES_NAME)
    totals: dict[str, float] = {}
    count = 0
    try:
        with AtomicFolder(target) as folder:
            with (folder.path / name).open("wb") as lines:
                for piece in pieces:
                    lines.writelines(_renumbered(work / piece.chunk / name, count, totals))
                    _link_masks(work / piece.chunk / MASKS_NAME, count, folder.path / MASKS_NAME)
                    # What is COCO's is there of whole videos only.
                    for coco in (Path(COCO_NAME), partial_path(Path(COCO_NAME))):
                        if (work / piece.chunk / coco).exists():
                            _link(work / piece.chunk / coco, folder.path / coco)
                    _link_masks(work / piece.chunk / PANOPTIC_NAME, 0, folder.path / PANOPTIC_NAME)
                    count += piece.frames
            whole = msgspec.structs.replace(
                result,
                frames=count,
                chunks=tuple(piece.frames for piece in pieces),
                engines=tuple(sorted({piece.engine for piece in pieces})),
                shares={name: round(total / count, 6) for name, total in totals.items()},
            )
            whole = msgspec.structs.replace(whole, digest=digest_of(folder.path))
            (folder.path / FINISHED_NAME).write_bytes(json_bytes(whole))
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
    """A second name for each file, so that the chunk stays whole until the video is."""
    if not masks.is_dir():
        return
    target.mkdir(exist_ok=True)
    for file in masks.iterdir():
        number, _, kind = file.name.partition(".")  # .png, or .segments.png
        is_frame = number.isdigit()
        _link(file, target / (f"{int(number) + offset:06d}.{kind}" if is_frame else file.name))


def _link(file: Path, named: Path) -> None:
    try:
        named.hardlink_to(file)
    except OSError:  # a file system without links
        shutil.copyfile(file, named)
