"""One result type for three tasks: what it computes, and that it is computed once."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from pycocotools import mask as coco

from knet_runtime.errors import ConfigError, OutputError
from knet_runtime.labels import LabelMap
from knet_runtime.segmentation import Instance, Segment, Segmentation
from knet_runtime.types import ClassMap, Rgb

# pycocotools' own, under NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

LABELS = LabelMap(
    ("road", "car", "person"), ((1, 2, 3), (40, 50, 60), (7, 80, 9)), 255, things=(1, 2)
)


def panoptic() -> Segmentation:
    """A road with two cars and a person; segment 3 covers nothing; the last row is void."""
    segment_map = np.full((8, 12), 1, np.uint16)
    segment_map[2:4, 1:4], segment_map[2:4, 6:9], segment_map[5, 5] = 2, 4, 5
    segment_map[7] = 0
    classes, scores = [0, 1, 1, 1, 2], [0.9, 0.8, 0.7, 0.6, 0.5]
    return Segmentation.from_panoptic(
        segment_map, classes, scores, LABELS, tracks=[None, 7, 8, 9, None]
    )


def instances() -> Segmentation:
    """Two cars, of which the better one covers a part of the other, and a person with a hole."""
    hole = np.ones((3, 3), np.bool_)
    hole[1, 1] = False
    found = [
        Instance(1, 0.4, 1, 1, np.ones((3, 5), np.bool_)),
        Instance(1, 0.9, 4, 2, np.ones((4, 4), np.bool_), track=3),
        Instance(2, 0.7, 9, 4, np.pad(hole, ((1, 0), (0, 0)))),
    ]
    return Segmentation.from_instances(found, (8, 12), LABELS)


@given(
    arrays.arrays(
        st.sampled_from([np.uint8, np.uint16]),
        arrays.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=40),
        elements=st.integers(0, 12),
    )
)
def test_shares_are_the_counts_of_every_class(class_map: ClassMap) -> None:
    labels = LabelMap(tuple("abcdefghij"), ((0, 0, 0),) * 10, 255)
    wanted = np.bincount(class_map.ravel(), minlength=13)[:10] / max(1, class_map.size)
    assert list(Segmentation(class_map, labels).shares().values()) == wanted.tolist()


def test_shares_are_exact_above_the_whole_numbers_of_float32() -> None:
    class_map = np.zeros((4100, 4100), np.uint8)
    class_map[0, 0] = 1
    shares = Segmentation(class_map, LABELS).shares()
    assert shares == {"road": (4100**2 - 1) / 4100**2, "car": 1 / 4100**2, "person": 0.0}


def test_what_is_computed_is_kept() -> None:
    result = Segmentation(np.zeros((4, 6), np.uint8), LABELS)
    assert result.shares() is result.shares()
    assert result.segments is result.segments
    assert result.segment_map is result.segment_map


def test_a_semantic_result_has_a_segment_for_each_class_it_shows() -> None:
    class_map = np.zeros((8, 12), np.uint8)
    class_map[2:5, 3:7], class_map[7] = 2, 255
    result = Segmentation(class_map, LABELS)
    assert result.segments == (
        Segment(1, 0, "road", None, 84 - 12, (0, 0, 12, 7), False),
        Segment(3, 2, "person", None, 12, (3, 2, 7, 5), True),
    )
    wanted = np.where(class_map == 255, 0, class_map + 1)
    np.testing.assert_array_equal(result.segment_map, wanted)


def test_a_panoptic_result_knows_its_segments() -> None:
    result = panoptic()
    assert result.task == "panoptic"
    assert result.segments[0] == Segment(1, 0, "road", 0.9, 71, (0, 0, 12, 7), False)
    assert result.segments[1] == Segment(2, 1, "car", 0.8, 6, (1, 2, 4, 4), True, track=7)
    assert [segment.id for segment in result.segments] == [1, 2, 4, 5]
    assert result.shares() == {"road": 71 / 96, "car": 12 / 96, "person": 1 / 96}
    assert np.unique(result.class_map).tolist() == [0, 1, 2, 255]
    assert (result.class_map[7] == 255).all()


def test_overlapping_instances_keep_their_whole_masks_and_the_best_lies_above() -> None:
    result = instances()
    assert result.task == "instance"
    assert [(s.score, s.area, s.box, s.track) for s in result.segments] == [
        (0.9, 16, (4, 2, 8, 6), 3),
        (0.7, 8, (9, 5, 12, 8), None),
        (0.4, 15, (1, 1, 6, 4), None),
    ]
    assert result.segment_map[2, 4] == 1
    assert result.segment_map[2, 3] == 3
    assert result.class_map[0, 0] == 255
    assert {segment.id: int(mask.sum()) for segment, mask in result.masks()} == {1: 16, 2: 8, 3: 15}


@pytest.mark.parametrize("result", [panoptic(), instances()], ids=lambda result: result.task)
def test_masks_rle_polygons_and_coco_say_the_same(result: Segmentation) -> None:
    rles, polygons = result.rle(), result.polygons()
    found = result.to_coco(image_id=5)
    assert len(found) == len(result.segments)
    for (segment, mask), said in zip(result.masks(), found, strict=True):
        left, top, right, bottom = segment.box
        whole = np.zeros(result.size, np.uint8)
        whole[top:bottom, left:right] = mask
        assert whole.sum() == segment.area
        decoded = coco.decode({"size": list(result.size), "counts": rles[segment.id].counts})
        np.testing.assert_array_equal(decoded, whole)
        assert said["segmentation"] == {"size": result.size, "counts": rles[segment.id].counts}
        assert said["bbox"] == [left, top, right - left, bottom - top]
        assert coco.toBbox(said["segmentation"]).tolist() == said["bbox"]
        assert (said["image_id"], said["category_id"], said["score"]) == (
            5,
            segment.class_id,
            segment.score,
        )
        flat = [points.ravel().astype(float).tolist() for points in polygons[segment.id]]
        drawn = coco.decode(coco.merge(coco.frPyObjects(flat, *result.size)))
        np.testing.assert_array_equal(drawn, without_holes(whole))


def without_holes(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    around = np.pad(mask, 1)
    cv2.floodFill(around, None, (0, 0), 2)
    return (around[1:-1, 1:-1] != 2).view(np.uint8)


@pytest.mark.parametrize(
    ("classes", "message"), [([0, 1], "above the 2 described"), ([0, 1, 1, 1, 3], "class 3 of 3")]
)
def test_a_panoptic_map_that_says_more_than_its_segments_is_refused(
    classes: list[int], message: str
) -> None:
    segment_map = np.array([[1, 2, 3, 4, 5]], np.uint16)
    with pytest.raises(ValueError, match=message):
        Segmentation.from_panoptic(segment_map, classes, [0.5] * len(classes), LABELS)


@pytest.mark.parametrize(
    ("instance", "message"),
    [
        (Instance(1, 0.5, 0, 0, np.zeros((2, 2), np.bool_)), "holds no pixel"),
        (Instance(1, 0.5, 11, 0, np.ones((2, 2), np.bool_)), "leaves the image"),
        (Instance(1, 0.5, -1, 0, np.ones((2, 2), np.bool_)), "leaves the image"),
        (Instance(3, 0.5, 0, 0, np.ones((2, 2), np.bool_)), "class 3 of 3"),
    ],
)
def test_an_instance_that_cannot_be_is_refused(instance: Instance, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segmentation.from_instances([instance], (8, 12), LABELS)


def test_no_instance_is_a_result_too() -> None:
    result = Segmentation.from_instances([], (8, 12), LABELS)
    assert (result.segments, result.rle(), result.to_coco()) == ((), {}, [])
    assert (result.class_map == 255).all()


@pytest.mark.parametrize("result", [panoptic(), instances()], ids=lambda result: result.task)
def test_a_saved_result_is_the_class_map_and_the_segments(
    result: Segmentation, tmp_path: Path
) -> None:
    result.save(tmp_path / "new" / "straße.png")
    for name, wanted in (
        ("straße.png", result.class_map),
        ("straße.segments.png", result.segment_map),
    ):
        data = np.fromfile(tmp_path / "new" / name, np.uint8)
        read = np.asarray(cv2.imdecode(data, cv2.IMREAD_UNCHANGED))
        assert read.dtype == wanted.dtype
        np.testing.assert_array_equal(read, wanted)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        result.save(tmp_path / "folder.png")


def test_a_saved_semantic_result_is_one_png(tmp_path: Path) -> None:
    result = Segmentation(np.full((3, 4), 2, np.uint8), LABELS)
    for name in ("a.jpg", "a", "a.json"):
        with pytest.raises(ConfigError, match=rf"{name}: let the name end in \.png"):
            result.save(tmp_path / name)
    assert not list(tmp_path.iterdir())
    result.save(str(tmp_path / "a.PNG"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.PNG"]


def shown(result: Segmentation) -> Rgb:
    data = np.frombuffer(result._repr_png_(), np.uint8)
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR_RGB), np.uint8)


def test_a_notebook_shows_the_colours() -> None:
    picture = shown(panoptic())
    assert picture[2, 1].tolist() == [40, 50, 60]
    assert picture[7, 0].tolist() == [0, 0, 0]
    assert (picture[:8, 12:] == picture[0, 12]).all()  # beside a small image, above the legend
    assert [40, 50, 60] in picture[8:].reshape(-1, 3).tolist()


def test_a_notebook_shows_the_overlay_where_the_image_is_known() -> None:
    image = np.full((8, 12, 3), 200, np.uint8)
    result = replace(instances(), image=image)
    np.testing.assert_array_equal(shown(result)[:8, :12], result.overlay(image))
    np.testing.assert_array_equal(result.overlay(), result.overlay(image))
    with pytest.raises(ValueError, match="keeps no image: pass the one"):
        instances().overlay()


@pytest.mark.parametrize("size", [(2000, 3000), (3000, 71), (71, 3000), (5000, 1)])
@pytest.mark.parametrize("has_image", [True, False])
def test_a_notebook_is_shown_no_more_than_a_screen_of_it(
    size: tuple[int, int], has_image: bool
) -> None:
    image = np.zeros((*size, 3), np.uint8) if has_image else None
    segment_map = np.ones(size, np.uint16)
    segment_map[: size[0] // 2] = 2
    result = Segmentation.from_panoptic(segment_map, [0, 1], [0.9, None], LABELS)
    height, width, _ = shown(replace(result, image=image)).shape
    assert max(height, width) <= 1280 + 80  # and the legend
    assert max(height, width) >= 1280


def test_a_result_says_in_a_line_what_it_is() -> None:
    assert repr(panoptic()) == (
        "Segmentation(panoptic, 8×12, 4 segments, road 74 %, car 12 %, person 1 %)"
    )
    empty = Segmentation.from_instances([], (8, 12), LABELS)
    assert repr(empty) == "Segmentation(instance, 8×12, 0 segments)"
    semantic = Segmentation(np.zeros((4, 6), np.uint8), LABELS)
    assert repr(semantic) == "Segmentation(semantic, 4×6, road 100 %)"


@pytest.mark.parametrize("result", [panoptic(), instances()], ids=lambda result: result.task)
def test_supervision_gets_every_segment(result: Segmentation) -> None:
    supervision = pytest.importorskip("supervision")
    found = result.to_supervision()
    assert isinstance(found, supervision.Detections)
    segments = result.segments
    assert found.xyxy.tolist() == [list(segment.box) for segment in segments]
    assert found.mask.sum((1, 2)).tolist() == [segment.area for segment in segments]
    np.testing.assert_array_equal(found.xyxy, masks_to_xyxy(found.mask))
    assert found.confidence == pytest.approx([segment.score for segment in segments])
    assert found.class_id.tolist() == [segment.class_id for segment in segments]
    assert found.tracker_id.tolist() == [
        -1 if segment.track is None else segment.track for segment in segments
    ]
    assert found["class_name"].tolist() == [segment.label for segment in segments]
    cars = found[found.class_id == 1]
    assert len(cars) == 2


def masks_to_xyxy(masks: NDArray[np.bool_]) -> NDArray[np.int64]:
    boxes = []
    for mask in masks:
        rows, columns = np.nonzero(mask)
        boxes.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    return np.array(boxes)


def test_supervision_gets_no_score_where_one_is_unknown_and_no_segments_at_all() -> None:
    pytest.importorskip("supervision")
    semantic = Segmentation(np.array([[0, 0, 2]], np.uint8), LABELS).to_supervision()
    assert (semantic.confidence, semantic.tracker_id) == (None, None)
    assert semantic["class_name"].tolist() == ["road", "person"]
    empty = Segmentation.from_instances([], (8, 12), LABELS).to_supervision()
    assert (len(empty), empty.mask.shape, empty.xyxy.shape) == (0, (0, 8, 12), (0, 4))


def test_without_supervision_the_install_command_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="to_supervision needs supervision: pip install"):
        panoptic().to_supervision()


def test_things_are_classes_in_order() -> None:
    for things in ((3,), (2, 1), (1, 1), (-1,)):
        with pytest.raises(ValueError, match="things"):
            LabelMap(("a", "b", "c"), ((0, 0, 0),) * 3, 255, things)
