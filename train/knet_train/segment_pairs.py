"""The segments of two results of one image: which of them are the same, and where they differ."""

from __future__ import annotations

from itertools import count

import numpy as np
from numpy.typing import NDArray

from knet_runtime.segmentation import Segmentation

MATCHED = 0.95  # IoU of two sides' segments that are the same


def partners(
    reference: Segmentation, found: Segmentation, least: float = MATCHED
) -> list[tuple[int, int]]:
    """The segments of the two that have a partner, by their ids: of the same class, with an IoU of
    ``least``. None is anybody's partner twice."""
    free = [(segment, mask) for segment, mask in found.masks() if mask.any()]
    pairs = []
    for segment, mask in reference.masks():
        area = np.count_nonzero(mask)
        for place, (other, its) in enumerate(free):
            if other.class_id != segment.class_id:
                continue
            left, top = (max(segment.box[i], other.box[i]) for i in (0, 1))
            right, bottom = (min(segment.box[i], other.box[i]) for i in (2, 3))
            if left >= right or top >= bottom:
                continue
            parts = [
                one[top - box[1] : bottom - box[1], left - box[0] : right - box[0]]
                for one, box in ((mask, segment.box), (its, other.box))
            ]
            both = np.count_nonzero(parts[0] & parts[1])
            if both >= least * (area + np.count_nonzero(its) - both) > 0:
                pairs.append((segment.id, other.id))
                del free[place]
                break
    return pairs


def numbered_alike(reference: Segmentation, found: Segmentation) -> Segmentation:
    """``found`` with each segment's number as its track: that of the reference's segment which it
    overlaps with an IoU of a half at least, else one that the reference has not."""
    numbers = {other: own for own, other in partners(reference, found, 0.5)}
    fresh = count(1 + max((segment.id for segment in reference.segments), default=0))
    rest = (segment.id for segment in found.segments if segment.id not in numbers)
    return found.with_tracks(numbers | dict(zip(rest, fresh, strict=False)))


def differing(reference: Segmentation, found: Segmentation) -> NDArray[np.bool_]:
    """The pixels [H, W] of another class, or of another segment than the one that shares the most
    pixels with the reference's."""
    other = np.asarray(reference.class_map != found.class_map, np.bool_)
    if reference.task == "semantic":
        return other
    before, after = reference.segment_map.astype(np.int64), found.segment_map.astype(np.int64)
    width = int(after.max()) + 1
    shared = np.bincount((before * width + after).ravel(), minlength=(before.max() + 1) * width)
    partner = shared.reshape(-1, width).argmax(1)
    partner[0] = 0
    return np.asarray(other | (partner[before] != after), np.bool_)
