"""What a worker does: cut one video where its parts, decoded apart, are the frames of the whole, or
run one chunk of it into a folder that appears whole."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import chain, pairwise
from pathlib import Path

import msgspec

from knet_runtime.atomic import json_bytes, output_error, publish, write_atomic
from knet_runtime.batch.records import (
    COCO_NAME,
    FINISHED_NAME,
    LINES_NAME,
    MASKS_NAME,
    PANOPTIC_NAME,
    WHOLE,
    Chunk,
    Job,
    Outcome,
    Settings,
    Status,
    digest_of,
    stamp,
)
from knet_runtime.bundle.store import Bundle, open_bundle
from knet_runtime.errors import BundleError, EngineError, KnetError, ParityError, SourceError
from knet_runtime.pipeline import Feed, RunStats, run
from knet_runtime.segmenter import Segmenter
from knet_runtime.sinks import CocoPanoptic, CocoResults, JsonLines, MaskFolder, Sink
from knet_runtime.sources import open_source
from knet_runtime.sources.base import Source, SourceOptions
from knet_runtime.sources.container import close_input, open_file
from knet_runtime.sources.decoder import READ_ERRORS, Decoder
from knet_runtime.sources.times import PacketClock
from knet_runtime.sources.video import VideoSource
from knet_runtime.tracking import Tracker
from knet_runtime.types import Closeable, Frame

_ATTEMPTS = 4  # at a chunk whose worker dies


class ChunkWorker:
    """Does jobs, one after the other, with one engine that is opened for the first chunk.

    ``model`` is the model id that the bundle must have on this machine. Nothing is raised: what
    fails is an ``Outcome``.
    """

    def __init__(self, settings: Settings, model: str) -> None:
        self._settings = settings
        self._model = model
        self._segmenter: Segmenter | None = None

    def __call__(self, job: Job) -> Outcome:
        """Cut the video, or do the chunk, unless it is done already."""
        try:
            if job.chunk is None:
                uncut = self._settings.uncut
                chunks = (WHOLE,) if uncut else cut(Path(job.source), job.seconds)
                return Outcome(job.source, "cut", chunks=chunks)
            return finished(job) or self._segment(job, job.chunk)
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
            segmenter = Segmenter(opened, self._settings.engine, rules=self._settings.rules)
            reason = segmenter.unverified_reason
            if self._settings.require_verified and reason is not None:
                raise ParityError(f"{self._settings.bundle} on {segmenter.engine}: {reason}")
            segmenter.self_test()
            self._segmenter = segmenter
        return self._segmenter

    def _segment(self, job: Job, chunk: Chunk) -> Outcome:
        """Do the chunk, in a folder that gets its name when all of it is written."""
        segmenter = self._open()
        work = Path(job.work)
        _count_attempt(work, chunk)
        # Two machines may do the same chunk, when one is believed dead: each in its own folder.
        fresh = work / f".{chunk.name}.{secrets.token_hex(4)}.{os.getpid()}.part"
        try:
            fresh.mkdir(parents=True)
            outcome = self._run(fresh, job, chunk, segmenter)
            if outcome.status in ("done", "partial"):
                outcome = msgspec.structs.replace(outcome, digest=digest_of(fresh))
                write_atomic(fresh / FINISHED_NAME, json_bytes(outcome))
                try:
                    publish(fresh, work / chunk.name)
                except OSError:
                    if (other := finished(job)) is None:
                        raise
                    return other
            return outcome
        except OSError as error:
            raise output_error(work, error) from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def _run(self, folder: Path, job: Job, chunk: Chunk, segmenter: Segmenter) -> Outcome:
        """Run the chunk's frames through the pipeline into ``folder``."""
        inexact = Outcome(job.source, "inexact", chunk.name)
        stats = RunStats()
        error = ""
        try:
            with open_source(Path(job.source), chunk.options()) as source:
                frames = _ChunkFrames(source, job, chunk)
                sinks: list[Sink] = [JsonLines(folder / LINES_NAME, segmenter.model_id)]
                if self._settings.masks:
                    sinks.append(MaskFolder(folder / MASKS_NAME))
                if self._settings.coco:
                    sinks.append(CocoResults(folder / COCO_NAME))
                if self._settings.coco_panoptic:
                    sinks.append(CocoPanoptic(folder / PANOPTIC_NAME))
                transform = Tracker() if self._settings.track else None
                feed = Feed(frames, sinks, transform=transform)
                run([feed], segmenter, stats=stats, warm_up=False)
                if not chunk.is_whole and isinstance(source, VideoSource) and source.deinterlaces:
                    return inexact
            if chunk.times is not None and tuple(frames.times) != chunk.times:
                return inexact
        except SourceError as failure:
            if not chunk.is_whole:
                return inexact
            error = str(failure)
        written = sum(feed.frames for feed in stats.snapshot().feeds.values())
        if error and not written:
            return Outcome(job.source, "failed", chunk.name, error=error)
        status: Status = "partial" if error else "done"
        return Outcome(
            job.source, status, chunk.name, frames=written, engine=segmenter.engine, error=error
        )


