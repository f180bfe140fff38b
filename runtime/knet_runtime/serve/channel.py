"""Pictures that are encoded once for all who wait for one, and not at all while nobody does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

from knet_runtime.serve.latest import Latest, Shot

SHORTEST = 0.04
"""Seconds between two pictures at least: more than 25 a second nobody needs to see."""

REST = 4
"""After a picture that took t seconds to encode it rests REST · t: a fifth of one core at most."""


@dataclass(frozen=True)
class Encoded:
    """The bytes of the shot ``seq``."""

    seq: int
    data: bytes


class Channel:
    """One kind of picture of one feed. All methods belong to the event loop; encoding to ``pool``.

    A viewer that does not take what it was sent does not wait for a newer one, so it costs nothing.
    """

    def __init__(self, latest: Latest, encode: Callable[[Shot], bytes], pool: Executor) -> None:
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
        """The next picture above ``than``; None when none will come."""
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
