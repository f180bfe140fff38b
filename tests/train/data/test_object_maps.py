"""PNGs that number objects: beside class maps, alone, and Cityscapes' instanceIds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from knet_runtime.errors import DataError
from knet_train.config import load_config
from knet_train.data.check_segments import check_segments, survey_segments
from knet_train.data.layouts import CITYSCAPES19
from knet_train.data.object_maps import read_ids
from knet_train.data.segments import open_segments, segment_splits, usual_task
from knet_train.data.truth import BACKGROUND, VOID, Truth, from_classes
from knet_train.figures import draw_sheet

SIZE = (24, 40)
LABELS: dict[str, Any] = {"class_names": ["road", "car", "person"], "things": ["car", "person"]}


def save(path: Path, pixels: Any, dtype: type = np.uint8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype)).save(path)


def boxes(places: dict[int, tuple[int, int, int, int]], value: int = 0) -> Any:
    """A map of ``value`` with boxes (top, left, bottom, right) of others."""
    drawn = np.full(SIZE, value)
    for number, (top, left, bottom, right) in places.items():
        drawn[top:bottom, left:right] = number
    return drawn


CARS, PERSON, CROWD = (2, 2, 10, 20), (12, 2, 20, 8), (12, 20, 20, 30)


@pytest.fixture
def street(tmp_path: Path) -> Path:
    """Road with two cars side by side, a person, and persons without a number; an unlabelled row.
    The person's number is that of a car, and one of the road means nothing."""
    classes = boxes({1: CARS, 2: PERSON})
    classes[CROWD[0] : CROWD[2], CROWD[1] : CROWD[3]] = 2
    classes[0] = 255
    ids = boxes({700: CARS, 60_000: (2, 12, 10, 20)})
    ids[PERSON[0] : PERSON[2], PERSON[1] : PERSON[3]] = 700
    ids[22] = 9
    for name in ("train/a", "val/b"):
        save(tmp_path / "images" / f"{name}.png", np.zeros((*SIZE, 3)))
        save(tmp_path / "labels" / f"{name}.png", classes)
        save(tmp_path / "instances" / f"{name}.png", ids, np.uint16)
    (tmp_path / "labels.json").write_text(json.dumps(LABELS))
    return tmp_path


def areas(truth: Truth) -> list[tuple[int, bool, int]]:
    """(class, crowd, pixels) of each segment, sorted."""
    return sorted(
        (class_id, id_ in truth.crowds, int((truth.ids == id_).sum()))
        for id_, class_id in enumerate(truth.classes, 1)
    )


ROAD = 24 * 40 - 40 - 8 * 18 - 8 * 6 - 8 * 10


def test_an_object_is_one_number_of_one_class(street: Path) -> None:
    folder = open_segments(street, "train", "panoptic")
    assert folder.labels.names == ("road", "car", "person")
    assert folder.labels.things == (1, 2)
    image, truth = folder.read(0)
    assert image.shape == (*SIZE, 3)
    assert truth.ids.shape == (1, *SIZE)
    assert areas(truth) == [
        (0, False, ROAD),
        (1, False, 64),
        (1, False, 80),
        (2, False, 48),
        (2, True, 80),
    ]
    assert np.array_equal(truth.void, np.arange(24)[:, None] + np.zeros(40) == 0)
    assert np.array_equal(truth.ids[0] == 0, truth.void)


def test_task_instance_has_things_alone_and_stuff_is_background(street: Path) -> None:
    folder = open_segments(street, "val", "instance")
    assert folder.labels.names == ("car", "person")
    assert folder.labels.things == (0, 1)
    truth = folder.read_truth(0)
    assert areas(truth) == [(0, False, 64), (0, False, 80), (1, False, 48), (1, True, 80)]
    assert truth.void.sum() == 40


