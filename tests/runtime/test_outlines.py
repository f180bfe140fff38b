"""Outlines hold every pixel of their mask, and no other."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco_mask

from knet_runtime.outlines import mask_outlines

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

MASKS = arrays.arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 12)))


def filled(points: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """As COCO fills a polygon."""
    flat = points.ravel().astype(float).tolist()
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([flat], *size))).astype(bool)


@given(MASKS)
def test_filled_outlines_without_their_holes_are_the_mask(mask: np.ndarray) -> None:
    found = np.zeros(mask.shape, int)
    for outline in mask_outlines(mask):
        own = filled(outline.points, mask.shape)
        for hole in outline.holes:
            own &= ~filled(hole, mask.shape)
        found += own
    assert np.array_equal(found, mask)


def test_points_are_of_the_image_and_an_empty_mask_has_none() -> None:
    ring = np.ones((3, 3), np.bool_)
    ring[1, 1] = False
    (outline,) = mask_outlines(ring, left=7, top=20)
    assert outline.points.min(0).tolist() == [7, 20]
    assert outline.points.max(0).tolist() == [10, 23]
    (hole,) = outline.holes
    assert sorted(hole.tolist()) == [[8, 21], [8, 22], [9, 21], [9, 22]]
    assert mask_outlines(np.zeros((3, 3), np.bool_)) == []


@pytest.mark.parametrize("tolerance", [0.75, 2.0])
def test_a_tolerance_leaves_points_out_and_moves_no_edge_further(tolerance: float) -> None:
    rows, columns = np.mgrid[:80, :120]
    mask = (rows - 40) ** 2 / 30**2 + (columns - 60) ** 2 / 50**2 <= 1
    (whole,), (simple,) = mask_outlines(mask), mask_outlines(mask, tolerance=tolerance)
    assert len(simple.points) < len(whole.points) / 2
    wrong = filled(simple.points, mask.shape) != mask
    sides = (mask.astype(np.uint8), (~mask).astype(np.uint8))
    to_edge = np.max([cv2.distanceTransform(side, cv2.DIST_L2, 5) for side in sides], 0)
    assert 0 < to_edge[wrong].max() <= tolerance + 1
    (pixel,) = mask_outlines(np.ones((1, 1), np.bool_), tolerance=tolerance)
    assert len(pixel.points) == 4
