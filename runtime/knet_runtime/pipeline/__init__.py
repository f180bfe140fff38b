"""The run: videos, cameras and images through one engine into sinks, all at the same time.

A thread per feed reads, one segments, a thread per feed writes; between them are queues of a few
frames. ``feed`` says how a feed ends.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from time import monotonic

from knet_runtime.errors import ConfigError, EngineError, SourceError
from knet_runtime.pipeline.feed import (
    Feed as Feed,
    FeedEvent,
    FeedQueue,
    FeedState,
    Policy as Policy,
    check_paths,
)
from knet_runtime.pipeline.stats import RunSnapshot, RunStats as RunStats, StageSnapshot
from knet_runtime.pipeline.threads import (
    SINK_PATIENCE,
    STALE_AFTER,
    EngineThread,
    PipelineThread,
    SegmentCall as SegmentCall,
    Writer,
    read_frames,
)
from knet_runtime.segmentation import Segmentation
from knet_runtime.types import Frame

_log = logging.getLogger(__name__)

STOP_PATIENCE = 30.0
"""Seconds that a source or an engine may take to come back when the run is to end."""

ENGINE_PATIENCE = 5.0
"""Seconds that an engine has for the call that it is in when the run is stopped; twice its longest
call if that is more, and never more than ``STOP_PATIENCE``."""

_TICK = 0.1
"""Seconds after which the thread that waits for the others looks after them."""


@dataclass(frozen=True)
class RunSummary:
    """What a run did: seconds from the first read to the last closed output, and its numbers.

    >>> from knet_deploy import Feed, Segmenter, open_source, run
    >>> with open_source("drive.mp4") as source, Segmenter() as segment:
    ...     summary = run([Feed(source, [])], segment)
    >>> summary.frames, summary.fps > 0, "infer" in summary.stages
    (8, True, True)
    """

    seconds: float
    snapshot: RunSnapshot

    @property
    def frames(self) -> int:
        """Frames written, of all feeds."""
        return sum(feed.frames for feed in self.snapshot.feeds.values())

    @property
    def fps(self) -> float:
        """Frames per second over the whole run, of all feeds; 0 without frames."""
        return self.frames / self.seconds if self.frames else 0.0

    @property
    def stages(self) -> dict[str, StageSnapshot]:
        """The times of the first feed; see ``snapshot`` for the others."""
        return next(iter(self.snapshot.feeds.values())).stages


def run(
    feeds: Sequence[Feed],
    segmenter: SegmentCall,
    *,
    max_frames: int | None = None,
    stop: threading.Event | None = None,
    on_frame: Callable[[Frame, Segmentation], None] | None = None,
    stats: RunStats | None = None,
    warm_up: bool = True,
    stale_after: float = STALE_AFTER,
    sink_patience: float = SINK_PATIENCE,
) -> RunSummary:
    """Run a ``Pipeline`` of these until all sources have ended, or ``stop`` is set.

    >>> from knet_deploy import Feed, OverlayVideo, Segmenter, open_source, run
    >>> with open_source("drive.mp4") as source, Segmenter() as segment:
    ...     summary = run([Feed(source, [OverlayVideo("overlay.mp4", source.info)])], segment)
    >>> summary.frames
    8
    """
    pipeline = Pipeline(
        feeds,
        segmenter,
        max_frames=max_frames,
        on_frame=on_frame,
        stats=stats,
        warm_up=warm_up,
        stale_after=stale_after,
        sink_patience=sink_patience,
    )
    try:
        pipeline.start()
        return pipeline.join(stop)
    finally:  # an interrupt may come between any two steps
        pipeline.stop()
        pipeline.drain()


class Pipeline:
    """Feeds that run through one segmenter in threads of their own, as a context manager.

    The engine takes a frame of each feed in turn, as many as are ready and at most ``max_batch`` at
    once; it never waits for more. Frames of a feed keep their order. ``max_frames`` ends each feed
    after so many; ``on_frame`` is called after the sinks have a frame, in the feed's own thread.
    ``warm_up`` runs the engine on blank frames before anything is read. A live feed that has no
    new frame for ``stale_after`` seconds gives its sinks the last one again, marked as stale, at
    most that often.

    However it ends, every sink is closed, once: as "complete" at the source's end, after
    ``max_frames``, when it is stopped, on Ctrl-C (a second one writes nothing more, but closes) and
    when whoever reads an output has had enough (OutputClosed: that feed ends); else as "partial".
    A feed that fails keeps no other from going on to its end, and is raised then. An engine that
    fails ends all. A sink that does not come back within ``sink_patience`` seconds is left behind,
    with its thread, the others are closed. Sources stay open: whoever opened them closes them.

        >>> from knet_deploy import Feed, Pipeline, RleLines, Segmenter, open_source
        >>> with open_source("drive.mp4") as source, Segmenter() as segment:
        ...     sink = RleLines("out.jsonl", segment.model_id)
        ...     with Pipeline([Feed(source, [sink])], segment, max_frames=3) as pipeline:
        ...         summary = pipeline.join()
        >>> summary.frames
        3
    """

    def __init__(
        self,
        feeds: Sequence[Feed],
        segmenter: SegmentCall,
        *,
        max_frames: int | None = None,
        on_frame: Callable[[Frame, Segmentation], None] | None = None,
        stats: RunStats | None = None,
        warm_up: bool = True,
        stale_after: float = STALE_AFTER,
        sink_patience: float = SINK_PATIENCE,
    ) -> None:
        names = [feed.name for feed in feeds]
        if len(set(names)) < len(names):
            raise ConfigError(f"the feeds are called {', '.join(names)}; give each its own name")
        if not feeds:
            raise ConfigError("there is nothing to run; give at least one feed")
        self._stats = RunStats() if stats is None else stats
        self._warm_up = warm_up
        self._errors: list[BaseException] = []
        self._logged: list[BaseException] = []
        lock = threading.Lock()
        work = threading.Condition(lock)
        self._queues = [
            FeedQueue(
                feed,
                self._stats.add_feed(feed.name, feed.source),
                lock=lock,
                work=work,
                errors=self._errors,
                limit=max_frames,
            )
            for feed in feeds
        ]
        self._readers = {
            queue: PipelineThread(f"reader {queue.feed.name}", partial(read_frames, queue))
            for queue in self._queues
        }
        self._engine = EngineThread(segmenter, self._queues, work)
        self._engine_lost = False
        self._writers = [
            Writer(queue, on_frame, stale_after, sink_patience) for queue in self._queues
        ]
        self._began = self._ended = 0.0
        self._stopping = False

    def start(self) -> None:
        """Warm the engine up and begin to read.

        Raises OutputError, with all sinks closed, when a sink would write over a source or another
        sink, and what the engine raises.
        """
        try:
            check_paths([queue.feed for queue in self._queues])
            if self._warm_up:
                self._engine.warm_up_first()
            self._engine.thread.start()
            while not self._engine.warm.wait(_TICK):
                pass
            if self._errors:
                raise self._errors[0]
        except BaseException as error:
            self.stop()
            for queue in self._queues:
                queue.advance(FeedEvent.READER_DONE, error)
            self.join()
            raise
        self._began = monotonic()
        for thread in self._threads():
            if thread is not self._engine.thread:
                thread.start()

    def stop(self) -> None:
        """Read no more, from any thread and from signal handlers; returns at once."""
        self._stopping = True

    def join(self, stop: threading.Event | None = None) -> RunSummary:
        """Wait for the end, or until ``stop`` is set and all is closed.

        Raises what went wrong first; the rest is logged. No thread is left, but for those that hang
        in a sink, source or engine, which an error names.
        """
        interrupt = self.drain(stop)
        summary = RunSummary(self._ended - self._began, self._stats.snapshot())
        self._raise(interrupt)
        return summary

    def drain(self, stop: threading.Event | None = None) -> BaseException | None:
        """Wait like ``join``, and raise nothing: the first interrupt of the wait is returned."""
        interrupt: BaseException | None = None
        while True:
            try:
                for thread in self._threads():
                    if thread.ident is None:  # an interrupt came before; its sinks must be closed
                        thread.start()
                while any(thread.working for thread in self._threads()):
                    if stop is not None and stop.is_set():
                        self.stop()
                    self._look_after()
                    self._wait()
                break
            except BaseException as error:
                self.stop()
                if interrupt is not None:
                    for queue in self._queues:
                        queue.advance(FeedEvent.WRITER_DONE)
                interrupt = interrupt or error
        for thread in self._threads():
            if thread.ident is not None:
                thread.join()
        self._ended = self._ended or monotonic()
        return interrupt

    def __enter__(self) -> Pipeline:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.join()

    def _threads(self) -> list[PipelineThread]:
        engine = [] if self._engine_lost else [self._engine.thread]
        return [*(writer.thread for writer in self._writers), *engine, *self._readers.values()]

    def _wait(self) -> None:
        for thread in self._threads():
            if thread.working:
                thread.wait(_TICK)
                return

    def _look_after(self) -> None:
        """What must happen while the threads work, from the thread that waits for them."""
        for error in list(self._errors):
            if isinstance(error, KeyboardInterrupt):
                self.stop()
            elif any(queue.state is FeedState.READING for queue in self._queues):
                self._log(error, "%s; the other sources go on")
        for queue, writer in zip(self._queues, self._writers, strict=True):
            writer.check()
            if self._stopping and queue.ending_since == inf:
                queue.advance(FeedEvent.STOP)
        now = monotonic()
        for queue, reader in list(self._readers.items()):
            if reader.working and now - queue.ending_since > STOP_PATIENCE:
                del self._readers[queue]
                name = queue.feed.name or "the source"
                text = f"{name}: does not stop and was given up; start again"
                queue.advance(FeedEvent.READER_DONE, SourceError(text))
        unused_since = max(queue.ending_since for queue in self._queues)
        patience = STOP_PATIENCE
        if self._stopping:
            patience = min(patience, max(ENGINE_PATIENCE, 2 * self._engine.longest))
        hangs = now - max(unused_since, self._engine.busy_since) > patience
        if hangs and not self._engine_lost:
            self._engine_lost = True
            text = "the engine does not come back and was given up; start again"
            self._engine.fail(EngineError(text))

    def _log(self, error: BaseException, text: str = "%s") -> None:
        if error not in self._logged:
            self._logged.append(error)
            _log.error(text, error)

    def _raise(self, interrupt: BaseException | None) -> None:
        """The interrupt, or what happened first; what is not logged yet of the rest is."""
        first = interrupt or next(iter(self._errors), None)
        for error in self._errors:
            if error is not first and not isinstance(error, KeyboardInterrupt):
                self._log(error)
        if first is not None:
            raise first
