"""The engine's thread of a run: frames of all feeds in turn, through one segmenter.

A thread of the pipeline.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from knet_runtime.errors import SourceError
from knet_runtime.pipeline.feed import TICK, FeedQueue, Item
from knet_runtime.segmentation import Segmentation


class PipelineThread(threading.Thread):
    """A thread that does not keep the process alive, and whose end can be awaited amid signals.

    ``join`` can not: interrupted by an exception of a signal handler, Python before 3.13 takes the
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


SegmentCall = Callable[[NDArray[np.uint8]], "Segmentation"]
"""What a ``Segmenter`` is at the least: uint8 [H, W, 3] RGB to a mask of that size."""


@runtime_checkable
class BatchSegmentCall(Protocol):
    """What a ``Segmenter`` is besides: several pictures at once."""

    @property
    def max_batch(self) -> int: ...

    def batch(self, frames: Sequence[NDArray[np.uint8]]) -> list[Segmentation]: ...

    def warm_up(self, largest: int) -> None: ...


class EngineThread:
    """Takes frames off the lanes, as many as are ready and one of each at most, and gives them back
    with their masks. ``work`` is what the lanes notify. ``thread`` is not started yet."""

    def __init__(self, segmenter: SegmentCall, work: threading.Condition) -> None:
        self._segmenter = segmenter
        self._work = work
        self._batched = segmenter if isinstance(segmenter, BatchSegmentCall) else None
        self._max_batch = 1 if self._batched is None else self._batched.max_batch
        self._turn = 0
        self.lanes: list[FeedQueue] = []
        self.busy_since: float | None = None
        """Since when a batch is being segmented (monotonic); None between batches."""
        self.thread = PipelineThread("engine", self._run)

    def warm_up(self, feeds: int) -> None:
        """Run it on blank pictures, so that the first frames of so many feeds do not wait."""
        if self._batched is not None:
            self._batched.warm_up(feeds)

    def _run(self) -> None:
        try:
            while batch := self._gather():
                self.busy_since = monotonic()
                self._segment(batch)
                self.busy_since = None
        except BaseException as error:
            for lane in self.lanes:
                lane.fail(error)
                lane.cut()

    def _gather(self) -> list[tuple[FeedQueue, Item]]:
        """Frames of different feeds for the engine, another first each time; none at the end."""
        with self._work:
            while True:
                turn = self.lanes[self._turn :] + self.lanes[: self._turn]
                batch: list[tuple[FeedQueue, Item]] = []
                for lane in turn:
                    if len(batch) < self._max_batch and (item := lane.take()) is not None:
                        batch.append((lane, item))
                if batch:
                    self._turn = (self.lanes.index(batch[-1][0]) + 1) % len(self.lanes)
                    return batch
                if all(lane.segmented_all for lane in self.lanes):
                    return []
                self._work.wait(TICK)

    def _segment(self, batch: list[tuple[FeedQueue, Item]]) -> None:
        images = [item.frame.image for _, item in batch]
        try:
            if self._batched is not None:
                masks = self._batched.batch(images)
            else:
                masks = [self._segmenter(image) for image in images]
        except SourceError as error:  # what is no picture is its own feed's affair
            if len(batch) > 1:
                for one in batch:
                    self._segment([one])
                return
            batch[0][0].fail(error)
            batch[0][0].cut()
            return
        for (lane, item), mask in zip(batch, masks, strict=True):
            item.mask = mask
            lane.give(item)
