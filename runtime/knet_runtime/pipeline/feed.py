"""One source of a run: where its frames go, by which policy, and its queues between the threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Literal, NamedTuple

from knet_runtime.errors import OutputError
from knet_runtime.pipeline.stats import FeedStats
from knet_runtime.segmentation import Segmentation
from knet_runtime.sinks import Sink
from knet_runtime.sources.base import Source
from knet_runtime.types import Frame

Policy = Literal["file", "live"]

TICK = 0.1
"""Seconds after which a waiting thread looks whether the run is to end."""

_DEPTH = 3


@dataclass(eq=False)
class Feed:
    """A source and what is to become of its frames.

    ``name`` is that in the run's numbers; it differs between the feeds of a run. ``policy`` "file"
    drops no frame and makes the source wait; "live" always takes the newest frame and counts those
    it passes over, so that what is shown is never older than a frame or two; None goes by the
    source. ``transform`` makes another mask out of a frame and its mask before the sinks get it
    (smoothing); it is called in the frames' order, by one thread.

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
    transform: Callable[[Frame, Segmentation], Segmentation] | None = None

    @property
    def live(self) -> bool:
        """Whether frames are dropped rather than awaited."""
        return self.source.info.live if self.policy is None else self.policy == "live"


@dataclass(eq=False)
class Item:
    """A frame on its way; times are of the monotonic clock, ``waited`` milliseconds in queues."""

    frame: Frame
    read_at: float
    since: float = 0.0
    waited: float = 0.0
    mask: Segmentation = field(init=False)

    def rests(self) -> None:
        """It waits from now on."""
        self.since = monotonic()

    def goes_on(self) -> None:
        """It has waited until now."""
        self.waited += 1000 * (monotonic() - self.since)


class Failure(NamedTuple):
    """What went wrong, and when on the monotonic clock."""

    at: float
    error: BaseException


class FeedQueue:
    """What the threads of one feed share: a bounded queue before the engine and one behind it.

    The engine's thread never waits here: it takes a frame only when there is room for its mask, so
    that a feed whose disk is slow holds up no other. ``work`` wakes that thread; its lock guards
    all lanes of a run.
    """

    def __init__(
        self,
        feed: Feed,
        stats: FeedStats,
        lock: threading.Lock,
        work: threading.Condition,
        limit: int | None,
    ) -> None:
        self.feed = feed
        self.stats = stats
        self.failures: list[Failure] = []
        self.closing: float | None = None
        """Since when no more frames are read; those on their way are written."""
        self._aborted = self._cut = False
        self._work = work
        self._changed = threading.Condition(lock)
        self._lock = lock
        self._limit = limit
        self._put = self._taken = 0
        self._live = feed.live
        self._depth = 1 if feed.live else _DEPTH
        self._read: deque[Item] = deque()
        self._segmented: deque[Item] = deque()
        self._flying = 0
        self._all_read = False
        self._read_at = monotonic()

    def put(self, item: Item) -> bool:
        """Hand a frame that was read to the engine; False when no more are wanted."""
        with self._lock:
            while not self._live and len(self._read) >= self._depth and self.closing is None:
                self._changed.wait(TICK)
            if self.closing is not None:
                return False
            if self._live and self._read:
                self._read.clear()
                self.stats.dropped()
            item.rests()
            self._read_at = item.read_at
            self._read.append(item)
            self._work.notify()
            self._put += 1
            return self._live or self._put != self._limit

    def end(self) -> None:
        """There is nothing more to read."""
        with self._lock:
            self._all_read = True
            self._changed.notify_all()
            self._work.notify()

    def take(self) -> Item | None:
        """A frame for the engine, if there is one and room for its mask; with the lock held."""
        if self.segmented_all or not self._read or self.enough:
            return None
        if len(self._segmented) + self._flying >= self._depth:
            return None
        item = self._read.popleft()
        self._flying += 1
        self._taken += 1
        self._changed.notify_all()
        item.goes_on()
        return item

    def give(self, item: Item) -> None:
        """A frame comes back with its mask."""
        with self._lock:
            item.rests()
            self._flying -= 1
            self._segmented.append(item)
            self._changed.notify_all()

    def next_segmented(self, timeout: float) -> Item | None:
        """The next frame to write; None after so many seconds or when ``finished``."""
        until = monotonic() + timeout
        with self._lock:
            while not self._segmented and not self.finished:
                left = until - monotonic()
                if left <= 0:
                    return None
                self._changed.wait(min(left, TICK))
            if self._aborted or not self._segmented:
                return None
            item = self._segmented.popleft()
            self._work.notify()
            item.goes_on()
            return item

    @property
    def finished(self) -> bool:
        """Whether nothing more will come to be written."""
        waiting = self._segmented or self._flying
        return self._aborted or (self.segmented_all and not waiting)

    @property
    def segmented_all(self) -> bool:
        """Whether the engine has nothing more to do for it."""
        done = self.enough or not self._read
        return self._aborted or self._cut or (self._all_read and done)

    @property
    def enough(self) -> bool:
        """Whether as many frames as were asked for have gone to the engine."""
        return self._taken == self._limit

    @property
    def silent_since(self) -> float | None:
        """When the last frame was read (monotonic), None while one is on its way."""
        with self._lock:
            return None if self._read or self._flying or self._segmented else self._read_at

    @property
    def broken(self) -> bool:
        """Whether its outputs are not all that they should be; after an interrupt they are."""
        return any(not isinstance(f.error, KeyboardInterrupt) for f in self.failures)

    def stop_reading(self) -> None:
        """Read no more; what is on its way is written. From any thread."""
        if self.closing is None:
            self.closing = monotonic()
            self.feed.source.stop()

    def cut(self) -> None:
        """The engine gives nothing more; what it gave is written."""
        self.stop_reading()
        with self._lock:
            self._cut = True
            self._flying = 0
            self._changed.notify_all()

    def abort(self) -> None:
        """Read no more and write no more."""
        self.stop_reading()
        with self._lock:
            self._aborted = True
            self._changed.notify_all()
            self._work.notify()

    def fail(self, error: BaseException) -> None:
        """Note what went wrong, and read no more."""
        self.failures.append(Failure(monotonic(), error))
        self.stop_reading()


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