def test_ade20ks_values_have_objects_beside_them_too(street: Path) -> None:
    expected = open_segments(street, "train", "panoptic").read_truth(0)
    for path in (street / "labels").glob("*/*.png"):
        values = np.asarray(Image.open(path))
        save(path, np.where(values == 255, 0, values + 1))
    (street / "labels").rename(street / "annotations")
    folder = open_segments(street, "training", "panoptic")
    truth = folder.read_truth(0)
    assert np.array_equal(truth.ids, expected.ids)
    assert truth[1:3] == expected[1:3]
    assert np.array_equal(truth.void, expected.void)


@pytest.mark.parametrize("folder", ["instances", "masks"])
@pytest.mark.parametrize("names", [["nucleus"], {"class_names": ["nucleus"]}])
def test_numbers_alone_are_objects_of_the_only_class(
    tmp_path: Path, folder: str, names: Any
) -> None:
    save(tmp_path / "images" / "a.png", np.zeros((*SIZE, 3)))
    save(tmp_path / folder / "a.png", boxes({255: CARS, 3: PERSON}))
    (tmp_path / "labels.json").write_text(json.dumps(names))
    truth = open_segments(tmp_path, "all", "instance").read(0)[1]
    assert areas(truth) == [(0, False, 48), (0, False, 144)]
    assert not truth.void.any()
    assert usual_task(tmp_path) == "instance"
    panoptic = open_segments(tmp_path, "all", "panoptic").read(0)[1]
    assert np.array_equal(panoptic.void, panoptic.ids[0] == 0)


