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
from knet_runtime.pipeline.feed import FeedQueue, Item
from knet_runtime.segmentation import Segmentation
from knet_runtime.sinks import Sink
from knet_runtime.types import Frame

_log = logging.getLogger(__name__)

STALE_AFTER = 1.0
"""Seconds without a new picture after which a live feed shows the last one again, as stale."""

SINK_PATIENCE = 60.0
"""Seconds that a sink may take for one frame, or to close, before the run goes on without it."""


class Writer:
    """Takes segmented frames off a lane and gives them to its feed's sinks; one thread runs it.

    A sink that is still busy after ``patience`` seconds is left behind: ``check`` (another thread
    calls it) then has the other sinks closed and the feed marked as failed. ``thread`` is not
    started yet.
    """

    def __init__(
        self,
        lane: FeedQueue,
        on_frame: Callable[[Frame, Segmentation], None] | None,
        stale_after: float,
        patience: float,
    ) -> None:
        self._lane = lane
        self._on_frame = on_frame
        self._stale_after = stale_after
        self._patience = patience
        self._open = list(lane.feed.sinks)
        self._busy: tuple[Sink, float] | None = None
        self._closing = False
        self._last: tuple[Frame, Segmentation] | None = None
        self.thread = self._make_thread(self._run)

    def _make_thread(self, target: Callable[[], None]) -> PipelineThread:
        return PipelineThread(f"writer {self._lane.feed.name}", target)

    def check(self) -> None:
        """Give up a sink that hangs. Called every now and then by the thread that waits."""
        busy = self._busy
        if busy is None or monotonic() - busy[1] < self._patience:
            return
        sink = busy[0]
        error = OutputError(
            f"{sink.name}: did not answer for {self._patience:g} s and was given up, what it wrote "
            "may be incomplete; see whether its disk or network works"
        )
        self._lane.fail(error)
        self._lane.abort()
        if sink in self._open:
            self._open.remove(sink)
        # The thread that hangs can not be ended; it touches nothing more if it comes back.
        self._busy = None
        self.thread = self._make_thread(self._close)
        self.thread.start()

    def _run(self) -> None:
        lane = self._lane
        try:
            while not lane.finished and self._is_mine():
                item = lane.next_segmented(self._stale_after)
                if item is not None:
                    self._write(item)
                else:
                    self._repeat()
        except OutputClosed as error:
            _log.info("%s", error)
            lane.abort()
        except BaseException as error:
            if self._is_mine():
                lane.fail(error)
                lane.abort()
        if self._is_mine():
            self._close()

    def _is_mine(self) -> bool:
        """Whether the running thread has not been given up."""
        return threading.current_thread() is self.thread

    def _write(self, item: Item) -> None:
        lane, frame, mask = self._lane, item.frame, item.mask
        stats = lane.stats
        stats.add("queue", item.waited)
        for stage, value in mask.timings.items():
            stats.add(stage, value)
        if lane.feed.transform is not None:
            began = monotonic()
            mask = lane.feed.transform(frame, mask)
            stats.add("transform", 1000 * (monotonic() - began))
        began = monotonic()
        self._last = (frame, mask)
        self._to_sinks(frame, mask)
        if not self._is_mine():
            return
        if self._on_frame is not None:
            self._on_frame(frame, mask)
        now = monotonic()
        stats.add("write", 1000 * (now - began))
        stats.add("latency", 1000 * (now - item.read_at))
        stats.wrote(item.read_at)

    def _repeat(self) -> None:
        """Show the last picture again when a live source gives no new one."""
        since = self._lane.silent_since
        if not self._lane.feed.live or self._last is None or since is None:
            return
        if monotonic() - since < self._stale_after or self._lane.finished:
            return
        frame, mask = self._last
        self._to_sinks(replace(frame, stale=True), mask)
        self._lane.stats.repeated()

    def _to_sinks(self, frame: Frame, mask: Segmentation) -> None:
        for sink in self._lane.feed.sinks:
            with self._watched(sink):
                sink.write(frame, mask)
            if not self._is_mine():
                return

    def _close(self) -> None:
        """Close what is open, each sink once, whatever the others do."""
        self._closing = True
        complete = not self._lane.broken
        while self._is_mine() and self._open:
            sink = self._open[0]
            try:
                with self._watched(sink):
                    sink.close(complete=complete)
            except BaseException as error:  # the others must be closed all the same
                if self._is_mine():
                    self._lane.fail(error)
            if self._is_mine():
                self._open.pop(0)

    @contextmanager
    def _watched(self, sink: Sink) -> Iterator[None]:
        self._busy = (sink, monotonic())
        try:
            yield
        except (KnetError, KeyboardInterrupt, SystemExit):
            raise
        except Exception as error:
            if isinstance(error, OSError) or self._closing:
                raise output_error(sink.path or Path(sink.name), error) from error
            raise
        finally:
            if self._is_mine():
                self._busy = None
