from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_folders import CATEGORIES, change, save_ids, write_instances, write_panoptic
from pycocotools import mask as coco_mask

from knet_runtime.errors import DataError
from knet_train.config import load_config
from knet_train.data.check import DataReport
from knet_train.data.check_segments import check_segments, survey_segments
from knet_train.data.dataset import open_folder
from knet_train.data.layouts import COCO, COCO_THINGS
from knet_train.data.segments import open_segments, usual_task

SQUARE = [2.0, 3.0, 10.0, 3.0, 10.0, 9.0, 2.0, 9.0]


def one(segmentation: Any, **keys: Any) -> dict[str, Any]:
    return {"id": 1, "image_id": 1, "category_id": 7, "segmentation": segmentation} | keys


def rle(mask: Any) -> dict[str, Any]:
    found = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(found["size"]), "counts": found["counts"].decode()}


def plain_rle(mask: Any) -> dict[str, Any]:
    flat = np.asarray(mask, np.uint8).ravel(order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=0)).tolist()
    counts = np.diff([0, *changes, flat.size]).tolist()
    return {"size": list(np.shape(mask)), "counts": counts}


def read_one(root: Path, annotations: list[dict[str, Any]]) -> Any:
    write_instances(root, annotations)
    return open_segments(root, "train", "instance").read(0)[1]


def filled(parts: list[list[float]]) -> Any:
    found = coco_mask.merge(coco_mask.frPyObjects(parts, 20, 30))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools, of numpy 2
        return coco_mask.decode(found) > 0


def examined(root: Path, split: str | None = None, task: Any = None) -> DataReport:
    folders = survey_segments(root, split, task or usual_task(root))
    return check_segments(folders, load_config("knet-edge-instance"))[0]


def read_all(root: Path) -> None:
    folder = open_segments(root, "train", "panoptic")
    for index in range(len(folder)):
        folder.read(index)


def test_panoptic_segments_go_with_their_image_whatever_the_order(tmp_path: Path) -> None:
    write_panoptic(tmp_path, images=3)
    folder = open_segments(tmp_path, "train", "panoptic")
    assert folder.labels.names == ("car", "person", "road", "sky")
    assert folder.labels.things == (0, 1)
    for index in range(3):
        image, truth = folder.read(index)
        assert image.shape == (64, 96, 3)
        cars = [id_ for id_, class_id in enumerate(truth.classes, 1) if class_id == 0]
        boxes = [np.argwhere(truth.ids[0] == id_).min(0).tolist() for id_ in cars]
        assert boxes == [[26, 4 + 3 * index], [32, 30 + 3 * index]]
        assert [truth.classes[id_ - 1] for id_ in truth.crowds] == [1]
        assert truth.void[0].all()
        assert truth.void.sum() == 96
        assert len(truth.ids) == 1


def test_task_instance_takes_the_things_of_panoptic_truth(tmp_path: Path) -> None:
    write_panoptic(tmp_path)
    folder = open_segments(tmp_path, "train", "instance")
    assert folder.labels.names == ("car", "person")
    assert folder.labels.things == (0, 1)
    truth = folder.read_truth(1)
    assert sorted(truth.classes) == [0, 0, 1, 1]
    assert truth.ids.max() == 4
    assert truth.void.sum() == 96  # stuff is background, the unlabelled row is not


@pytest.mark.parametrize("write", [rle, plain_rle])
def test_run_lengths_of_both_kinds_give_their_mask(tmp_path: Path, write: Any) -> None:
    mask = np.random.default_rng(0).random((20, 30)) < 0.4
    truth = read_one(tmp_path, [one(write(mask))])
    assert np.array_equal(truth.ids[0] > 0, mask)


def test_polygons_are_filled_as_pycocotools_fills_them(tmp_path: Path) -> None:
    bow = [2.0, 2.0, 20.0, 15.0, 20.0, 2.0, 2.0, 15.0]  # crosses itself
    parts = [bow, [22.5, 4.0, 28.0, 4.5, 25.0, 17.0]]
    truth = read_one(tmp_path, [one(parts)])
    assert np.array_equal(truth.ids[0] > 0, filled(parts))
    assert 0 < filled(parts).sum() < 300


