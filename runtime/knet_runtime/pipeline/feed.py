"""One source of a run: where its frames go, by which policy, its life, and its queues between the
threads.

    READING ──► STOPPING ──► DRAINING ──► WRITING ──► CLOSING ──► CLOSED

A feed only ever goes to the right, and may pass over states: a sink that fails takes it from
READING to CLOSING at once.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum, auto
from math import inf
from time import monotonic
from typing import Literal

from knet_runtime.errors import OutputError
from knet_runtime.pipeline.stats import FeedStats
from knet_runtime.segmentation import Segmentation
from knet_runtime.sinks import Sink
from knet_runtime.sources.base import Source
from knet_runtime.types import Frame

Policy = Literal["file", "live"]

Transform = Callable[[Frame, Segmentation], Segmentation]
"""Another result out of a frame and its result, called in the frames' order."""

_DEPTH = 3


@dataclass(eq=False)
class Feed:
    """A source and what is to become of its frames.

    ``name`` is that in the run's numbers; it differs between the feeds of a run. ``policy`` "file"
    drops no frame and makes the source wait; "live" always takes the newest frame and counts those
    it passes over, so that what is shown is never older than a frame or two; None goes by the
    source. ``transform`` makes another result out of a frame and its result before the sinks get it
    (smoothing, tracking, counting); it is called in the frames' order, by one thread.

        >>> from knet_deploy import Feed, MaskFolder, Segmenter, open_source, run
        >>> with open_source("photos") as source, Segmenter() as segment:
        ...     summary = run([Feed(source, [MaskFolder("masks")])], segment)
        >>> summary.frames
        2
    """

    source: Source
    sinks: Sequence[Sink]
    name: str = ""
    policy: Policy | None = None
    transform: Transform | None = None

    @property
    def live(self) -> bool:
        """Whether frames are dropped rather than awaited."""
        return self.source.info.live if self.policy is None else self.policy == "live"


class FeedState(IntEnum):
    """Where a feed is; later states are greater."""

    READING = auto()
    """The source is read, and its frames go through the engine to the sinks."""
    STOPPING = auto()
    """No more frames are wanted; the source has not come back from its last read yet."""
    DRAINING = auto()
    """The source is done; the frames that were read go through the engine to the sinks."""
    WRITING = auto()
    """The engine is done; the frames that it gave back go to the sinks."""
    CLOSING = auto()
    """Nothing more is written; the sinks are closed, one after the other."""
    CLOSED = auto()
    """Every sink is closed."""

    def after(self, event: FeedEvent) -> FeedState:
        """The state that follows: what ``event`` leads to, or this one where that lies behind it: a
        source, an engine or a sink may come back late. Raises RuntimeError where sinks are closed
        that may still be written to: a defect."""
        if event is FeedEvent.SINKS_CLOSED and self < FeedState.CLOSING:
            raise RuntimeError(f"{event.name} cannot happen to a feed that is {self.name}")
        return max(self, event.value)


class FeedEvent(Enum):
    """The table of transitions: what happens to a feed, and the state that it leads to, from any
    state before that one. The last four are said by whoever does that part, however it ends."""

    STOP = FeedState.STOPPING
    """No more frames are wanted, and those on their way are: the run was stopped."""
    READER_DONE = FeedState.DRAINING
    """The source has ended, failed, or was given up."""
    ENGINE_DONE = FeedState.WRITING
    """All frames are segmented, or ``max_frames`` are; or the engine failed or was given up."""
    WRITER_DONE = FeedState.CLOSING
    """All frames are written; or a sink failed, was given up, or has had enough; or the run was
    interrupted twice."""
    SINKS_CLOSED = FeedState.CLOSED
    """The last sink has been closed, or was given up."""


@dataclass(eq=False)
class FrameJob:
    """A frame on its way; times are of the monotonic clock, ``waited`` milliseconds in queues."""

    frame: Frame
    read_at: float
    waited: float = 0.0
    result: Segmentation = field(init=False)
    _queued_at: float = field(init=False)

    def enqueue(self, queue: deque[FrameJob]) -> None:
        """Wait in ``queue`` from now on."""
        self._queued_at = monotonic()
        queue.append(self)

    @staticmethod
    def dequeue(queue: deque[FrameJob]) -> FrameJob:
        """The one that has waited longest in ``queue``."""
        job = queue.popleft()
        job.waited += 1000 * (monotonic() - job._queued_at)
        return job


