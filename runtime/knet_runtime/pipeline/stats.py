"""What a run counts and times while it runs; snapshots of it may be taken from any thread."""

from __future__ import annotations

import threading
from collections import deque
from time import monotonic

import msgspec
import numpy as np

from knet_runtime.sources.base import Source

STAGES = ("read", "queue", "preprocess", "infer", "postprocess", "transform", "write", "latency")
"""The stages in a frame's order, in milliseconds per frame.

"read" is the wait for the source's next frame (for a camera: until there is one), "queue" what the
frame waited between stages, "preprocess", "infer" and "postprocess" are those of
``Segmentation.timings``, "transform" is the feed's, "write" all its sinks and the callback.
"latency" goes from when the frame was read to when it was written.
"""

_REMEMBERED = 1000


class StageSnapshot(msgspec.Struct, frozen=True):
    """Milliseconds that a stage took per frame: percentiles over the last 1,000 frames."""

    p50: float
    p95: float
    p99: float


class FeedSnapshot(msgspec.Struct, frozen=True):
    """One feed: counts since the start, seconds since its last new frame was read and since one was
    written (None before the first one is), and times of those of ``STAGES`` that it has had.
    ``period`` is how many seconds the source states from frame to frame (0: none)."""

    frames: int
    dropped: int
    stale_frames: int
    reconnects: int
    connected: bool
    last_frame_age: float | None
    stages: dict[str, StageSnapshot]
    since_written: float | None = None
    period: float = 0.0


class RunSnapshot(msgspec.Struct, frozen=True):
    """All feeds of a run at one moment, by name."""

    feeds: dict[str, FeedSnapshot]


class FeedStats:
    """Counts and times of one feed."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._frames = self._dropped = self._stale = 0
        self._last: tuple[float, float] | None = None  # when it was read, when written
        self._times: dict[str, deque[float]] = {}

    def add(self, stage: str, milliseconds: float) -> None:
        """Note what a stage took for one frame."""
        with self._lock:
            self._times.setdefault(stage, deque(maxlen=_REMEMBERED)).append(milliseconds)

    def wrote(self, read_at: float) -> None:
        """A new frame, read at this moment of the monotonic clock, is written."""
        with self._lock:
            self._frames += 1
            self._last = read_at, monotonic()

    def dropped(self) -> None:
        """A frame was passed over because a newer one came."""
        with self._lock:
            self._dropped += 1

    def repeated(self) -> None:
        """The last frame was handed to the sinks again, as stale."""
        with self._lock:
            self._stale += 1

    def snapshot(self) -> FeedSnapshot:
        """All of it at this moment."""
        status = self._source.status
        with self._lock:
            times = {stage: list(values) for stage, values in self._times.items()}
            now = monotonic()
            age, since = (None, None) if self._last is None else (now - at for at in self._last)
            counts = self._frames, self._dropped, self._stale
        stages = {
            stage: StageSnapshot(*np.percentile(times[stage], (50, 95, 99)).tolist())
            for stage in dict.fromkeys((*STAGES, *times))  # those of others come last
            if stage in times
        }
        period = self._source.info.period
        return FeedSnapshot(
            *counts, status.reconnects, status.connected, age, stages, since, period
        )


class RunStats:
    """Counts and times of a run, for its caller and for whoever shows them; thread-safe.

    Given to ``run`` or a ``Pipeline``, which adds its feeds.

        >>> from knet_deploy import Feed, RunStats, Segmenter, open_source, run
        >>> stats = RunStats()
        >>> with open_source("photos") as source, Segmenter() as segment:
        ...     summary = run([Feed(source, [], name="gate")], segment, stats=stats)
        >>> stats.snapshot().feeds["gate"].frames
        2
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._feeds: dict[str, FeedStats] = {}

    def add_feed(self, name: str, source: Source) -> FeedStats:
        """Begin to count for a feed; one of the same name is begun anew. ``source`` is asked how it
        fares, from any thread."""
        feed = FeedStats(source)
        with self._lock:
            self._feeds[name] = feed
        return feed

    def snapshot(self) -> RunSnapshot:
        """All feeds at this moment."""
        with self._lock:
            feeds = dict(self._feeds)
        return RunSnapshot({name: feed.snapshot() for name, feed in feeds.items()})
