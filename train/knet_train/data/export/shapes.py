"""How the pixels of one label become shapes that a person can drag."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from knet_runtime.outlines import mask_outlines

TOLERANCE = 0.75  # pixels that an outline may move by, so that slanted edges are no stairs


class Counts(NamedTuple):
    """Shapes of an export."""

    masks: int = 0
    polygons: int = 0


class Part(NamedTuple):
    """One shape: ``mask`` bool [h, w] with its first pixel at (left, top), or ``points`` float
    [N, 2] where it is a polygon."""

    left: int
    top: int
    mask: NDArray[np.bool_]
    points: NDArray[np.int32] | None = None


def parts(mask: NDArray[np.bool_], left: int, top: int, *, whole: bool) -> list[Part]:
    """The polygons of a mask's regions, and masks of those that have holes. An object stays
    ``whole``: where it is of several regions, it is one mask."""
    outlines = mask_outlines(mask, left, top, TOLERANCE)
    if whole or len(outlines) == 1:
        one = len(outlines) == 1 and not outlines[0].holes
        return [Part(left, top, mask, outlines[0].points if one else None)]
    count, numbers, boxes, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8))
    found = []
    for number in range(1, count):
        x, y, width, height, _ = boxes[number].tolist()
        own = numbers[y : y + height, x : x + width] == number
        found += parts(own, left + x, top + y, whole=True)
    return found
