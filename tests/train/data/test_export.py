"""What ``export`` writes, ``convert`` and training read as the same labels."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from coco_folders import save_image, write_instances, write_panoptic
from foreign_trees import save, save_json, save_text
from PIL import Image

from knet_runtime.errors import ConfigError, DataError, OutputError
from knet_runtime.types import Task
from knet_train.data.convert.write import Options, convert, open_source
from knet_train.data.export.labelled import list_images
from knet_train.data.export.write import Exported, Target, check_export, export
from knet_train.data.segments import open_segments

NAMES = ("road", "Straße, nass", "car", "人")
THINGS = ("car", "人")
# Paths below images/ and labels/: folders, spaces, other scripts, a dot.
STEMS = ("train/a b", "train/ulm/ö.1", "val/人 <&\"'", "val/ulm/x")
SIZE = (24, 40)


def label(seed: int, void: bool = True) -> np.ndarray:
    """Regions with holes, of one pixel, touching at corners and edges, and not labelled."""
    rng = np.random.default_rng(seed)
    found = rng.integers(0, 3, (6, 10)).astype(np.uint8).repeat(4, 0).repeat(4, 1)
    found[4:20, 10:30] = 2
    found[8:12, 14:18] = 0  # a hole in it
    found[9, 15] = 3  # and an island of one pixel in that
    found[rng.random(SIZE) < 0.02] = 3
    if void:
        found[0] = found[13:15, 20:22] = 255
    return found


def index_folder(root: Path, names: tuple[str, ...] = NAMES, **extra: Any) -> Path:
    save_json(root / "labels.json", {"class_names": names, **extra})
    for seed, stem in enumerate(STEMS):
        (root / "images" / stem).parent.mkdir(parents=True, exist_ok=True)
        save_image(root / "images" / f"{stem}.JPG", SIZE, seed)
        save(root / "labels" / f"{stem}.png", label(seed))
    return root


def number_folder(root: Path) -> Path:
    """The same, with objects that touch, and pixels of things that are a crowd."""
    index_folder(root, things=THINGS, ignore_index=255)
    for stem in STEMS:
        numbers = np.arange(SIZE[1], dtype=np.uint16)[None] // 11 + 300 + np.zeros(SIZE, np.uint16)
        numbers[18:20, 24:30] = 0
        save(root / "instances" / f"{stem}.png", numbers)
    return root


def write(root: Path, out: Path, to: Target, task: Task = "semantic", **options: Any) -> Exported:
    check_export(out, to, task, polygons=options.get("polygons", False))
    return export(list_images(root, None, task), out, to, **options)


def back(out: Path, classes: tuple[str, ...] = (), task: Task = "semantic") -> Path:
    target = out.with_name(f"{out.name}-knet")
    with open_source(out) as opened:
        done = convert(opened, target, Options(classes=classes, task=task))
    assert not done.problems
    return target


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def edges(values: np.ndarray) -> np.ndarray:
    """The pixels within one of another value."""
    near = np.ones((3, 3), np.uint8)
    return cv2.dilate(values, near) != cv2.erode(values, near)


@pytest.mark.parametrize("to", ["coco", "cvat"])
def test_class_maps_come_back_byte_for_byte(to: Target, tmp_path: Path) -> None:
    root = index_folder(tmp_path / "data")
    done = write(root, tmp_path / "out", to)
    assert done.splits == {"train": 2, "val": 2}
    assert done.counts.polygons == 0
    found = back(tmp_path / "out", NAMES)
    for stem in STEMS:
        assert (found / "labels" / f"{stem}.png").read_bytes() == (
            root / "labels" / f"{stem}.png"
        ).read_bytes()
        assert (found / "images" / f"{stem}.jpg").read_bytes() == (
            root / "images" / f"{stem}.JPG"
        ).read_bytes()


def test_polygons_come_back_within_a_pixel(tmp_path: Path) -> None:
    root = index_folder(tmp_path / "data")
    done = write(root, tmp_path / "out", "cvat", polygons=True)
    assert done.counts.masks < done.counts.polygons
    found = back(tmp_path / "out", NAMES)
    for stem in STEMS:
        wanted, got = (read(base / "labels" / f"{stem}.png") for base in (root, found))
        near = edges(wanted)
        assert np.array_equal(got[~near], wanted[~near])
        assert (got == wanted).mean() > 0.95


def test_background_stays_free_of_shapes_and_what_is_not_labelled_is_said(tmp_path: Path) -> None:
    names = ("road", "background", "car", "人")
    root = index_folder(tmp_path / "data", names)
    write(root, tmp_path / "out", "cvat")
    top = ElementTree.parse(tmp_path / "out" / "annotations.xml").getroot()
    shapes = [shape.get("label") for shape in top.iter("mask")]
    assert {*shapes} == {"road", "car", "人", "__ignore__"}
    raw = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert [one["name"] for one in raw] == [*names, "__ignore__"]
    assert [one.get("name") for one in top.iter("image")] == sorted(f"{stem}.JPG" for stem in STEMS)
    found = back(tmp_path / "out", names)
    for stem in STEMS:
        assert np.array_equal(*(read(base / "labels" / f"{stem}.png") for base in (root, found)))


@pytest.mark.parametrize("to", ["coco", "cvat"])
def test_objects_and_crowds_come_back(to: Target, tmp_path: Path) -> None:
    root = number_folder(tmp_path / "data")
    write(root, tmp_path / "out", to, "panoptic")
    found = back(tmp_path / "out", NAMES, "panoptic")
    for split in ("train", "val"):
        before, after = (open_segments(base, split, "panoptic") for base in (root, found))
        assert after.labels.things == before.labels.things
        for index in range(len(before)):
            assert_same(before.read_truth(index), after.read_truth(index))


@pytest.mark.parametrize("polygons", [False, True])
@pytest.mark.parametrize("to", ["coco", "cvat"])
def test_overlapping_objects_stay_whole(to: Target, polygons: bool, tmp_path: Path) -> None:
    rle = {"size": [20, 30], "counts": [200, 20, 380]}
    entries = [
        {"category_id": 7, "segmentation": [[2, 2, 20, 2, 20, 14, 2, 14]]},
        {"category_id": 3, "segmentation": [[10, 6, 16, 6, 16, 10, 10, 10]]},
        {"category_id": 3, "segmentation": [[22, 2, 24, 2, 24, 4, 22, 4], [26, 6, 29, 6, 29, 9]]},
        {"category_id": 7, "segmentation": rle, "iscrowd": 1},
    ]
    entries = [{"id": n, "image_id": 1, "iscrowd": 0, **one} for n, one in enumerate(entries)]
    nothing = {"category_id": 8, "segmentation": [[0, 16, 9, 16, 9, 20, 0, 20]]}
    entries.append({"id": 9, "image_id": 1, **nothing})
    path = write_instances(tmp_path / "data", entries)
    content = json.loads(path.read_text())
    names = {7: "car", 3: "人", 8: "x"}
    content["categories"] = [{"id": number, "name": name} for number, name in names.items()]
    save_json(path, content)
    save_json(tmp_path / "data" / "labels.json", {"class_names": NAMES[2:], "things": THINGS})
    before = open_segments(tmp_path / "data", "train", "instance").read_truth(0)
    assert before.void.sum() == 36  # of x, which labels.json does not have
    done = write(tmp_path / "data", tmp_path / "out", to, "instance", polygons=polygons)
    assert done.counts.masks + done.counts.polygons == 5
    assert done.counts.polygons == (0 if not polygons else 3 if to == "coco" else 2)
    if to == "coco":  # training reads it as it is
        after = open_segments(tmp_path / "out", "train", "instance")
        assert after.labels.names == ("car", "人")
        assert_same(before, after.read_truth(0))
    found, whole = (back(tmp_path / name, (), "instance") for name in ("out", "data"))
    for kind in ("labels", "instances"):
        one, other = (read(next((base / kind).rglob("*.png"))) for base in (found, whole))
        assert np.array_equal(one > 0, other > 0)
        assert kind == "instances" or np.array_equal(one, other)


def test_panoptic_data_goes_out_as_it_came(tmp_path: Path) -> None:
    write_panoptic(tmp_path / "data", "train")
    write_panoptic(tmp_path / "data", "val")
    done = write(tmp_path / "data", tmp_path / "out", "coco", "panoptic", link=True)
    assert done.splits == {"train": 2, "val": 2}
    assert all(path.is_symlink() for path in (tmp_path / "out" / "images").rglob("*.jpg"))
    for split in ("train", "val"):
        before, after = (
            open_segments(tmp_path / name, split, "panoptic") for name in ("data", "out")
        )
        assert before.labels == after.labels
        for index in range(2):
            assert_same(before.read_truth(index), after.read_truth(index))


def test_a_flat_folder_and_its_lists_are_written_once(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for name in "abc":
        save_image(root / "images" / f"{name}.png", SIZE)
        save(root / "labels" / f"{name}.png", label(1))
    save_json(root / "labels.json", NAMES)
    assert write(root, tmp_path / "flat", "cvat").splits == {"all": 3}
    assert {p.name for p in (tmp_path / "flat" / "images").iterdir()} == {"a.png", "b.png", "c.png"}
    save_text(root / "split" / "train.txt", "a\nb")
    assert write(root, tmp_path / "listed", "coco").splits == {"all": 1, "train": 2}


def test_what_cannot_be_written_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    root = index_folder(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"panoptic format, which has none: .* --to cvat"):
        write(root, tmp_path / "out", "coco", polygons=True)
    with pytest.raises(OutputError, match="data is there already"):
        write(root, root, "cvat")
    path = root / "labels" / f"{STEMS[0]}.png"
    save(path, label(0)[:5])
    (said,) = write(root, tmp_path / "out", "cvat").problems
    assert "a b.JPG was labelled at 40×5, but the image is 40×24" in said
    path.write_bytes(path.read_bytes()[:50])
    (said,) = write(root, tmp_path / "out", "coco").problems
    assert said.startswith("cannot read label ")
    path.unlink()
    with pytest.raises(DataError, match="has no label: expected a PNG"):
        write(root, tmp_path / "out", "coco")
    assert [one.name for one in tmp_path.iterdir()] == ["data"]
    write_panoptic(tmp_path / "coco")
    file = tmp_path / "coco" / "annotations" / "panoptic_train.json"
    content = json.loads(file.read_text())
    save_image(tmp_path / "coco" / "train" / "p0.png", (64, 96))
    content["images"][1]["file_name"] = "p0.png"
    save_json(file, content)
    with pytest.raises(DataError, match="share a name: rename one"):
        write(tmp_path / "coco", tmp_path / "out", "coco", "panoptic")


def assert_same(before: Any, after: Any) -> None:
    """The same objects, whatever their numbers, and the same void."""
    assert np.array_equal(before.void, after.void)
    sets = []
    for truth in (before, after):
        own = [
            (class_id, number in truth.crowds, (truth.ids == number).any(0).tobytes())
            for number, class_id in enumerate(truth.classes, 1)
        ]
        sets.append(sorted(own))
    assert sets[0] == sets[1]
