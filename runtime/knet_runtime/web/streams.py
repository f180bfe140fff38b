"""What viewers get: the newest frame of a feed, as bytes that are made once for all who wait.

``overlay_jpeg`` is a JPEG of the overlay, ``page_frame`` what the page mixes itself. Nothing is
encoded while nobody waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_runtime.counts import Mark, marks
from knet_runtime.drawing import encode_jpeg, mark_stale
from knet_runtime.labels import Colour, LabelMap
from knet_runtime.painting import Segment, colour_of
from knet_runtime.segmentation import Segmentation
from knet_runtime.types import ClassMap, Frame, Rgb

PAGE_SIDE = 1280
"""Pixels of the longer side beyond which the page's frames are scaled down."""

_Image = TypeVar("_Image", Rgb, ClassMap)

_JPEG_SIDE = 65_500
_QUALITY = 80

SHORTEST = 0.04
"""Seconds between two frames at least: more than 25 a second nobody needs to see."""

REST = 4
"""After a frame that took t seconds to encode it rests REST · t: a fifth of one core at most."""


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
        """Whether nothing comes any more."""
        self.outcome: Literal["ended", "failed"] | None = None
        """How the feed came to its end; None while it has not."""
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

    def end(self, *, complete: bool = True) -> None:
        """The feed has ended, or failed unless it is complete. From any thread."""
        self.outcome = "ended" if complete else "failed"
        self.close()

    def close(self) -> None:
        """Nothing comes any more, whether the feed has ended or not; whoever waits is told."""
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


class PageSegment(msgspec.Struct, frozen=True, rename={"class_id": "class"}):
    """One segment for the page; ``class_id`` is the key "class" in JSON, and ``area`` in pixels of
    the source."""

    id: int
    class_id: int
    thing: bool
    colour: Colour
    score: float | None
    area: int
    track: int | None


class FrameHead(msgspec.Struct, frozen=True):
    """What stands before the bytes of a page's frame: ``jpeg`` bytes, then ``runs`` runs.

    ``feed`` names whose frame it is. ``at`` is when the frame arrived, in seconds since the epoch.
    ``segments`` is None for a semantic result. ``marks`` are the zones and lines with what was
    counted there, in pixels of the JPEG.
    """

    feed: str
    seq: int
    frame: int
    pts: float | None
    at: float
    stale: bool
    width: int
    height: int
    jpeg: int
    runs: int
    segments: list[PageSegment] | None
    marks: list[Mark]


def page_frame(shot: FrameShot, feed: str = "", *, side: int = PAGE_SIDE) -> bytes:
    """The camera's frame and the result apart, so that each viewer mixes them as it likes, scaled
    down to ``side``.

    A uint32 length, a ``FrameHead`` as JSON of that length, the JPEG, and the class map (in other
    results than semantic ones the segment map) as runs in reading order: the end of each (uint32),
    then the class or segment of each (uint16), little-endian.
    """
    frame, result = shot.frame, shot.result
    image = shrink(frame.image, side, cv2.INTER_AREA)
    semantic = result.task == "semantic"
    ids = result.class_map if semantic else result.segment_map
    ends, values = runs(shrink(ids, side, cv2.INTER_NEAREST))
    segments = None if semantic else [_for_page(one, result.labels) for one in result.segments]
    jpeg = encode_jpeg(image, _QUALITY)
    height, width = image.shape[:2]
    pts = None if frame.pts is None else float(frame.pts)
    drawn = [] if result.counts is None else marks(result.counts, width / result.size[1])
    sizes = width, height, len(jpeg), len(ends)
    head = msgspec.json.encode(
        FrameHead(feed, shot.seq, frame.index, pts, shot.at, frame.stale, *sizes, segments, drawn)
    )
    parts = len(head).to_bytes(4, "little"), head, jpeg, ends.tobytes(), values.tobytes()
    return b"".join(parts)


def _for_page(segment: Segment, labels: LabelMap) -> PageSegment:
    colour = colour_of(segment, labels)
    score = None if segment.score is None else round(segment.score, 4)
    about = score, segment.area, segment.track
    return PageSegment(segment.id, segment.class_id, segment.is_thing, colour, *about)


def overlay_jpeg(
    shot: FrameShot,
    alpha: float,
    classes: Collection[int] | None = None,
    *,
    side: int = _JPEG_SIDE,
    stale: bool = False,
) -> bytes:
    """The overlay of ``classes`` (None: all) as JPEG, its longer side at most ``side``.

    It says across its top when the frame is stale, or is said to be.
    """
    image = shrink(shot.frame.image, side, cv2.INTER_AREA)
    image = shot.result.overlay(image, alpha, classes)
    if stale or shot.frame.stale:
        image = mark_stale(image, max(0.0, time.time() - shot.at))
    return encode_jpeg(image, _QUALITY)


def runs(class_map: ClassMap) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
    """Runs of equal values over the map's rows, one after the other: their ends and values."""
    flat = class_map.ravel()
    last = np.append(np.flatnonzero(flat[1:] != flat[:-1]), flat.size - 1)
    return (last + 1).astype("<u4"), flat[last].astype("<u2")


def shrink(image: _Image, side: int, method: int) -> _Image:
    """Scale [H, W] or [H, W, 3] down until its longer side is ``side``; else the same array."""
    height, width = image.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cast(_Image, cv2.resize(image, size, interpolation=method))
