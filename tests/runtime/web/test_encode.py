"""The bytes that go to viewers, read back."""

from __future__ import annotations

import json
from fractions import Fraction

import cv2
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as arrays

from knet_runtime.drawing import blend
from knet_runtime.labels import LabelMap
from knet_runtime.segmentation import Instance, Segmentation
from knet_runtime.types import Frame
from knet_runtime.web.streams import FrameShot, overlay_jpeg, page_frame, runs
from knet_synthetic import CAMVID11


def shot(height: int = 90, width: int = 160, *, stale: bool = False) -> FrameShot:
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([rows * 2 % 256, columns % 256, rows * 0 + 90], -1).astype(np.uint8)
    class_map = (columns * 13 // width).astype(np.uint8)  # 11 and 12 are no classes
    frame = Frame(image, 7, Fraction(7, 25), "000007", wall=100.0, stale=stale)
    return FrameShot(3, frame, Segmentation(class_map, CAMVID11, {}), at=100.0)


def rows_of(data: bytes, ends: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    split = 4 * ends
    return np.frombuffer(data[:split], "<u4"), np.frombuffer(data[split:], "<u2", classes)


@settings(max_examples=60, deadline=None)
@given(
    arrays.arrays(
        st.sampled_from([np.uint8, np.uint16]),
        arrays.array_shapes(min_dims=2, max_dims=2, max_side=9),
        elements=st.integers(0, 3) | st.just(255),
    )
)
def test_runs_hold_the_class_map_exactly(class_map: np.ndarray) -> None:
    ends, classes = runs(class_map)
    back = np.repeat(classes, np.diff(ends, prepend=np.uint32(0)))
    np.testing.assert_array_equal(back.reshape(class_map.shape), class_map)
    assert (classes[1:] != classes[:-1]).all()


def test_a_page_frame_holds_jpeg_and_class_map() -> None:
    one = shot()
    data = page_frame(one)
    size = int.from_bytes(data[:4], "little")
    head = json.loads(data[4 : 4 + size])
    rest = data[4 + size :]
    image = cv2.imdecode(np.frombuffer(rest[: head["jpeg"]], np.uint8), cv2.IMREAD_COLOR_RGB)
    difference = np.abs(image.astype(int) - one.frame.image)
    assert difference.mean() < 4
    ends, classes = rows_of(rest[head["jpeg"] :], head["runs"], head["runs"])
    assert len(rest) == head["jpeg"] + 6 * head["runs"]
    back = np.repeat(classes, np.diff(ends, prepend=np.uint32(0))).reshape(90, 160)
    np.testing.assert_array_equal(back, one.result.class_map)
    assert (head["seq"], head["segments"]) == (3, None)
    assert (head["frame"], head["pts"], head["at"]) == (7, 0.28, 100.0)
    assert (head["width"], head["height"], head["stale"]) == (160, 90, False)


def test_a_large_frame_is_scaled_down_for_the_page_and_not_for_the_snapshot() -> None:
    large = shot(1440, 2560)
    data = page_frame(large)
    head = json.loads(data[4 : 4 + int.from_bytes(data[:4], "little")])
    assert (head["height"], head["width"]) == (720, 1280)
    whole = cv2.imdecode(np.frombuffer(overlay_jpeg(large, 0.5), np.uint8), cv2.IMREAD_COLOR)
    assert whole.shape == (1440, 2560, 3)


@pytest.mark.parametrize(("height", "width"), [(720, 1280), (90, 160), (8, 12), (1, 1)])
def test_a_stale_overlay_says_so_across_its_top(height: int, width: int) -> None:
    fresh, old = shot(height, width), shot(height, width, stale=True)
    wanted = blend(fresh.frame.image, fresh.result.class_map, CAMVID11, 0.5)
    images = [
        cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB).astype(int)
        for data in (
            overlay_jpeg(fresh, 0.5),
            overlay_jpeg(old, 0.5),
            overlay_jpeg(fresh, 0.5, stale=True),
        )
    ]
    if height > 20:
        assert np.abs(images[0] - wanted).mean() < 8
    for marked in images[1:]:
        assert marked[0, 0, 0] > 150
        assert marked[0, 0, 1] < 90
        if height > 100:
            inner = slice(height // 2, height - 20), slice(20, width - 20)
            np.testing.assert_array_equal(marked[inner], images[0][inner])
            assert (marked[: height // 8] > 200).all(-1).sum() > 300  # the white letters


def test_instance_and_panoptic_results_are_shown_by_segment() -> None:
    labels = LabelMap(("road", "car"), ((255, 0, 0), (0, 255, 0)), 255, things=(1,))
    segment_map = np.ones((90, 160), np.uint16)
    segment_map[20:40, 20:60] = 2
    one = shot()
    instance = Instance(1, 0.9, 20, 20, np.ones((20, 40), np.bool_))
    for result in (
        Segmentation.from_panoptic(segment_map, [0, 1], [0.9, 0.8], labels),
        Segmentation.from_instances([instance], (90, 160), labels),
    ):
        shown = FrameShot(1, one.frame, result, at=100.0)
        data = page_frame(shown)
        size = int.from_bytes(data[:4], "little")
        head = json.loads(data[4 : 4 + size])
        ends, classes = rows_of(data[4 + size + head["jpeg"] :], head["runs"], head["runs"])
        back = np.repeat(classes, np.diff(ends, prepend=np.uint32(0))).reshape(90, 160)
        np.testing.assert_array_equal(back, result.segment_map)
        for said, segment in zip(head["segments"], result.segments, strict=True):
            assert (said["id"], said["class"]) == (segment.id, segment.class_id)
            assert said["thing"] == (segment.label == "car")
            assert (said["colour"] == [255, 0, 0]) == (segment.label == "road")
        jpeg = np.frombuffer(overlay_jpeg(shown, 1.0), np.uint8)
        red, green, blue = cv2.imdecode(jpeg, cv2.IMREAD_COLOR_RGB)[30, 40].astype(int).tolist()
        assert green > 200 > 60 > max(red, blue)
