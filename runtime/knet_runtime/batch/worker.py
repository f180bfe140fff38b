"""What a worker does: cut one video, or segment one part of it into a folder that appears whole."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import msgspec

from knet_runtime.atomic import output_error
from knet_runtime.batch.chunks import Chunk, cut
from knet_runtime.batch.records import (
    FINISHED_NAME,
    LINES_NAME,
    MASKS_NAME,
    Job,
    Outcome,
    Settings,
    stamp,
)
from knet_runtime.bundle.store import Bundle, open_bundle
from knet_runtime.errors import BundleError, EngineError, KnetError, ParityError, SourceError
from knet_runtime.segmenter import Segmenter
from knet_runtime.sinks import JsonLines, MaskFolder, Sink
from knet_runtime.sources.open import open_source
from knet_runtime.sources.video import VideoSource

_ATTEMPTS = 4  # at a segment whose worker dies


class ChunkWorker:
    """Does jobs, one after the other, with one engine that is opened for the first segment.

    ``model`` is the model id that the bundle must have on this machine. Nothing is raised: what
    fails is an ``Outcome``.
    """

    def __init__(self, settings: Settings, model: str) -> None:
        self._settings = settings
        self._model = model
        self._segmenter: Segmenter | None = None

    def __call__(self, job: Job) -> Outcome:
        """Cut the video, or do the segment, unless it is done already."""
        try:
            if job.segment is None:
                return Outcome(job.source, "cut", segments=cut(Path(job.source), job.seconds))
            return finished(job) or self._segment(job, job.segment)
        except (EngineError, BundleError, ParityError) as error:
            return Outcome(job.source, "fatal", error=str(error))
        except KnetError as error:
            text = str(error)
            named = text if job.source in text else f"{job.source}: {text}"
            return Outcome(job.source, "failed", error=named)

    def _open(self) -> Segmenter:
        if self._segmenter is None:
            opened = settings_bundle(self._settings)
            if opened.model_id != self._model:
                raise BundleError(
                    f"{self._settings.bundle} holds {opened.model_id} on {socket.gethostname()}, "
                    f"not {self._model}: copy the same bundle to every machine"
                )
            segmenter = Segmenter(opened, self._settings.engine)
            if self._settings.require_verified and (
                unverified_reason := segmenter.unverified_reason
            ):
                raise ParityError(
                    f"{self._settings.bundle} on {segmenter.engine}: {unverified_reason}"
                )
            segmenter.self_test()
            self._segmenter = segmenter
        return self._segmenter

    def _segment(self, job: Job, segment: Chunk) -> Outcome:
        segmenter = self._open()
        work = Path(job.work)
        _count_attempt(work, segment)
        # Two machines may do the same segment, when one is believed dead: each in its own folder.
        fresh = work / f".{segment.name}.{socket.gethostname()}.{os.getpid()}.part"
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            outcome = _segment_into(fresh, job, segment, segmenter, masks=self._settings.masks)
            if outcome.status in ("done", "partial"):
                (fresh / FINISHED_NAME).write_bytes(msgspec.json.encode(outcome))
                try:
                    fresh.rename(work / segment.name)
                except OSError:
                    if (other := finished(job)) is None:
                        raise
                    return other
            return outcome
        except OSError as error:
            raise output_error(work, error) from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def _count_attempt(work: Path, segment: Chunk) -> None:
    """Refuse what killed its worker each time: it would be tried for ever."""
    begun = work / f".{segment.name}.begun"
    try:
        work.mkdir(parents=True, exist_ok=True)
        with begun.open("ab") as file:
            file.write(b".")
        attempts = begun.stat().st_size
    except OSError as error:
        raise output_error(begun, error) from error
    if attempts > _ATTEMPTS:
        begun.unlink(missing_ok=True)  # the next batch may have more memory
        raise SourceError(
            f"part {segment.name} killed its worker {_ATTEMPTS} times, for want of memory perhaps: "
            "run fewer workers"
        )


def settings_bundle(settings: Settings) -> Bundle:
    """The opened bundle at the size that is asked for. Raises BundleError and ConfigError."""
    opened = open_bundle(settings.bundle)
    return opened if settings.size is None else opened.with_input_size(settings.size)


def finished(job: Job) -> Outcome | None:
    """What an earlier worker left of this segment, if it is whole."""
    if job.segment is None:
        return None
    try:
        data = (Path(job.work) / job.segment.name / FINISHED_NAME).read_bytes()
        return msgspec.json.decode(data, type=Outcome)
    except (OSError, msgspec.DecodeError):
        return None


def _segment_into(
    folder: Path, job: Job, segment: Chunk, segmenter: Segmenter, *, masks: bool
) -> Outcome:
    inexact = Outcome(job.source, "inexact", segment.name)
    sinks: list[Sink] = [JsonLines(folder / LINES_NAME, segmenter.model_id)]
    if masks:
        sinks.append(MaskFolder(folder / MASKS_NAME))
    times: list[int | None] = []
    error = ""
    try:
        with open_source(Path(job.source), segment.options()) as source:
            _check_unchanged(job)
            for frame in source:
                time = segment.ticks(frame.pts)
                if segment.first is not None and time is not None and time < segment.first:
                    continue
                times.append(time)
                number = len(times) - 1
                own = type(frame)(frame.image, number, frame.pts, f"{number:06d}")
                mask = segmenter(frame.image)
                for sink in sinks:
                    sink.write(own, mask)
            if not segment.is_whole and isinstance(source, VideoSource) and source.deinterlaces:
                return inexact
        _check_unchanged(job)
    except SourceError as failure:
        if not segment.is_whole:
            return inexact
        error = str(failure)
    finally:
        for sink in sinks:
            sink.close(complete=True)
    if segment.times is not None and tuple(times) != segment.times:
        return inexact
    if error and not times:
        return Outcome(job.source, "failed", segment.name, error=error)
    return Outcome(
        job.source,
        "partial" if error else "done",
        segment.name,
        frames=len(times),
        engine=segmenter.engine,
        error=error,
    )


def _check_unchanged(job: Job) -> None:
    try:
        same = stamp(Path(job.source)) == job.stamp
    except OSError:
        same = False
    if not same:
        raise SourceError(f"{job.source}: was changed while it was read; run the batch again")
