"""The engine's thread of a run: frames of all feeds in turn, through one segmenter.

``PipelineThread`` is what the other threads of a run are too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from math import inf
from time import monotonic
from typing import Protocol, runtime_checkable

from knet_runtime.errors import SourceError
from knet_runtime.pipeline.feed import FeedQueue, FrameJob
from knet_runtime.pipeline.state import FeedEvent, FeedState
from knet_runtime.segmentation import Segmentation
from knet_runtime.types import Rgb

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


class EngineThread:
    """Takes frames off the queues, as many as are ready and one of each at most, and gives them
    back with their results. ``work`` is what the queues notify; ``thread`` is for others to start.
    """

    def __init__(
        self, segmenter: SegmentCall, queues: Sequence[FeedQueue], work: threading.Condition
    ) -> None:
        self._segmenter = segmenter
        self._queues = list(queues)
        self._work = work
        self._batched = segmenter if isinstance(segmenter, BatchSegmentCall) else None
        self._max_batch = 1 if self._batched is None else self._batched.max_batch
        self._turn = 0
        self.busy_since = inf
        """Since when a batch is being segmented (monotonic clock); infinite between batches."""
        self.thread = PipelineThread("engine", self._run)

    def warm_up(self, feeds: int) -> None:
        """Run it on blank frames, so that the first frames of so many feeds do not wait."""
        if self._batched is not None:
            self._batched.warm_up(feeds)

    def fail(self, error: BaseException) -> None:
        """Nothing more is to be expected of it, by any feed."""
        for queue in self._queues:
            queue.advance(FeedEvent.ENGINE_DONE, error)

    def _run(self) -> None:
        try:
            while batch := self._gather():
                self.busy_since = monotonic()
                self._segment(batch)
                self.busy_since = inf
        except BaseException as error:
            self.fail(error)

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