def test_objects_that_overlap_stay_whole_in_further_layers(tmp_path: Path) -> None:
    masks = np.zeros((4, 20, 30), bool)
    masks[0, 2:10, 2:20], masks[1, 5:15, 5:15], masks[2, 8:18, 10:25] = True, True, True
    masks[3, 16:19, 1:4] = True
    truth = read_one(
        tmp_path, [one(rle(mask), id=i, category_id=3) for i, mask in enumerate(masks)]
    )
    assert len(truth.ids) == 3
    for number, mask in enumerate(masks, 1):
        assert np.array_equal((truth.ids == number).any(0), mask)
    flat = truth.flat().ids
    assert np.array_equal(flat > 0, masks.any(0))
    assert (flat[masks[0]] == 1).all()


def test_crowds_and_images_without_an_object(tmp_path: Path) -> None:
    mask = np.zeros((20, 30), bool)
    mask[4:9] = True
    write_instances(tmp_path, [one(plain_rle(mask), iscrowd=1)], images=2)
    folder = open_segments(tmp_path, "train", "instance")
    assert folder.read_truth(0).crowds == {1}
    empty = folder.read_truth(1)
    assert empty.classes == ()
    assert not empty.ids.any()


def test_objects_alone_leave_the_rest_unknown_to_task_panoptic(tmp_path: Path) -> None:
    write_instances(tmp_path, [one([SQUARE])])
    truth = open_segments(tmp_path, "train", "panoptic").read_truth(0)
    assert np.array_equal(truth.void, truth.ids[0] == 0)
    assert not open_segments(tmp_path, "train", "instance").read_truth(0).void.any()


def test_labels_json_chooses_and_merges_categories_and_says_what_is_ignored(tmp_path: Path) -> None:
    write_panoptic(tmp_path)
    stated = {"class_names": ["Ground", "Mover"], "things": ["Mover"]}
    stated["map"] = {"Ground": ["road"], "Mover": ["Car", "person"]}  # type: ignore[assignment]
    (tmp_path / "labels.json").write_text(json.dumps(stated))
    folder = open_segments(tmp_path, "train", "panoptic")
    assert folder.labels.names == ("Ground", "Mover")
    assert folder.labels.things == (1,)
    assert folder.summary() == (
        "panoptic_train.json: ignored, as no class of labels.json has them: sky"
    )
    truth = folder.read_truth(0)
    assert sorted(truth.classes) == [0, 1, 1, 1, 1]
    assert truth.void[5, 70]  # sky
    instance = open_segments(tmp_path, "train", "instance")
    assert instance.labels.names == ("Mover",)
    assert sorted(instance.read_truth(0).classes) == [0, 0, 0, 0]
    assert instance.unmapped == ()  # stuff is background there


def test_annotations_go_with_their_image_whatever_the_order(tmp_path: Path) -> None:
    square = [[2.0, 3.0, 10.0, 3.0, 10.0, 9.0, 2.0, 9.0]]
    image_ids = [2, 3, 1, 3]
    wanted = {1: [0], 2: [1], 3: [0, 1]}
    categories = [3, 7, 7, 3]
    path = write_instances(
        tmp_path,
        [
            one(square, id=10 - number, image_id=image, category_id=category)
            for number, (image, category) in enumerate(zip(image_ids, categories, strict=True))
        ],
        images=3,
    )
    change(path, images=json.loads(path.read_text())["images"][::-1])
    folder = open_segments(tmp_path, "train", "instance")
    for index, sample in enumerate(folder.samples):
        assert sorted(folder.read(index)[1].classes) == wanted[int(sample.name[1:])]


