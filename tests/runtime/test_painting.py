"""Overlays of panoptic and instance results: shades, outlines, labels, stuff as it was."""

from __future__ import annotations

import colorsys
from itertools import combinations
from typing import Any

import cv2
import numpy as np
import pytest

from knet_runtime.drawing import blend
from knet_runtime.labels import LabelMap
from knet_runtime.painting import shade
from knet_runtime.segmentation import Instance, Segmentation

HW = (120, 200)
LABELS = LabelMap(
    ("road", "car", "person"), ((128, 64, 128), (0, 0, 142), (220, 20, 60)), 255, things=(1, 2)
)
IMAGE = np.random.default_rng(0).integers(90, 160, (*HW, 3), np.uint8)
CAR, PERSON = (slice(40, 80), slice(20, 90)), (slice(30, 100), slice(120, 160))


def panoptic(tracks: tuple[int | None, ...] = (None, None, None)) -> Segmentation:
    ids = np.ones(HW, np.uint16)
    ids[CAR], ids[PERSON], ids[110:] = 2, 3, 0
    return Segmentation.from_panoptic(ids, [0, 1, 2], [0.9, 0.914, 0.7], LABELS, tracks=tracks)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that are drawn from now on."""
    texts: list[str] = []
    draw: Any = cv2.putText

    def noting(image: Any, text: str, *rest: Any) -> Any:
        texts.append(text)
        return draw(image, text, *rest)

    monkeypatch.setattr(cv2, "putText", noting)
    return texts


def test_things_have_outlines_labels_and_fills_of_their_own(written: list[str]) -> None:
    drawn = panoptic().overlay(IMAGE, 1.0)
    assert drawn[70, 50].tolist() == list(shade(LABELS.palette[1], 2))
    assert drawn[90, 140].tolist() == list(shade(LABELS.palette[2], 3))
    assert drawn[79, 50].min() > 160  # the outline lies inside the mask
    assert [text.replace("-", "·") for text in written] == ["car 2 · 0.91", "person 3 · 0.70"]


def test_stuff_is_blended_and_void_is_clear_with_a_line_of_the_stuff_between() -> None:
    drawn, plain = panoptic().overlay(IMAGE, 0.4), blend(IMAGE, panoptic().class_map, LABELS, 0.4)
    np.testing.assert_array_equal(drawn[101:109, :110], plain[101:109, :110])
    assert (drawn[109, :110] == LABELS.palette[0]).all()
    np.testing.assert_array_equal(drawn[110:], IMAGE[110:])


def test_a_track_keeps_its_colour_and_number_whatever_its_segment_is(written: list[str]) -> None:
    drawn = panoptic((None, 7, 9)).overlay(IMAGE, 1.0)
    assert drawn[70, 50].tolist() == list(shade(LABELS.palette[1], 7))
    assert [text.split()[1] for text in written] == ["7", "9"]


def test_classes_that_are_not_chosen_leave_no_trace(written: list[str]) -> None:
    drawn = panoptic().overlay(IMAGE, 0.5, [1])
    changed = (drawn != IMAGE).any(2)
    assert changed[CAR].mean() > 0.99
    assert [text.split()[0] for text in written] == ["car"]
    changed[20:80, 20:150] = False  # the car and its label
    assert not changed.any()


def test_no_opacity_gives_the_image() -> None:
    np.testing.assert_array_equal(panoptic().overlay(IMAGE, 0.0), IMAGE)


def test_shades_differ_and_stay_near_their_class() -> None:
    for colour in (*LABELS.palette, (0, 0, 0), (255, 255, 255), (255, 255, 0)):
        shades = [shade(colour, number) for number in range(1, 21)]
        hue, _, strength = colorsys.rgb_to_hls(*(value / 255 for value in colour))
        for one in shades:
            turned = abs(colorsys.rgb_to_hls(*(value / 255 for value in one))[0] - hue) % 1
            assert not strength or min(turned, 1 - turned) < 0.05
        assert len(set(shades)) == len(shades)


@pytest.mark.parametrize("count", [40, 300])
def test_in_a_crowd_no_label_covers_another(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes: list[tuple[int, ...]] = []
    draw: Any = cv2.rectangle
    monkeypatch.setattr(cv2, "rectangle", lambda *at: boxes.append((*at[1], *at[2])) or draw(*at))
    rng = np.random.default_rng(1)
    crowd = [
        Instance(1, 0.5, int(left), int(top), np.ones((20, 24), np.bool_), track=index)
        for index, (left, top) in enumerate(rng.integers(0, (176, 100), (count, 2)))
    ]
    drawn = Segmentation.from_instances(crowd, HW, LABELS).overlay(IMAGE)
    assert drawn.shape == IMAGE.shape
    assert len(boxes) > 3
    assert all(min(a, b) >= 0 and c < HW[1] and d < HW[0] for a, b, c, d in boxes)
    for one, other in combinations(boxes, 2):
        apart = one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]
        assert apart


def test_a_scaled_image_gets_the_result_at_its_size(written: list[str]) -> None:
    small = cv2.resize(IMAGE, (100, 60), interpolation=cv2.INTER_AREA)
    drawn = panoptic().overlay(small, 1.0)
    assert drawn[35, 25].tolist() == list(shade(LABELS.palette[1], 2))
    assert written[0].startswith("car 2")


def test_results_without_things_and_images_without_pixels() -> None:
    road = Segmentation.from_panoptic(np.ones(HW, np.uint16), [0], [0.9], LABELS)
    np.testing.assert_array_equal(road.overlay(IMAGE), blend(IMAGE, road.class_map, LABELS, 0.4))
    none = Segmentation.from_instances([], HW, LABELS)
    np.testing.assert_array_equal(none.overlay(IMAGE), IMAGE)
    assert Segmentation.from_instances([], (0, 5), LABELS).overlay(IMAGE[:0, :5]).size == 0
    with pytest.raises(ValueError, match="differ in shape"):
        none.overlay(IMAGE[3:])


def test_objects_of_classes_that_are_not_chosen_cover_nothing(written: list[str]) -> None:
    car, person = np.ones((60, 90), np.bool_), np.ones((50, 60), np.bool_)
    found = [Instance(1, 0.9, 20, 30, car), Instance(2, 0.6, 30, 40, person)]
    drawn = Segmentation.from_instances(found, HW, LABELS).overlay(IMAGE, 1.0, [2])
    assert drawn[80, 60].tolist() == list(shade(LABELS.palette[2], 2))
    np.testing.assert_array_equal(drawn[40:, 100:], IMAGE[40:, 100:])
    assert [text.split()[0] for text in written] == ["person"]


NAMED = LabelMap(("Straße", "道路", "sky"), ((230, 159, 0), (0, 90, 160), (86, 180, 233)), 255)


def test_names_stand_inside_their_large_regions(written: list[str]) -> None:
    classes = np.full((200, 300), 255, np.uint8)
    classes[:, :100], classes[100:, 120:], classes[:4, 120:] = 0, 1, 2  # the sky is too flat
    result, image = Segmentation(classes, NAMED), np.full((200, 300, 3), 90, np.uint8)
    plain = result.overlay(image)
    assert written == []
    named = result.overlay(image, names=True)
    assert len(written) == 2
    changed = (named != plain).any(2)
    assert changed[:, :100].any()
    assert changed[100:, 120:].any()
    assert not changed[classes > 1].any()
    np.testing.assert_array_equal(result.overlay(image, 0, names=True), image)


def test_each_large_part_of_a_class_has_its_name_and_no_name_lies_over_another(
    written: list[str],
) -> None:
    classes = np.full((90, 400), 2, np.uint8)
    classes[20:70, 10:150] = classes[20:70, 200:390] = 0
    Segmentation(classes, NAMED).overlay(np.zeros((90, 400, 3), np.uint8), names=True)
    assert written.count(written[0]) >= 2


def test_a_ring_has_its_name_on_itself() -> None:
    classes = np.full((400, 400), 255, np.uint8)
    cv2.circle(classes, (200, 200), 150, 0, 60)
    image = np.zeros((400, 400, 3), np.uint8)
    result = Segmentation(classes, LabelMap(("o",), ((255, 255, 255),), 255))
    changed = (result.overlay(image, names=True) != result.overlay(image)).any(2)
    assert changed.any()
    assert (classes[changed] == 0).all()


@pytest.mark.parametrize("size", [(0, 40), (1, 1), (3, 500), (40, 0)])
def test_names_fit_images_of_every_shape(size: tuple[int, int]) -> None:
    result = Segmentation(np.zeros(size, np.uint8), NAMED)
    assert result.overlay(np.zeros((*size, 3), np.uint8), names=True).shape == (*size, 3)


def test_names_are_of_stuff_where_things_have_labels(written: list[str]) -> None:
    panoptic().overlay(IMAGE, names=True)
    assert [text.split()[0] for text in written] == ["car", "person", "road"]


def test_a_car_on_a_road_is_plainly_visible_in_the_packaged_models_colours() -> None:
    from knet_runtime.bundle.store import open_bundle

    labels = open_bundle().manifest.labels
    road, car = labels.indices(["road"])[0], labels.indices(["car"])[0]
    classes = np.full((60, 60), road, np.uint8)
    classes[20:40, 20:40] = car
    dark = np.full((60, 60, 3), 60, np.uint8)  # a dark car on a dark road
    drawn = Segmentation(classes, labels).overlay(dark)
    lab = cv2.cvtColor(drawn[[5, 30], [5, 30]][None].astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    assert np.linalg.norm(lab[0, 0] - lab[0, 1]) > 25
