"""The newest frame of a feed, handed from the run's thread to those who watch."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from knet_runtime.frames import Frame

if TYPE_CHECKING:
    from knet_runtime.segmenter import Mask


@dataclass(frozen=True)
class Shot:
    """A frame with its mask; ``seq`` counts from 1, ``at`` is its time of arrival (epoch)."""

    seq: int
    frame: Frame
    mask: Mask
    at: float


class Latest:
    """One slot: ``put`` overwrites it and waits for nobody; ``newer`` waits, in the event loop.

    While nobody waits, ``put`` costs an assignment.
    """

    def __init__(self) -> None:
        self.shot: Shot | None = None
        self.ended = False
        self._seq = 0
        self._fresh_at = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting = 0
        self._changed = asyncio.Event()

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Name the loop in which ``newer`` is awaited."""
        self._loop = loop

    def put(self, frame: Frame, mask: Mask) -> None:
        """Make this the newest; from the run's thread."""
        self._seq += 1
        if not frame.stale:
            self._fresh_at = time.time() if frame.wall is None else frame.wall
        self.shot = Shot(self._seq, frame, mask, self._fresh_at)
        self._wake()

    def end(self) -> None:
        """Nothing comes any more; whoever waits is told. From any thread."""
        self.ended = True
        self._wake()

    async def newer(self, than: int) -> Shot | None:
        """The newest shot as soon as its ``seq`` is above ``than``; None if none will come."""
        self._waiting += 1
        try:
            while True:
                # Cleared before the look: what is put after it wakes us.
                self._changed.clear()
                shot = self.shot
                if shot is not None and shot.seq > than:
                    return shot
                if self.ended:
                    return None
                await self._changed.wait()
        finally:
            self._waiting -= 1

    def _wake(self) -> None:
        loop = self._loop
        if loop is not None and (self._waiting or self.ended):
            with contextlib.suppress(RuntimeError):  # the server is gone: nobody waits
                loop.call_soon_threadsafe(self._changed.set)