@pytest.mark.parametrize(
    ("break_it", "text"),
    [
        (lambda content: content["annotations"].append(one([SQUARE])), "annotation id 1 is there"),
        (lambda content: content["images"].append(content["images"][0]), "image id 1 is there"),
        (
            lambda content: content["categories"].append({"id": 7, "name": "bus"}),
            "category id 7 is there",
        ),
        (lambda content: content["annotations"].clear(), "has no annotations: nothing can be"),
        (
            lambda content: content["images"][0].update(file_name="gone.jpg"),
            "lists 1 images that are not there, such as gone.jpg",
        ),
        (lambda content: content["annotations"][0].update(image_id=9), "such as image_id 9"),
    ],
)
def test_what_is_wrong_with_instances_is_one_line(tmp_path: Path, break_it: Any, text: str) -> None:
    path = write_instances(tmp_path, [one([SQUARE])])
    content = json.loads(path.read_text())
    break_it(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=text) as hit:
        open_segments(tmp_path, "train", "instance")
    assert "\n" not in str(hit.value)


def test_the_table_of_coco_classes_is_no_split(tmp_path: Path) -> None:
    write_panoptic(tmp_path)
    (tmp_path / "annotations" / "panoptic_coco_categories.json").write_text("[]")
    assert examined(tmp_path).splits == {"train": 2}


def test_a_split_is_found_without_its_year(tmp_path: Path) -> None:
    write_panoptic(tmp_path, "val2017")
    assert open_segments(tmp_path, "val", "panoptic").split == "val2017"
    with pytest.raises(DataError, match="no split 'train'; it has val2017"):
        open_segments(tmp_path, "train", "panoptic")
    write_panoptic(tmp_path, "val2014")
    with pytest.raises(DataError, match="several splits 'val'; it has val2014, val2017"):
        open_segments(tmp_path, "val", "panoptic")


@pytest.mark.parametrize(
    ("segmentation", "text"),
    [
        ([], "has no polygon"),
        ([[]], "has a polygon that is no list of three points"),
        ([[1.0, 2.0, 3.0, 4.0]], "has a polygon that is no list of three points"),
        ([[*SQUARE, 1.0]], "has a polygon that is no list of three points"),
        ([["a"] * 6], "has a polygon that is no list of three points"),
        (None, "has no polygon"),
        (rle(np.ones((30, 20))), r"is a mask of size \[30, 20\]"),
        ({"size": [20, 30], "counts": [10, 20]}, "has run lengths of 30 pixels in an image of 600"),
        ({"size": [20, 30], "counts": [10, -10, 600]}, "has run lengths that are not readable"),
        ({"size": [20, 30], "counts": "\x7f\x7f"}, "has run lengths that are not readable"),
        (
            {"size": [20, 30], "counts": "Po"},
            "has run lengths that are not readable",
        ),  # ends within a number
        ({"size": [20, 30]}, "has run lengths that are not readable"),
    ],
)
def test_an_annotation_that_is_no_mask_is_named(
    tmp_path: Path, segmentation: Any, text: str
) -> None:
    with pytest.raises(DataError, match=rf"instances_train.json: annotation 1 of i1 {text}") as hit:
        read_one(tmp_path, [one(segmentation)])
    assert "\n" not in str(hit.value)


def _missing_images(path: Path, root: Path) -> None:
    for image in (root / "train").iterdir():
        image.unlink()


def _foreign_id(path: Path, root: Path) -> None:
    save_ids(root / "annotations" / "panoptic_train" / "p0.png", np.full((64, 96), 1234))


def _other_size(path: Path, root: Path) -> None:
    save_ids(root / "annotations" / "panoptic_train" / "p0.png", np.zeros((60, 96)))


def _doubled_annotation(path: Path, root: Path) -> None:
    annotations = json.loads(path.read_text())["annotations"]
    change(path, annotations=annotations + annotations[:1])


def _unknown_category(path: Path, root: Path) -> None:
    change(path, categories=CATEGORIES[1:])


def _unknown_image(path: Path, root: Path) -> None:
    change(path, images=json.loads(path.read_text())["images"][:1])


def _doubled_segment(path: Path, root: Path) -> None:
    annotations = json.loads(path.read_text())["annotations"]
    annotations[0]["segments_info"][1]["id"] = annotations[0]["segments_info"][0]["id"]
    change(path, annotations=annotations)


