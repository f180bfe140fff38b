"""Masks as outlines: polygons along the edges of pixels, with their holes."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

_KEPT = 0.9  # share of the area that a simplified outline must still have, and not exceed by more


class Outline(NamedTuple):
    """One connected region: ``points`` int32 [N, 2] of (x, y) around it, and those around each of
    its ``holes``."""

    points: NDArray[np.int32]
    holes: tuple[NDArray[np.int32], ...]


def mask_outlines(
    mask: NDArray[np.bool_], left: int = 0, top: int = 0, tolerance: float = 0.0
) -> list[Outline]:
    """The outlines of the regions of ``mask`` bool [h, w], whose first pixel is at (left, top) of
    the image. Pixels that touch at a corner are of one region.

    Points are corners of pixels: pixel (x, y) reaches from x to x + 1. Filled as COCO's tools do,
    an outline without its holes is exactly the region. With a ``tolerance`` (pixels) points are
    left out, so that the outline moves by no more than that; small regions keep all theirs.

        >>> import numpy as np
        >>> from knet_runtime.outlines import mask_outlines
        >>> (outline,) = mask_outlines(np.ones((2, 3), np.bool_), left=10)
        >>> outline.points.tolist(), outline.holes
        ([[10, 0], [10, 2], [13, 2], [13, 0]], ())
    """
    # OpenCV goes through the centres of pixels; on twice the grid each edge has centres of its own.
    fine = mask.view(np.uint8).repeat(2, 0).repeat(2, 1)
    found, tree = cv2.findContours(fine, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    offset = np.array([left, top], np.int32)
    rings = [_corners(np.asarray(ring, np.int32)[:, 0], tolerance) + offset for ring in found]
    parents: list[int] = [] if not rings else tree[0, :, 3].tolist()
    holes: dict[int, list[NDArray[np.int32]]] = {n: [] for n, one in enumerate(parents) if one < 0}
    for ring, parent in zip(rings, parents, strict=True):
        if parent >= 0:
            holes[parent].append(ring)
    return [Outline(rings[number], tuple(inner)) for number, inner in holes.items()]


def _corners(fine: NDArray[np.int32], tolerance: float) -> NDArray[np.int32]:
    """The corners of pixels next to a ring of half pixels."""
    points: NDArray[np.int32] = (fine + 1) // 2
    points = points[(points != np.roll(points, 1, 0)).any(1)]
    before, after = points - np.roll(points, 1, 0), np.roll(points, -1, 0) - points
    points = points[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]
    if not tolerance:
        return points
    simple = np.asarray(cv2.approxPolyDP(points, tolerance, closed=True), np.int32)[:, 0]
    area, left = cv2.contourArea(points), cv2.contourArea(simple)
    return simple if area * _KEPT <= left <= area / _KEPT else points
