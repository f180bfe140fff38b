"""ADE20K's and Cityscapes' folders as they are published; our own layout is test_dataset's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from knet_runtime.errors import DataError
from knet_train.data.dataset import check_pairs, open_folder
from knet_train.data.layouts import ADE20K, CITYSCAPES19, find_layout, split_names

VALUES = np.array([[0, 1, 150], [2, 0, 7]], np.uint8)  # as ADE20K's files hold them
CLASSES = np.array([[255, 0, 149], [1, 255, 6]], np.uint8)


def write(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def ade(tmp_path: Path) -> Path:
    root = tmp_path / "ADEChallengeData2016"
    for split, stem in (
        ("training", "ADE_train_00000001"),
        ("training", "ADE_train_00000002"),
        ("validation", "ADE_val_00000001"),
    ):
        write(root / "images" / split / f"{stem}.jpg", np.zeros((2, 3, 3), np.uint8))
        write(root / "annotations" / split / f"{stem}.png", VALUES)
    return root


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    root = tmp_path / "cityscapes"
    for split, city in (("train", "aachen"), ("train", "ulm"), ("val", "munster")):
        stem = f"{city}_000000_000019"
        image = root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png"
        write(image, np.zeros((2, 3, 3), np.uint8))
        label = np.array([[0, 18, 255], [1, 2, 3]], np.uint8)
        write(root / "gtFine" / split / city / f"{stem}_gtFine_labelTrainIds.png", label)
        write(root / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png", label + 7)
    write(root / "leftImg8bit/test/bonn/bonn_0_0_leftImg8bit.png", np.zeros((2, 3, 3), np.uint8))
    return root


def test_ade20k_gives_classes_from_0_and_void_as_255(ade: Path) -> None:
    folder = open_folder(ade, "training")
    assert [sample.name for sample in folder.samples] == [
        "ADE_train_00000001",
        "ADE_train_00000002",
    ]
    assert folder.labels == ADE20K
    image, label = folder.read(1)
    assert image.shape == (2, 3, 3)
    np.testing.assert_array_equal(label, CLASSES)
    assert label.dtype == np.uint8


@pytest.mark.parametrize(("asked", "count"), [("train", 2), ("val", 1), ("validation", 1)])
def test_the_two_names_of_a_split_are_one(ade: Path, asked: str, count: int) -> None:
    assert len(open_folder(ade, asked)) == count


def test_our_own_splits_answer_to_ade20ks_names(make_folder: Callable[..., Path]) -> None:
    root = make_folder(["train/a", "val/b"])
    assert open_folder(root, "validation").samples[0].name == "b"


def test_a_flat_ade20k_folder_is_split_as_ours(ade: Path) -> None:
    for part in ("images", "annotations"):
        for path in (ade / part).glob("*/*"):
            path.rename(ade / part / path.name)
        for split in ("training", "validation"):
            (ade / part / split).rmdir()
    assert split_names(find_layout(ade)) == ["all"]
    assert len(open_folder(ade, "all")) == 3
    assert len(open_folder(ade, "val")) == 1


def test_a_labels_json_names_other_classes_with_the_same_void(ade: Path) -> None:
    (ade / "labels.json").write_text(json.dumps({"class_names": [f"c{i}" for i in range(7)]}))
    folder = open_folder(ade, "val")
    assert folder.labels.num_classes == 7
    with pytest.raises(DataError, match=r"holds label 150; its classes are 1 … 7 and 0 \(ignore\)"):
        folder.read(0)


def test_255_in_an_ade20k_file_is_void_too(ade: Path) -> None:
    write(ade / "annotations/validation/ADE_val_00000001.png", np.full((2, 3), 255, np.uint8))
    assert (open_folder(ade, "val").read(0)[1] == 255).all()
    write(ade / "annotations/validation/ADE_val_00000001.png", np.full((2, 3), 151, np.uint8))
    with pytest.raises(DataError, match="holds label 151"):
        open_folder(ade, "val").read(0)


def test_cityscapes_train_ids(cityscapes: Path) -> None:
    folder = open_folder(cityscapes, "train")
    assert [s.name for s in folder.samples] == ["aachen_000000_000019", "ulm_000000_000019"]
    assert folder.labels == CITYSCAPES19
    np.testing.assert_array_equal(folder.read(0)[1], [[0, 18, 255], [1, 2, 3]])
    assert split_names(find_layout(cityscapes)) == ["train", "val"]
    assert len(open_folder(cityscapes, "validation")) == 1
    with pytest.raises(
        DataError, match=r"no split 'mine'; it has train, val: make leftImg8bit/mine"
    ):
        open_folder(cityscapes, "mine")


def test_cityscapes_without_train_ids_says_how_to_convert_it(cityscapes: Path) -> None:
    for path in cityscapes.rglob("*labelTrainIds.png"):
        path.unlink()
    with pytest.raises(
        DataError, match=r"no \*_gtFine_labelTrainIds\.png.*knet-deploy data convert"
    ):
        open_folder(cityscapes, "train")


def test_one_missing_cityscapes_label_is_named(cityscapes: Path) -> None:
    next(cityscapes.glob("gtFine/train/ulm/*TrainIds.png")).unlink()
    with pytest.raises(DataError, match=r"ulm_000000_000019_leftImg8bit\.png has no label.*check"):
        open_folder(cityscapes, "train")


def test_folders_of_no_layout_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no folder images/.*annotations/.*leftImg8bit/.*has\); convert it"
    ):
        find_layout(tmp_path)
    (tmp_path / "archive" / "images").mkdir(parents=True)
    with pytest.raises(DataError, match=r"did you mean .*archive\?; convert it"):
        find_layout(tmp_path)
    (tmp_path / "leftImg8bit").mkdir()
    with pytest.raises(DataError, match=r"no gtFine/"):
        find_layout(tmp_path)


def test_a_broken_pair_is_found_before_a_run(make_folder: Callable[..., Path]) -> None:
    root = make_folder()
    check_pairs(open_folder(root, "all"))
    write(root / "labels" / "e.png", np.full((64, 96), 9, np.uint8))
    with pytest.raises(
        DataError, match=r"e\.png holds label 9.*run `knet-deploy data check .*data`"
    ):
        check_pairs(open_folder(root, "all"))
    write(root / "labels" / "e.png", np.zeros((96, 64), np.uint8))
    with pytest.raises(DataError, match=r"e\.png is 64×96 but its image is 96×64.*data check"):
        check_pairs(open_folder(root, "all"))
    (root / "images" / "e.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot read .*images.e\.png.*data check"):
        check_pairs(open_folder(root, "all"))


def test_a_photograph_on_its_side_fits_its_upright_label(make_folder: Callable[..., Path]) -> None:
    root = make_folder(["a"])
    (root / "images" / "a.png").unlink()
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (64, 96)).save(root / "images" / "a.jpg", exif=exif)
    folder = open_folder(root, "all")
    check_pairs(folder)
    assert folder.read(0)[0].shape == (64, 96, 3)


def test_ade20ks_own_images(shared_data: Path) -> None:
    folder = open_folder(shared_data / "ade_samples" / "sampleData", "all")
    assert len(folder) == 3
    check_pairs(folder)
    image, label = folder.read(0)
    assert image.shape == (512, 683, 3)
    named = {folder.labels.names[value] for value in np.unique(label) if value != 255}
    assert {"building", "sky", "grass"} <= named
