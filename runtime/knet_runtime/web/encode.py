"""A frame and its result as bytes: a JPEG of the overlay, and what the page mixes itself."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import TypeVar, cast

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_runtime.drawing import blend, encode_jpeg, mark_stale
from knet_runtime.types import ClassMap, Rgb
from knet_runtime.web.streams import FrameShot

PAGE_SIDE = 1280
"""Pixels of the longer side beyond which the page's frames are scaled down."""

_Image = TypeVar("_Image", Rgb, ClassMap)

_JPEG_SIDE = 65_500
_QUALITY = 80


class FrameHead(msgspec.Struct, frozen=True):
    """What stands before the bytes of a page's frame: ``jpeg`` bytes, then ``runs`` runs.

    ``at`` is when the frame arrived, in seconds since the epoch.
    """

    seq: int
    frame: int
    pts: float | None
    at: float
    stale: bool
    width: int
    height: int
    jpeg: int
    runs: int


def page_frame(shot: FrameShot) -> bytes:
    """The camera's frame and the class map apart, so that each viewer mixes them as it likes.

    A uint32 length, a ``FrameHead`` as JSON of that length, the JPEG, and the class map as runs
    in reading order: the end of each (uint32), then the class of each (uint16), little-endian.
    """
    image = shrink(shot.frame.image, PAGE_SIDE, cv2.INTER_AREA)
    ends, classes = runs(shrink(shot.result.class_map, PAGE_SIDE, cv2.INTER_NEAREST))
    jpeg = encode_jpeg(image, _QUALITY)
    pts = shot.frame.pts
    head = msgspec.json.encode(
        FrameHead(
            seq=shot.seq,
            frame=shot.frame.index,
            pts=None if pts is None else float(pts),
            at=shot.at,
            stale=shot.frame.stale,
            width=image.shape[1],
            height=image.shape[0],
            jpeg=len(jpeg),
            runs=len(ends),
        )
    )
    return b"".join(
        (len(head).to_bytes(4, "little"), head, jpeg, ends.tobytes(), classes.tobytes())
    )


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
    class_map = shrink(shot.result.class_map, side, cv2.INTER_NEAREST)
    image = blend(image, class_map, shot.result.labels, alpha, classes)
    if stale or shot.frame.stale:
        image = mark_stale(image, max(0.0, time.time() - shot.at))
    return encode_jpeg(image, _QUALITY)


def runs(class_map: ClassMap) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
    """Runs of equal classes over the map's rows, one after the other: their ends and classes."""
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
