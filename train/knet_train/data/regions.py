"""COCO's ways to write one object's pixels: polygons, run lengths, and those compressed to text."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from knet_runtime.errors import DataError


class Region(NamedTuple):
    """One object's pixels: ``mask`` bool [h, w], its first pixel at (left, top) of the image."""

    left: int
    top: int
    mask: NDArray[np.bool_]

    @property
    def place(self) -> tuple[slice, slice]:
        """The rows and columns of the image that it lies in."""
        height, width = self.mask.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


def run_lengths(segmentation: Any, size: tuple[int, int]) -> list[int]:
    """Any of the three as run lengths down the columns of an image of ``size`` (height, width),
    the first outside of the mask. Polygons are filled by pycocotools, each even-odd. Raises
    DataError."""
    if isinstance(segmentation, dict):
        return _stated(segmentation, size)
    if not isinstance(segmentation, list) or not segmentation:
        raise DataError("has no polygon: take the annotation out")
    for points in segmentation:
        numbers = isinstance(points, list) and all(
            isinstance(value, int | float) and np.isfinite(value) for value in points
        )
        if not numbers or len(points) % 2 or len(points) < 6:
            raise DataError(
                "has a polygon that is no list of three points x, y or more: take it out"
            )
    parts = coco_mask.frPyObjects([[float(v) for v in points] for points in segmentation], *size)
    lengths = _decompress(coco_mask.merge(parts)["counts"])
    assert lengths is not None
    return lengths


def _stated(rle: dict[str, Any], size: tuple[int, int]) -> list[int]:
    counts, stated = rle.get("counts"), rle.get("size")
    if stated != list(size):
        raise DataError(
            f"is a mask of size {stated} (height, width) in an image of {list(size)}: encode it "
            "at the image's size"
        )
    lengths = _decompress(counts.encode()) if isinstance(counts, str) else counts
    if not isinstance(lengths, list) or not all(
        isinstance(length, int) and length >= 0 for length in lengths
    ):
        raise DataError(
            "has run lengths that are not readable as whole numbers from 0 on: encode it again"
        )
    if sum(lengths) != size[0] * size[1]:
        raise DataError(
            f"has run lengths of {sum(lengths)} pixels in an image of {size[0] * size[1]}: encode "
            "it again"
        )
    return lengths


def _decompress(text: bytes) -> list[int] | None:
    """COCO's text -> run lengths; None where it is none. pycocotools would read beyond its end."""
    lengths: list[int] = []
    value = shift = 0
    for character in text:
        group = character - 48
        if not 0 <= group < 64:
            return None
        value |= (group & 0x1F) << shift
        shift += 5
        if group & 0x20:
            continue
        if group & 0x10:
            value -= 1 << shift
        if len(lengths) > 2:
            value += lengths[-2]
        lengths.append(value)
        value = shift = 0
    return None if shift else lengths


def region(lengths: list[int], size: tuple[int, int]) -> Region:
    """The pixels of run lengths, in their own box."""
    inside = np.arange(len(lengths)) % 2 == 1
    flat = np.repeat(inside, lengths)
    whole = flat.reshape(size[::-1]).T
    rows, columns = np.flatnonzero(whole.any(1)), np.flatnonzero(whole.any(0))
    if not rows.size:
        return Region(0, 0, np.zeros((0, 0), np.bool_))
    top, left = int(rows[0]), int(columns[0])
    return Region(left, top, whole[top : rows[-1] + 1, left : columns[-1] + 1].copy())