def test_beside_numbers_alone_is_the_only_class_of_stuff(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png", np.zeros((*SIZE, 3)))
    save(tmp_path / "masks" / "a.png", boxes({1: CARS}))
    stated = {"class_names": ["glass", "nucleus"], "things": ["nucleus"]}
    (tmp_path / "labels.json").write_text(json.dumps(stated))
    truth = open_segments(tmp_path, "all", "panoptic").read(0)[1]
    assert areas(truth) == [(0, False, 24 * 40 - 144), (1, False, 144)]
    assert not open_segments(tmp_path, "all", "instance").read(0)[1].void.any()


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    """A car, a rider, a group of cars, road, a caravan and what is out of the region."""
    ids = boxes({26_000: CARS, 25_003: PERSON, 26: CROWD}, value=7)
    ids[22], ids[23] = 29_000, 3
    for split, city in (("train", "aachen"), ("val", "munster")):
        stem = f"{split}/{city}/{city}_000000_000019"
        save(tmp_path / "leftImg8bit" / f"{stem}_leftImg8bit.png", np.zeros((*SIZE, 3)))
        save(tmp_path / "gtFine" / f"{stem}_gtFine_instanceIds.png", ids, np.uint16)
    return tmp_path


def test_cityscapes_instance_ids_are_objects_groups_and_stuff(cityscapes: Path) -> None:
    folder = open_segments(cityscapes, "train", "panoptic")
    assert folder.labels == CITYSCAPES19
    car, rider, road = (CITYSCAPES19.names.index(name) for name in ("car", "rider", "road"))
    truth = folder.read(0)[1]
    left = 24 * 40 - 2 * 40 - 144 - 48 - 80
    expected = [(road, False, left), (rider, False, 48), (car, False, 144), (car, True, 80)]
    assert areas(truth) == expected
    assert np.array_equal(np.flatnonzero(truth.void.any(1)), [22, 23])
    assert truth.void.sum() == 80
    instance = open_segments(cityscapes, "val", "instance")
    things = [CITYSCAPES19.names[index] for index in CITYSCAPES19.things]
    assert list(instance.labels.names) == things
    assert things == ["person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]
    assert areas(instance.read_truth(0)) == [(1, False, 48), (2, False, 144), (2, True, 80)]
    assert instance.read_truth(0).void.sum() == 80


def test_every_one_of_cityscapes_scored_labels_has_its_class(cityscapes: Path) -> None:
    # helpers/labels.py of cityscapesScripts: (id, name) of what is scored.
    scored = """7 road, 8 sidewalk, 11 building, 12 wall, 13 fence, 17 pole, 19 traffic light,
    20 traffic sign, 21 vegetation, 22 terrain, 23 sky, 24 person, 25 rider, 26 car, 27 truck,
    28 bus, 31 train, 32 motorcycle, 33 bicycle"""
    ids = np.zeros(SIZE)
    ids[0, :34] = np.arange(34)
    (path,) = (cityscapes / "gtFine" / "train").glob("*/*.png")
    save(path, ids, np.uint16)
    truth = open_segments(cityscapes, "train", "panoptic").read_truth(0)
    found = {}
    for number in range(34):
        if id_ := int(truth.ids[0, 0, number]):
            found[number] = CITYSCAPES19.names[truth.classes[id_ - 1]]
    assert found == {
        int(number): name
        for number, name in (line.strip().split(" ", 1) for line in scored.split(","))
    }


@given(
    arrays(np.int64, (5, 7), elements=st.integers(VOID, 3)),
    arrays(np.uint16, (5, 7), elements=st.sampled_from([0, 1, 2, 65535])),
    st.sets(st.integers(0, 3), min_size=1),
)
def test_segments_of_any_maps_are_classes_and_numbers(
    classes: Any, ids: Any, things: set[int]
) -> None:
    truth = from_classes(classes, ids, things)
    known = {}
    for place in np.ndindex(classes.shape):
        class_id = int(classes[place])
        own = (class_id, int(ids[place])) if class_id in things else (class_id, 0)
        id_ = int(truth.ids[0][place])
        assert truth.void[place] == (class_id == VOID)
        assert (id_ == 0) == (class_id in (VOID, BACKGROUND))
        if id_:
            assert known.setdefault(id_, own) == own
            assert truth.classes[id_ - 1] == class_id
            assert (id_ in truth.crowds) == (class_id in things and own[1] == 0)
    assert len(set(known.values())) == len(known) == len(truth.classes)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_numbers_of_8_and_of_16_bits_are_read_as_they_are(tmp_path: Path, dtype: Any) -> None:
    ids = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, SIZE, dtype, endpoint=True)
    cv2.imwrite(str(tmp_path / "i.png"), ids)
    found = read_ids(tmp_path / "i.png")
    assert found.dtype == np.uint16
    assert np.array_equal(found, ids)


def test_a_palette_png_gives_its_numbers(tmp_path: Path) -> None:
    image = Image.fromarray(np.asarray(boxes({2: CARS}), np.uint8))
    image.putpalette([9, 9, 9, 0, 255, 0, 255, 0, 0])
    image.save(tmp_path / "i.png")
    with Image.open(tmp_path / "i.png") as opened:
        assert opened.mode == "P"
    assert np.array_equal(read_ids(tmp_path / "i.png"), boxes({2: CARS}))


def _no_ids(root: Path) -> None:
    (root / "instances" / "train" / "a.png").unlink()


def _no_class_map(root: Path) -> None:
    (root / "labels" / "train" / "a.png").unlink()


def _colours(root: Path) -> None:
    save(root / "instances" / "train" / "a.png", np.zeros((*SIZE, 3)))


def _other_size(root: Path) -> None:
    save(root / "instances" / "train" / "a.png", np.zeros((24, 41)), np.uint16)


def _both_of_other_size(root: Path) -> None:
    for name in ("instances", "labels"):
        save(root / name / "train" / "a.png", np.zeros((24, 41)))


def _cut_off(root: Path) -> None:
    path = root / "instances" / "train" / "a.png"
    path.write_bytes(path.read_bytes()[:60])


def _foreign_class(root: Path) -> None:
    save(root / "labels" / "train" / "a.png", np.full(SIZE, 7))


def _no_thing(root: Path) -> None:
    (root / "labels.json").write_text(json.dumps(LABELS | {"things": []}))


def _no_instances(root: Path) -> None:
    (root / "instances").rename(root / "objects")


def _two_classes_alone(root: Path) -> None:
    (root / "labels").rename(root / "classes")


def _nameless(root: Path) -> None:
    _two_classes_alone(root)
    (root / "labels.json").unlink()


@pytest.mark.parametrize("task", ["instance", "panoptic"])
@pytest.mark.parametrize(
    ("break_it", "text"),
    [
        (_no_ids, "a.png has no label: expected a PNG named train/a.png in .*instances"),
        (_no_class_map, "a.png has no label: expected a PNG named train/a.png in .*labels"),
        (_colours, "a.png is a RGB image: objects' numbers are PNGs of one channel, of 16 bits"),
        (_other_size, r"instances/train/a.png is 41×24 but .*labels/train/a.png is 40×24"),
        (_both_of_other_size, r"images/train/a.png is 40×24 but .*instances/train/a.png has 41×24"),
        (_cut_off, "cannot read .*instances/train/a.png"),
        (_foreign_class, "a.png holds label 7; its classes are 0 … 2"),
        (_no_thing, "labels.json has no thing"),
        (_no_instances, "does not tell objects apart: it wants instances/ beside its class maps"),
        (_two_classes_alone, 'labels.json wants one class under "things"'),
        (_nameless, "has instances/ without class maps: say in labels.json what the objects are"),
    ],
)
def test_what_is_wrong_with_maps_of_objects_is_one_line(
    street: Path, break_it: Any, text: str, task: Any
) -> None:
    break_it(street)
    with pytest.raises(DataError, match=text) as hit:
        open_segments(street, "train", task).read(0)
    assert "\n" not in str(hit.value)


def test_an_unknown_split_and_a_folder_that_is_none(street: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no split 'test'; it has train, val"):
        open_segments(street, "test", "panoptic")
    with pytest.raises(DataError, match="nowhere is not a folder"):
        open_segments(tmp_path / "nowhere", "train", "instance")
    (street / "split").mkdir()
    (street / "split" / "none.txt").write_text("\n")
    with pytest.raises(DataError, match=r"split 'none' of .* is empty"):
        open_segments(street, "none", "instance")


def test_the_usual_task_is_semantic_where_there_are_class_maps(street: Path) -> None:
    assert usual_task(street) == "semantic"
    assert segment_splits(street, "panoptic") == ["train", "val"]


def test_check_and_sheet_of_maps(street: Path) -> None:
    config = load_config("knet-edge-panoptic", ["model.kernels=2"])
    save(street / "images" / "val" / "b.png", np.full((*SIZE, 3), 40))
    report, good = check_segments(survey_segments(street, None, "panoptic"), config)
    assert not report.problems
    assert report.splits == {"train": 1, "val": 1}
    assert report.layout == "knet-deploy with instances/"
    assert [(row.name, row.pixels, row.objects) for row in report.classes] == [
        ("road", 2 * ROAD, None),
        ("car", 2 * 144, 4),
        ("person", 2 * 128, 2),
    ]
    assert report.ignored_pixels == 80
    assert report.objects is not None
    assert (report.objects.objects, report.objects.crowds, report.objects.most) == (6, 2, 3)
    (warning,) = report.warnings
    assert warning.startswith("2 images (a, b) have more objects, up to 3, than knet-edge-panoptic")
    shares = {row.name: row.pixels / report.labelled_pixels for row in report.classes}
    sheet = cv2.imdecode(np.frombuffer(draw_sheet(good, shares), np.uint8), 1)[..., ::-1]
    palette = {tuple(colour) for colour in sheet.reshape(-1, 3).tolist()}
    assert (255, 0, 255) in palette  # the unlabelled row
    assert (255, 255, 255) in palette  # the crowd
    assert sheet.shape[1] > 4 * 240
    (street / "instances" / "val" / "b.png").unlink()
    report, good = check_segments(survey_segments(street, None, "panoptic"), config)
    assert len(report.problems) == 1
    assert [sample.name for sample in good.samples] == ["a"]