class FeedQueue:
    """What the threads of one feed share: its state, and a queue before and one behind the engine.

    The engine's thread never waits here: it takes a frame only when there is room for its result,
    so that a feed whose disk is slow holds up no other. ``work`` wakes that thread; its ``lock``
    guards all queues of a run. ``errors`` are those of all feeds, as they happen. ``limit`` ends
    the feed after so many frames.
    """

    def __init__(
        self,
        feed: Feed,
        stats: FeedStats,
        *,
        lock: threading.Lock,
        work: threading.Condition,
        errors: list[BaseException],
        limit: int | None,
    ) -> None:
        self.feed = feed
        self.stats = stats
        self.state = FeedState.READING
        self.complete = True
        """Whether its outputs are all that they should be; after an interrupt they are."""
        self.ending_since = inf
        """Since when it is to end, or needs no more of the engine (monotonic clock); its source's
        own end does not count."""
        self._lock = lock
        self._work = work
        self._changed = threading.Condition(lock)
        self._errors = errors
        self._limit = limit
        self._live = feed.live
        self._depth = 1 if feed.live else _DEPTH
        self._read: deque[FrameJob] = deque()
        self._in_engine = False
        self._segmented: deque[FrameJob] = deque()
        self._put = self._taken = 0
        self._read_at = monotonic()

    def advance(self, event: FeedEvent, error: BaseException | None = None) -> None:
        """Go on to the state that follows ``event``, from any thread; ``error`` is its cause."""
        with self._lock:
            if error is not None:
                self._errors.append(error)
                self.complete &= isinstance(error, KeyboardInterrupt)
            before, self.state = self.state, self.state.after(event)
            if event is not FeedEvent.READER_DONE:
                self.ending_since = min(self.ending_since, monotonic())
            drained = self._is_drained
            self._changed.notify_all()
            self._work.notify()
        if before is FeedState.READING and event is not FeedEvent.READER_DONE:
            self.feed.source.stop()
        if drained:
            self.advance(FeedEvent.ENGINE_DONE)

    @property
    def _is_drained(self) -> bool:
        """Whether the engine has had all that there is for it."""
        return self.state is FeedState.DRAINING and not self._read and not self._in_engine

    @property
    def _has_room(self) -> bool:
        return self._live or len(self._read) < self._depth

    def put(self, job: FrameJob) -> bool:
        """Hand a frame that was read to the engine; False when no more are wanted."""
        with self._lock:
            self._changed.wait_for(lambda: self._has_room or self.state is not FeedState.READING)
            if self.state is not FeedState.READING:
                return False
            if self._live and self._read:
                self._read.clear()
                self.stats.dropped()
            self._read_at = job.read_at
            job.enqueue(self._read)
            self._work.notify()
            self._put += 1
            return self._live or self._put != self._limit

    def take(self) -> FrameJob | None:
        """A frame for the engine, if there is one and room for its result; with the lock held."""
        full = len(self._segmented) >= self._depth
        if self.state >= FeedState.WRITING or not self._read or full:
            return None
        self._in_engine = True
        self._taken += 1
        self._changed.notify_all()
        return FrameJob.dequeue(self._read)

    def give(self, job: FrameJob) -> None:
        """A frame comes back with its result; from an engine that was given up, too late."""
        with self._lock:
            self._in_engine = False
            if self.state < FeedState.WRITING:
                job.enqueue(self._segmented)
            self._changed.notify_all()
            drained = self._is_drained
        if drained or self._taken == self._limit:
            self.advance(FeedEvent.ENGINE_DONE)

    def next_segmented(self, timeout: float) -> FrameJob | None:
        """The next frame to write; None after so many seconds, or when there is none to come, which
        is then the feed's state."""
        with self._lock:
            self._changed.wait_for(
                lambda: self._segmented or self.state >= FeedState.WRITING, timeout
            )
            if self._segmented and self.state < FeedState.CLOSING:
                self._work.notify()
                return FrameJob.dequeue(self._segmented)
            written = self.state is FeedState.WRITING
        if written:
            self.advance(FeedEvent.WRITER_DONE)
        return None

    def is_silent(self, seconds: float) -> bool:
        """Whether it is live and more is to come, but nothing has been read for so long, and for
        two frames' time: a source may state that it is slower."""
        seconds = max(seconds, 2 * self.feed.source.info.period)
        with self._lock:
            on_its_way = self._read or self._in_engine or self._segmented
            waits = self._live and self.state < FeedState.WRITING and not on_its_way
            return waits and monotonic() - self._read_at >= seconds


def check_paths(feeds: Sequence[Feed]) -> None:
    """Refuse to write over what is read, or into one place twice. Raises OutputError."""
    taken = set()
    for feed in feeds:
        path = feed.source.info.path
        if path is not None:
            read = path.resolve()
            # Masks have the images' own names: in their folder they would replace them.
            taken.add(read)
            if feed.source.info.kind == "image":
                taken.add(read.parent)
    for sink in (sink for feed in feeds for sink in feed.sinks):
        if sink.path is None:
            continue
        place = sink.path.resolve()
        if place in taken:
            raise OutputError(
                f"{sink.path}: is read from, or written to by another output; choose another place"
            )
        taken.add(place)
