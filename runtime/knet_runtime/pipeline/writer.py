"""The end of a feed: its sinks get every frame in order, and are closed whatever happens."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic

from knet_runtime.atomic import output_error
from knet_runtime.errors import KnetError, OutputClosed, OutputError
from knet_runtime.pipeline.engine_thread import PipelineThread
from knet_runtime.pipeline.feed import FeedQueue, FrameJob
from knet_runtime.pipeline.state import FeedEvent, FeedState
from knet_runtime.segmentation import Segmentation
from knet_runtime.sinks import Sink
from knet_runtime.types import Frame

_log = logging.getLogger(__name__)

STALE_AFTER = 1.0
"""Seconds without a new frame after which a live feed shows the last one again, as stale."""

SINK_PATIENCE = 60.0
"""Seconds that a sink may take for one frame, or to close, before the run goes on without it."""


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
