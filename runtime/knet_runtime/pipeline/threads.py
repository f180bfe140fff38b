"""The threads of a run: one per feed that reads, the engine's, and one per feed that writes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import inf
from pathlib import Path
from time import monotonic
from typing import Protocol, runtime_checkable

from knet_runtime.atomic import output_error
from knet_runtime.errors import KnetError, OutputClosed, OutputError, SourceError
from knet_runtime.pipeline.feed import FeedEvent, FeedQueue, FeedState, FrameJob
from knet_runtime.segmentation import Segmentation
from knet_runtime.sinks import Sink
from knet_runtime.types import Frame, Rgb

_log = logging.getLogger(__name__)

STALE_AFTER = 1.0
"""Seconds without a new frame after which a live feed shows the last one again, as stale."""

SINK_PATIENCE = 60.0
"""Seconds that a sink may take for one frame, or to close, before the run goes on without it."""

SegmentCall = Callable[[Rgb], Segmentation]
"""What a ``Segmenter`` is at the least: uint8 [H, W, 3] RGB to a result of that size."""


@runtime_checkable
class BatchSegmentCall(Protocol):
    """What a ``Segmenter`` is besides: several frames at once."""

    @property
    def max_batch(self) -> int: ...

    def batch(self, frames: Sequence[Rgb]) -> list[Segmentation]: ...

    def warm_up(self, largest: int) -> None: ...


class PipelineThread(threading.Thread):
    """A thread that does not keep the process alive, and whose end can be awaited amid signals.

    ``join`` cannot: interrupted by an exception of a signal handler, Python before 3.13 takes the
    thread that goes on for one that has ended.
    """

    def __init__(self, name: str, target: Callable[[], None]) -> None:
        super().__init__(name=f"knet-{name}", target=target, daemon=True)
        self._over = threading.Event()

    def run(self) -> None:
        """Called by ``start``."""
        try:
            super().run()
        finally:
            self._over.set()

    @property
    def working(self) -> bool:
        """Whether it has begun and not come to its end."""
        return self.ident is not None and not self._over.is_set()

    def wait(self, seconds: float) -> None:
        """Return when it has come to its end, or after so long."""
        self._over.wait(seconds)


def read_frames(queue: FeedQueue) -> None:
    """What a feed's reading thread does: frames of its source to its queue."""
    error = None
    try:
        frames = iter(queue.feed.source)
        while queue.state is FeedState.READING:
            began = monotonic()
            frame = next(frames, None)
            if frame is None:
                break
            now = monotonic()
            queue.stats.add("read", 1000 * (now - began))
            if not queue.put(FrameJob(frame, now)):
                break
    except BaseException as failure:
        error = failure
    queue.advance(FeedEvent.READER_DONE, error)


class EngineThread:
    """Takes frames off the queues, as many as are ready and one of each at most, and gives them
    back with their results. ``work`` is what the queues notify; ``thread`` is for others to start.
    """

    def __init__(
        self, segmenter: SegmentCall, queues: Sequence[FeedQueue], work: threading.Condition
    ) -> None:
        self._segmenter = segmenter
        self._batched = segmenter if isinstance(segmenter, BatchSegmentCall) else None
        self._queues = list(queues)
        self._work = work
        self._max_batch = 1 if self._batched is None else self._batched.max_batch
        self._turn = 0
        self._cold = False
        self.busy_since = inf
        """Since when a batch is being segmented (monotonic clock); infinite between batches."""
        self.longest = 0.0
        """Seconds that a batch took at most."""
        self.warm = threading.Event()
        """Set when frames can come; or when they never can, as it has failed."""
        self.thread = PipelineThread("engine", self._run)

    def warm_up_first(self) -> None:
        """Have it run on blank frames before anything else, so that the first ones do not wait."""
        self._cold = self._batched is not None

    def fail(self, error: BaseException) -> None:
        """Nothing more is to be expected of it, by any feed."""
        for queue in self._queues:
            queue.advance(FeedEvent.ENGINE_DONE, error)

    def _run(self) -> None:
        try:
            if self._batched is not None and self._cold:
                with self._timed():
                    self._batched.warm_up(len(self._queues))
            self.warm.set()
            while batch := self._gather():
                with self._timed():
                    self._segment(batch)
        except BaseException as error:
            self.fail(error)
        finally:
            self.warm.set()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        self.busy_since = began = monotonic()
        yield
        self.longest = max(self.longest, monotonic() - began)
        self.busy_since = inf

    def _gather(self) -> list[tuple[FeedQueue, FrameJob]]:
        """Frames of different feeds for the engine, another first each time; none at the end."""
        with self._work:
            while any(queue.state < FeedState.WRITING for queue in self._queues):
                batch: list[tuple[FeedQueue, FrameJob]] = []
                for queue in self._queues[self._turn :] + self._queues[: self._turn]:
                    if len(batch) < self._max_batch and (job := queue.take()) is not None:
                        batch.append((queue, job))
                if batch:
                    self._turn = (self._queues.index(batch[-1][0]) + 1) % len(self._queues)
                    return batch
                self._work.wait()
            return []

    def _segment(self, batch: list[tuple[FeedQueue, FrameJob]]) -> None:
        images = [job.frame.image for _, job in batch]
        try:
            if self._batched is not None:
                results = self._batched.batch(images)
            else:
                results = [self._segmenter(image) for image in images]
        except SourceError as error:  # an array that is no frame is its own feed's affair
            if len(batch) > 1:
                for one in batch:
                    self._segment([one])
            else:
                batch[0][0].advance(FeedEvent.ENGINE_DONE, error)
            return
        for (queue, job), result in zip(batch, results, strict=True):
            job.result = result
            queue.give(job)


