"""The newest frame of a feed, and images of it that are encoded once for all who wait for one.

Nothing is encoded while nobody waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

from knet_runtime.segmentation import Segmentation
from knet_runtime.types import Frame


@dataclass(frozen=True)
class FrameShot:
    """A frame with its result; ``seq`` counts from 1, ``at`` is its time of arrival (epoch)."""

    seq: int
    frame: Frame
    result: Segmentation
    at: float


class Latest:
    """One slot: ``put`` overwrites it and waits for nobody; ``newer`` waits, in the event loop.

    While nobody waits, ``put`` costs an assignment.
    """

    def __init__(self) -> None:
        self.shot: FrameShot | None = None
        self.ended = False
        self._seq = 0
        self._fresh_at = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting = 0
        self._changed = asyncio.Event()

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Name the loop in which ``newer`` is awaited."""
        self._loop = loop

    def put(self, frame: Frame, result: Segmentation) -> None:
        """Make this the newest; from the run's thread."""
        self._seq += 1
        if not frame.stale:
            self._fresh_at = time.time() if frame.wall is None else frame.wall
        self.shot = FrameShot(self._seq, frame, result, self._fresh_at)
        self._wake()

    def end(self) -> None:
        """Nothing comes any more; whoever waits is told. From any thread."""
        self.ended = True
        self._wake()

    async def newer(self, than: int) -> FrameShot | None:
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


SHORTEST = 0.04
"""Seconds between two frames at least: more than 25 a second nobody needs to see."""

REST = 4
"""After a frame that took t seconds to encode it rests REST · t: a fifth of one core at most."""


@dataclass(frozen=True)
class Encoded:
    """The bytes of the shot ``seq``."""

    seq: int
    data: bytes


class Channel:
    """One kind of frame of one feed. All methods belong to the event loop; encoding to ``pool``.

    A viewer that does not take what it was sent does not wait for a newer one, so it costs nothing.
    """

    def __init__(
        self, latest: Latest, encode: Callable[[FrameShot], bytes], pool: Executor
    ) -> None:
        self._latest = latest
        self._encode = encode
        self._pool = pool
        self._made: Encoded | None = None
        self._making: asyncio.Task[None] | None = None
        self._rest_until = 0.0

    def start(self) -> int:
        """What a new viewer passes as ``than``: it gets the newest shot, and no older one."""
        shot = self._latest.shot
        return 0 if shot is None else shot.seq - 1

    async def newer(self, than: int) -> Encoded | None:
        """The next frame above ``than``; None when none will come."""
        while True:
            made = self._made
            if made is not None and made.seq > than:
                return made
            shot = self._latest.shot
            if self._latest.ended and (shot is None or shot.seq <= than):
                return None
            if self._making is None or self._making.done():
                self._making = asyncio.create_task(self._make())
            await asyncio.shield(self._making)  # the others still want it when this viewer goes

    async def _make(self) -> None:
        made = self._made
        shot = await self._latest.newer(0 if made is None else made.seq)
        if not self._latest.ended:
            await asyncio.sleep(max(0.0, self._rest_until - time.monotonic()))
        shot = self._latest.shot
        if shot is None:
            return
        began = time.monotonic()
        data = await asyncio.get_running_loop().run_in_executor(self._pool, self._encode, shot)
        took = time.monotonic() - began
        self._rest_until = began + max(SHORTEST, (1 + REST) * took)
        self._made = Encoded(shot.seq, data)