def _count_attempt(work: Path, chunk: Chunk) -> None:
    """Refuse what killed its worker each time: it would be tried for ever."""
    begun = work / f".{chunk.name}.begun"
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
            f"part {chunk.name} killed its worker {_ATTEMPTS} times, for want of memory perhaps: "
            "run fewer workers"
        )


def settings_bundle(settings: Settings) -> Bundle:
    """The opened bundle at the size that is asked for. Raises BundleError and ConfigError."""
    opened = open_bundle(settings.bundle)
    return opened if settings.size is None else opened.with_input_size(settings.size)


def finished(job: Job) -> Outcome | None:
    """What an earlier worker left of this chunk, if it is whole; else it is removed."""
    if job.chunk is None:
        return None
    folder = Path(job.work) / job.chunk.name
    with contextlib.suppress(OSError, msgspec.DecodeError):
        outcome = msgspec.json.decode((folder / FINISHED_NAME).read_bytes(), type=Outcome)
        if outcome.digest == digest_of(folder):
            return msgspec.structs.replace(outcome, source=job.source)
    shutil.rmtree(folder, ignore_errors=True)
    return None


class _ChunkFrames(Closeable):
    """The source of a chunk: of ``source``'s frames those that belong to it, numbered from 0.

    Raises SourceError also when the video is not the one that the job was made for.
    """

    def __init__(self, source: Source, job: Job, chunk: Chunk) -> None:
        self.info = source.info
        self.status = source.status
        self.times: list[int | None] = []
        """Those of the frames that were handed on, in the chunk's ticks."""
        self._source = source
        self._job = job
        self._chunk = chunk

    def __iter__(self) -> Iterator[Frame]:
        chunk = self._chunk
        _check_unchanged(self._job)
        for frame in self._source:
            time = chunk.ticks(frame.pts)
            if chunk.first is not None and time is not None and time < chunk.first:
                continue
            number = len(self.times)
            self.times.append(time)
            yield replace(frame, index=number, name=f"{number:06d}")
        _check_unchanged(self._job)

    def stop(self) -> None:
        self._source.stop()

    def close(self) -> None:
        self._source.close()


def _check_unchanged(job: Job) -> None:
    try:
        same = stamp(Path(job.source)) == job.stamp
    except OSError:
        same = False
    if not same:
        raise SourceError(f"{job.source}: was changed while it was read; run the batch again")


def cut(path: Path, seconds: float) -> tuple[Chunk, ...]:
    """Chunks of about ``seconds`` each, at least one, in order; all packets are read for it.

    A video whose packets leave doubt about its frames (without times, damaged, hidden by an edit
    list, key frames out of order), or that is interlaced, stays ``WHOLE``. Raises SourceError for
    what is no video.
    """
    with VideoSource(open_file(path), str(path), SourceOptions(), path) as source:
        if source.deinterlaces:  # a frame is made of those beside it
            return (WHOLE,)
    container = open_file(path)
    try:
        stream = Decoder(container, str(path), live=False).stream
        base = stream.time_base
        if base is None:
            return (WHOLE,)
        packets = container.demux(stream)
        first = next(packets, None)
        clock = PacketClock(container, stream, first, str(path))
        start = clock.start / base
        if start.denominator != 1 or first is None:
            return (WHOLE,)
        times, keys = [], []
        for packet in chain([first], packets):
            if not packet.size:
                continue
            clock.place(packet)
            if packet.pts is None or packet.is_corrupt or packet.is_discard:
                return (WHOLE,)
            times.append(packet.pts - int(start))
            if packet.is_keyframe:
                keys.append(times[-1])
    except READ_ERRORS:
        return (WHOLE,)
    finally:
        close_input(container)
    times.sort()
    ordered = keys == sorted(set(keys)) and len(set(times)) == len(times)
    if not keys or not ordered or times[0] < 0 or keys[0] != times[0]:
        return (WHOLE,)
    tick = Fraction(base)
    return _chunks(times, keys, (tick.numerator, tick.denominator), seconds)


def _chunks(
    times: list[int], keys: list[int], tick: tuple[int, int], seconds: float
) -> tuple[Chunk, ...]:
    shortest = Fraction(seconds) / Fraction(*tick)
    cuts: list[tuple[int, int]] = []  # the key frame before, and the one that is cut at
    last = times[0]
    for before, key in pairwise(keys):
        if key - last >= shortest:
            cuts.append((before, key))
            last = key
    if not cuts:
        return (WHOLE,)
    begins = [(None, None), *cuts]
    ends = [*(key for _, key in cuts), None]
    chunks = []
    for number, ((run_up, first), until) in enumerate(zip(begins, ends, strict=True)):
        low = 0 if first is None else bisect_left(times, first)
        high = len(times) if until is None else bisect_left(times, until)
        chunks.append(Chunk(number, tick, run_up, first, until, tuple(times[low:high])))
    return tuple(chunks)
