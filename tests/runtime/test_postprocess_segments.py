"""Class and mask logits to segments, by the published rules and as fast as they can be had."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from narrow_knet import Arrays

from knet_runtime.bundle.manifest import SegmentRules
from knet_runtime.labels import LabelMap, distinct_palette
from knet_runtime.postprocess import distinct_kernels, find_segments, instances, panoptic
from knet_runtime.postprocess.segments import best_pairs
from knet_runtime.postprocess.upsample import upsampled_masks
from knet_runtime.preprocess import Geometry
from knet_runtime.types import Task

NAMES = ["a_96x128", "b_133x100_pad", "c_75x100_up"]
Stored = Callable[[str], Arrays]
Window = tuple[int, int, int, int]


def labels_of(classes: int, things: int) -> LabelMap:
    names = tuple(f"class {index}" for index in range(classes))
    return LabelMap(names, distinct_palette(classes), 255, tuple(range(things)))


def geometry_of(arrays: Arrays) -> Geometry:
    original, padded, image = (
        tuple(int(side) for side in arrays[f"{name}_shape"]) for name in ("ori", "pad", "img")
    )
    return Geometry(original, padded, (0, 0, *image))


def doubled(masks: np.ndarray) -> np.ndarray:
    up = F.interpolate(torch.from_numpy(masks), scale_factor=2, mode="bilinear")
    return up[0].numpy()


@pytest.mark.parametrize("name", NAMES)
def test_the_segments_are_those_of_the_authors(stored: Stored, name: str) -> None:
    arrays = stored(f"pan/{name}")
    found = panoptic(
        arrays["s2_cls_logits"][0],
        doubled(arrays["s2_mask_logits"]),
        geometry_of(arrays),
        labels_of(133, 80),
        SegmentRules(),
    )
    # They number from 0 and write label + 1000 · number; 133 is void.
    table = [133, *(one.class_id + 1000 * (one.id - 1) for one in found.segments)]
    np.testing.assert_array_equal(np.array(table)[found.segment_map], arrays["pan_map"])
    assert sorted([one.area for one in found.segments]) == sorted(
        arrays["pan_areas"][arrays["pan_ids"] != 133].tolist()
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_instances_are_those_of_the_authors(stored: Stored, name: str) -> None:
    arrays = stored(f"inst/{name}")
    logits, rules = arrays["s2_cls_logits"][0], SegmentRules(score=0.0)
    pairs = best_pairs(logits, rules)
    expected = zip(
        arrays["inst_kernel"].tolist(),
        arrays["inst_labels"].tolist(),
        arrays["inst_scores"].tolist(),
        strict=True,
    )
    assert {pair[:2]: pytest.approx(pair[2], abs=1e-5) for pair in pairs} == {
        (kernel, label): score for kernel, label, score in expected
    }
    geometry = geometry_of(arrays)
    found = instances(logits, doubled(arrays["s2_mask_logits"]), geometry, labels_of(80, 80), rules)
    shape = tuple(arrays["inst_masks_shape"])
    flat = np.unpackbits(arrays["inst_masks_packed"], axis=1)[:, : shape[1] * shape[2]]
    there = flat.reshape(shape).astype(bool)
    theirs = [
        (score, label, mask.tobytes())
        for score, label, mask in zip(
            arrays["inst_scores"].round(4), arrays["inst_labels"], there, strict=True
        )
        if mask.any()  # an object without a pixel is left out here
    ]
    ours = []
    for segment, mask in found.masks():
        whole = np.zeros(geometry.source_hw, bool)
        left, top, right, bottom = segment.box
        whole[top:bottom, left:right] = mask
        ours.append((np.float32(segment.score).round(4), segment.class_id, whole.tobytes()))
    assert sorted(ours) == sorted(theirs)


def smooth(seed: int, count: int, height: int, width: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, count, max(2, height // 4), max(2, width // 4), generator=generator)
    return (4 * F.interpolate(coarse, (height, width), mode="bicubic")[0] - 1).numpy()


def resized(planes: np.ndarray, via: tuple[int, int], window: Window, size: tuple[int, int]):
    """As the published code does it, in float64."""
    whole = F.interpolate(torch.from_numpy(planes)[None].double(), via, mode="bilinear")
    top, left, height, width = window
    cut = whole[..., top : top + height, left : left + width]
    return F.interpolate(cut, size, mode="bilinear")[0].numpy()


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, tuple[int, int], Geometry]:
    low = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    via = 4 * low[0], 4 * low[1]
    top, left = (draw(st.integers(0, side - 1)) for side in via)
    window = (top, left, draw(st.integers(1, via[0] - top)), draw(st.integers(1, via[1] - left)))
    size = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    return draw(st.integers(0, 2**31)), low, Geometry(size, via, window)


@given(cases())
@settings(max_examples=120, deadline=None)
def test_masks_are_those_of_the_whole_planes(case: tuple[int, tuple[int, int], Geometry]) -> None:
    seed, low, geometry = case
    planes = 1 / (1 + np.exp(-smooth(seed, 4, *low)))
    exact = resized(planes, geometry.model_hw, geometry.window, geometry.source_hw)
    found = upsampled_masks(planes, 0.5, geometry.source_hw, geometry.model_hw, geometry.window)
    for plane, mask in zip(exact, found, strict=True):
        whole = np.zeros(geometry.source_hw, bool)
        if mask is not None:
            height, width = mask.mask.shape
            whole[mask.top : mask.top + height, mask.left : mask.left + width] = mask.mask
        certain = np.abs(plane - 0.5) > 1e-5
        np.testing.assert_array_equal(whole[certain], plane[certain] > 0.5)


@given(cases())
@settings(max_examples=80, deadline=None)
def test_every_pixel_goes_to_the_largest_score_times_probability(
    case: tuple[int, tuple[int, int], Geometry],
) -> None:
    seed, low, geometry = case
    masks = smooth(seed, 5, *low)
    logits = np.random.default_rng(seed).normal(0, 2, (5, 3)).astype(np.float32)
    labels = labels_of(3, 2)  # the last kernel is stuff
    found = panoptic(logits, masks, geometry, labels, SegmentRules(score=0, overlap=0))
    score = 1 / (1 + np.exp(-logits.astype(np.float64)))
    scores = np.append(score[:4, :2].max(1), score[4, 2])
    classes = np.append(score[:4, :2].argmax(1), 2)
    planes = 1 / (1 + np.exp(-masks.astype(np.float64)))
    exact = resized(planes, geometry.model_hw, geometry.window, geometry.source_hw)
    weighted = exact * scores[:, None, None]
    first, second = np.sort(weighted, 0)[:-3:-1]
    winner = weighted.argmax(0)
    owned = [(exact[kernel] >= 0.5).any() for kernel in range(5)]  # else it becomes no segment
    expected = np.where(np.take(owned, winner), np.take(classes, winner), 255)
    close = (np.abs(exact - 0.5) < 1e-5).any()
    certain = (first - second > 1e-5) & ~close
    np.testing.assert_array_equal(found.class_map[certain], expected[certain])


def test_a_thing_below_the_score_and_a_segment_that_is_covered_leave_void() -> None:
    labels = labels_of(3, 2)
    masks = np.full((3, 4, 8), -9, np.float32)
    masks[0, :, :4] = 9  # left half
    masks[1, :, 2:] = 9  # its own mask is wide, and half of it is won by the stuff
    masks[2, :, 4:] = 9
    logits = np.full((3, 3), -9, np.float32)
    logits[0, 0], logits[1, 1], logits[2, 2] = -1.0, 0.5, 5.0
    geometry = Geometry((4, 8), (16, 32), (0, 0, 16, 32))
    found = panoptic(logits, masks, geometry, labels, SegmentRules(score=0.3))
    assert [one.label for one in found.segments] == ["class 2"]  # 0.27 < 0.3; 2 of 6 columns
    assert (found.segment_map[:, :4] == 0).all()
    low = panoptic(logits, masks, geometry, labels, SegmentRules(score=0.2, overlap=0.2))
    assert [one.label for one in low.segments] == ["class 2", "class 1", "class 0"]
    assert [one.id for one in low.segments] == [1, 2, 3]


def test_top_k_and_score_limit_the_instances() -> None:
    masks = np.full((3, 4, 4), 9, np.float32)
    logits = np.array([[2, -2], [1, 0], [-3, -3]], np.float32)
    geometry = Geometry((8, 8), (16, 16), (0, 0, 16, 16))
    labels = labels_of(2, 2)

    def found(**rules: float) -> list[tuple[int, float]]:
        result = instances(logits, masks, geometry, labels, SegmentRules(**rules))  # type: ignore
        return [(one.class_id, round(one.score or 0, 2)) for one in result.segments]

    assert found(score=0.45) == [(0, 0.88), (0, 0.73), (1, 0.5)]
    assert found(score=0.45, top_k=2) == [(0, 0.88), (0, 0.73)]
    assert found(score=0.9) == []


@given(st.integers(0, 2**31), st.sampled_from([0.2, 0.5, 0.8]))
@settings(max_examples=60, deadline=None)
def test_the_surest_of_twins_stays(seed: int, iou: float) -> None:
    """Against masks compared one by one."""
    random = np.random.default_rng(seed)
    masks = np.repeat(smooth(seed, 4, 6, 9), 3, 0) + random.normal(0, 1, (12, 6, 9))
    masks = masks[random.permutation(12)].astype(np.float32)
    logits = random.normal(0, 2, (12, 3)).astype(np.float32)
    labels = labels_of(3, 2)  # the last kernel is stuff
    there, kept = masks[:11] > 0, []
    for kernel in sorted(range(11), key=lambda kernel: -logits[kernel, :2].max()):
        pairs = [(there[kernel] & there[k], there[kernel] | there[k]) for k in kept]
        if all(both.sum() <= iou * either.sum() for both, either in pairs):
            kept.append(kernel)
    found = distinct_kernels(logits, masks, labels, SegmentRules(nms=iou))
    assert found == [*sorted(kept), 11]


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_two_kernels_of_one_object_are_one_with_nms(task: Task) -> None:
    labels = labels_of(2, 1 if task == "panoptic" else 2)
    masks = np.full((3, 4, 8), -9, np.float32)
    masks[0, :, :4] = 3  # the left half, which the twin wins in part
    masks[1, :, :4] = [[2], [2], [4], [4]]
    masks[2, :, 4:] = 9
    logits = np.array([[2.0, -9], [1.9, -9], [-9, 5]], np.float32)
    geometry = Geometry((4, 8), (16, 32), (0, 0, 16, 32))

    def objects(rules: SegmentRules) -> list[tuple[int, float]]:
        found = find_segments(task, logits, masks, geometry, labels, rules)
        assert found.task == task
        return [(one.area, round(one.score or 0, 2)) for one in found.segments]

    expected = [(16, 0.99), (16, 0.88)]
    assert objects(SegmentRules(nms=0.6)) == expected
    assert objects(SegmentRules()) != expected


def test_nms_lies_above_0() -> None:
    for nms in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="it lies above 0"):
            SegmentRules(nms=nms)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("find", [panoptic, instances])
def test_nan_is_refused(find: Callable[..., object], which: int) -> None:
    arrays = [np.ones((3, 2), np.float32), np.ones((3, 4, 4), np.float32)]
    arrays[which].flat[1] = np.nan
    geometry = Geometry((8, 8), (16, 16), (0, 0, 16, 16))
    with pytest.raises(ValueError, match="NaN"):
        find(*arrays, geometry, labels_of(2, 1), SegmentRules(score=0))


@pytest.mark.parametrize("find", [panoptic, instances])
def test_no_array_of_all_masks_at_the_frames_size_is_held(find: Callable[..., object]) -> None:
    masks = smooth(0, 60, 100, 160)
    logits = np.random.default_rng(0).normal(-1, 2, (60, 20)).astype(np.float32)
    geometry = Geometry((800, 1280), (400, 640), (0, 0, 400, 640))
    labels = labels_of(20, 20 if find is instances else 10)
    find(logits, masks, geometry, labels, SegmentRules(score=0.9))
    tracemalloc.start()
    try:
        find(logits, masks, geometry, labels, SegmentRules(score=0.9))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60 * 800 * 1280  # bytes: a quarter of all masks as float32