@pytest.mark.parametrize(
    ("break_it", "text"),
    [
        (_missing_images, "lists 2 images that are not there, such as p0.jpg"),
        (_foreign_id, r"p0.png holds the id 1234, which panoptic_train.json has no segment for"),
        (_other_size, "p0.png is 96×60 but its image is 96×64"),
        (_doubled_annotation, "annotation of image id 41 is there more than once"),
        (_doubled_segment, "segment id 70000 is there more than once"),
        (_unknown_category, "has category_id 7, which is no category of it"),
        (_unknown_image, "1 annotations are of images that it does not list"),
        (lambda path, _: change(path, annotations=[]), "has no annotations"),
        (lambda path, _: change(path, categories=[]), "has no categories"),
        (lambda path, _: change(path, categories=CATEGORIES * 2), "categories share a name"),
        (lambda path, _: path.write_text("{}"), "missing required field `images`"),
    ],
)
def test_what_is_wrong_with_panoptic_truth_is_one_line(
    tmp_path: Path, break_it: Any, text: str
) -> None:
    path = write_panoptic(tmp_path)
    break_it(path, tmp_path)
    with pytest.raises(DataError, match=text) as hit:
        read_all(tmp_path)
    assert "\n" not in str(hit.value)


def test_labels_json_that_names_no_category_is_refused(tmp_path: Path) -> None:
    write_panoptic(tmp_path)
    (tmp_path / "labels.json").write_text('["crack", "background"]')
    with pytest.raises(DataError, match=r"names none of the categories of panoptic_train.json"):
        open_segments(tmp_path, "train", "panoptic")


def test_an_image_of_another_size_than_stated(tmp_path: Path) -> None:
    path = write_instances(tmp_path, [one([SQUARE])])
    change(path, images=[{"id": 1, "file_name": "i1.jpg", "height": 30, "width": 30}])
    with pytest.raises(DataError, match=r"i1.jpg is 30×20 but .*instances_train.json has 30×30"):
        open_segments(tmp_path, "train", "instance").read(0)


def test_semantic_training_refuses_objects_in_a_line(tmp_path: Path) -> None:
    write_panoptic(tmp_path)
    with pytest.raises(DataError, match="holds single objects, in COCO's formats"):
        open_folder(tmp_path, "train")


def test_check_counts_objects_and_lists_every_fault(tmp_path: Path) -> None:
    write_panoptic(tmp_path, "train", images=3)
    write_panoptic(tmp_path, "val", images=2)
    report = examined(tmp_path)
    assert report.splits == {"train": 3, "val": 2}
    assert not report.problems
    counts = {row.name: (row.objects, row.images) for row in report.classes}
    assert counts == {"car": (10, 5), "person": (5, 5), "road": (None, 5), "sky": (None, 5)}
    assert report.ignored_pixels == 5 * 96
    for name in ("p0", "p1"):
        save_ids(tmp_path / "annotations" / "panoptic_val" / f"{name}.png", np.full((64, 96), 9))
    report = examined(tmp_path)
    assert [line.split("/")[-1][:20] for line in report.problems] == [
        "p0.png holds the id ",
        "p1.png holds the id ",
    ]


@pytest.mark.parametrize(
    ("name", "task", "split", "objects"),
    [
        ("coco_panoptic_mini", "panoptic", "val", 712 - 5),
        ("coco_panoptic_mini", "instance", "val", 712 - 5),
        ("pennfudan", "instance", "val", 67),
        ("adas_street", "instance", "train", 452 + 239 + 59 + 37),
    ],
)
def test_real_folders_hold_the_objects_that_are_known_of(
    shared_data: Path, name: str, task: Any, split: str, objects: int
) -> None:
    root = shared_data / name
    if not root.is_dir():
        pytest.skip(f"no {name}")
    report = examined(root, split, task)
    assert not report.problems
    assert sum(row.objects or 0 for row in report.classes) == objects
    if name.startswith("coco"):
        expected = COCO if task == "panoptic" else COCO_THINGS
        assert tuple(row.name for row in report.classes) == expected.names