class Writer:
    """Takes segmented frames off a queue and gives them to its feed's sinks; one thread runs it.

    A sink that is still busy after ``patience`` seconds is left behind: ``check`` (another thread
    calls it) then has the other sinks closed and the feed marked as failed. ``thread`` is for
    others to start.
    """

    def __init__(
        self,
        queue: FeedQueue,
        on_frame: Callable[[Frame, Segmentation], None] | None,
        stale_after: float,
        patience: float,
    ) -> None:
        self._queue = queue
        self._on_frame = on_frame
        self._stale_after = stale_after
        self._patience = patience
        self._open = list(queue.feed.sinks)
        self._busy: tuple[Sink, float] | None = None
        self._last: tuple[Frame, Segmentation] | None = None
        self._thread_name = f"writer {queue.feed.name}"
        self.thread = PipelineThread(self._thread_name, self._run)

    def check(self) -> None:
        """Give up a sink that hangs. Called every now and then by the thread that waits."""
        busy = self._busy
        if busy is None or monotonic() - busy[1] < self._patience:
            return
        sink = busy[0]
        # The thread that hangs cannot be ended; it touches nothing more if it comes back.
        self.thread = PipelineThread(self._thread_name, self._close)
        self._busy = None
        if sink in self._open:
            self._open.remove(sink)
        error = OutputError(
            f"{sink.name}: did not answer for {self._patience:g} s and was given up, what it wrote "
            "may be incomplete; see whether its disk or network works"
        )
        self._queue.advance(FeedEvent.WRITER_DONE, error)
        self.thread.start()

    def _is_mine(self) -> bool:
        """Whether the running thread has not been given up."""
        return threading.current_thread() is self.thread

    def _run(self) -> None:
        queue = self._queue
        try:
            while self._is_mine() and queue.state < FeedState.CLOSING:
                job = queue.next_segmented(self._stale_after)
                if job is not None:
                    self._write(job)
                elif self._last is not None and queue.is_silent(self._stale_after):
                    frame, result = self._last
                    self._to_sinks(replace(frame, stale=True), result)
                    queue.stats.repeated()
        except OutputClosed as error:
            _log.info("%s", error)
            queue.advance(FeedEvent.WRITER_DONE)
        except BaseException as error:
            if self._is_mine():
                queue.advance(FeedEvent.WRITER_DONE, error)
        if self._is_mine():
            self._close()

    def _write(self, job: FrameJob) -> None:
        feed, stats = self._queue.feed, self._queue.stats
        frame, result = job.frame, job.result
        stats.add("queue", job.waited)
        for stage, value in result.timings.items():
            stats.add(stage, value)
        if feed.transform is not None:
            began = monotonic()
            result = feed.transform(frame, result)
            stats.add("transform", 1000 * (monotonic() - began))
        began = monotonic()
        self._last = (frame, result)
        self._to_sinks(frame, result)
        if not self._is_mine():
            return
        if self._on_frame is not None:
            self._on_frame(frame, result)
        now = monotonic()
        stats.add("write", 1000 * (now - began))
        stats.add("latency", 1000 * (now - job.read_at))
        stats.wrote(job.read_at)

    def _to_sinks(self, frame: Frame, result: Segmentation) -> None:
        for sink in self._queue.feed.sinks:
            with self._watched(sink, OSError):
                sink.write(frame, result)
            if not self._is_mine():
                return

    def _close(self) -> None:
        """Close what is open, each sink once, whatever the others do."""
        complete = self._queue.complete
        while self._is_mine() and self._open:
            sink = self._open.pop(0)
            try:
                with self._watched(sink, Exception):
                    sink.close(complete=complete)
            except BaseException as error:  # the others must be closed all the same
                if self._is_mine():
                    self._queue.advance(FeedEvent.WRITER_DONE, error)
        if self._is_mine():
            self._queue.advance(FeedEvent.SINKS_CLOSED)

    @contextmanager
    def _watched(self, sink: Sink, failures: type[Exception]) -> Iterator[None]:
        """Note that ``sink`` is busy; ``failures`` of other kinds than ours are its OutputError."""
        self._busy = (sink, monotonic())
        try:
            yield
        except KnetError:
            raise
        except failures as error:
            raise output_error(sink.path or Path(sink.name), error) from error
        finally:
            if self._is_mine():
                self._busy = None
