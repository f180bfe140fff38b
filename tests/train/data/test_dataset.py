from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from knet_runtime.errors import DataError, SourceError
from knet_runtime.labels import LabelMap
from knet_train.data.dataset import open_folder
from knet_train.data.label_files import read_label

MakeFolder = Callable[..., Path]


def names(root: Path, split: str) -> list[str]:
    return [sample.name for sample in open_folder(root, split).samples]


def listing(root: Path, name: str, text: str) -> None:
    (root / "split").mkdir(exist_ok=True)
    (root / "split" / f"{name}.txt").write_text(text, "utf-8")


def test_split_files_name_stems_in_their_order(make_folder: MakeFolder) -> None:
    root = make_folder(["train/a", "train/b", "c"])
    listing(root, "mine", "\ufeffc\r\n\n  a  \n")
    assert names(root, "mine") == ["c", "a"]


def test_split_folders(make_folder: MakeFolder) -> None:
    root = make_folder(["train/b", "train/a", "val/c"])
    assert names(root, "train") == ["a", "b"]
    assert names(root, "val") == ["c"]
    image, label = open_folder(root, "val").read(0)
    assert image.shape == (64, 96, 3)
    assert label.shape == (64, 96)
    assert image.dtype == label.dtype == np.uint8


def test_a_split_file_goes_before_a_folder_of_its_name(make_folder: MakeFolder) -> None:
    root = make_folder(["train/a", "train/b"])
    listing(root, "train", "b\n")
    assert names(root, "train") == ["b"]


def test_a_flat_folder_keeps_every_tenth_for_validation(make_folder: MakeFolder) -> None:
    stems = [f"p{index:02}" for index in range(12)]
    root = make_folder(stems, size=(32, 32))
    assert names(root, "all") == stems
    assert names(root, "val") == ["p00", "p10"]
    assert sorted(names(root, "train") + names(root, "val")) == stems


def test_hidden_files_are_left_out(make_folder: MakeFolder) -> None:
    root = make_folder(["a", "b"])
    (root / "images" / "._a.png").write_bytes(b"Mac OS X")
    assert names(root, "all") == ["a", "b"]


def test_palette_labels_give_their_indices(tmp_path: Path, tiny_labels: LabelMap) -> None:
    indices = np.array([[0, 1], [2, 255]], np.uint8)
    label = Image.fromarray(indices).convert("P")
    label.putdata(indices.ravel().tolist())
    label.putpalette([200, 10, 10] * 256)
    label.save(tmp_path / "label.png")
    with Image.open(tmp_path / "label.png") as written:
        assert written.mode == "P"
    np.testing.assert_array_equal(read_label(tmp_path / "label.png", tiny_labels), indices)


def test_a_label_outside_the_map_is_named(make_folder: MakeFolder) -> None:
    root = make_folder(["a"])
    Image.fromarray(np.full((64, 96), 7, np.uint8)).save(root / "labels" / "a.png")
    with pytest.raises(DataError, match=r"a\.png holds label 7; .*0 … 2 and 255.*fix"):
        open_folder(root, "all").read(0)


@pytest.mark.parametrize("mode", ["RGB", "I;16", "1"])
def test_labels_of_another_kind_are_refused(make_folder: MakeFolder, mode: str) -> None:
    root = make_folder(["a"])
    Image.new(mode, (96, 64)).save(root / "labels" / "a.png")
    with pytest.raises(DataError, match=rf"a\.png is a {mode} image: labels are 8-bit"):
        open_folder(root, "all").read(0)


def test_sizes_that_differ_are_refused_not_resized(make_folder: MakeFolder) -> None:
    root = make_folder(["a"])
    Image.new("L", (48, 32)).save(root / "labels" / "a.png")
    with pytest.raises(DataError, match=r"a\.png is 48×32 but its image is 96×64.*fix"):
        open_folder(root, "all").read(0)


def test_damaged_files_are_named(make_folder: MakeFolder) -> None:
    root = make_folder(["a", "b", "c"])
    for part, stem in (("images", "a"), ("labels", "b")):
        path = root / part / f"{stem}.png"
        path.write_bytes(path.read_bytes()[:100])
    (root / "labels" / "c.png").write_text("not an image")
    folder = open_folder(root, "all")
    with pytest.raises(SourceError, match=r"images.a\.png"):
        folder.read(0)
    with pytest.raises(DataError, match=r"labels.b\.png.*write the PNG again"):
        folder.read(1)
    with pytest.raises(DataError, match=r"labels.c\.png.*write the PNG again"):
        folder.read(2)


def test_missing_parts_are_named(make_folder: MakeFolder, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere is not a folder: --data wants"):
        open_folder(tmp_path / "nowhere", "train")
    root = make_folder(["a", "b"])
    (root / "labels" / "b.png").unlink()
    with pytest.raises(DataError, match=r"images.b\.png has no label: expected .* b\.png"):
        open_folder(root, "all")
    (root / "labels.json").unlink()
    with pytest.raises(DataError, match=r"labels\.json.*class_names"):
        open_folder(root, "all")
    shutil.rmtree(root / "labels")
    with pytest.raises(DataError, match=r"data has no folder labels/"):
        open_folder(root, "all")


@pytest.mark.parametrize("text", ["{", '{"class_names": []}', '{"names": ["a"]}', "[]"])
def test_a_broken_label_map_is_named(make_folder: MakeFolder, text: str) -> None:
    root = make_folder(["a"])
    (root / "labels.json").write_text(text)
    with pytest.raises(DataError, match=r"labels\.json"):
        open_folder(root, "all")


def test_a_label_map_beyond_eight_bits_is_refused(make_folder: MakeFolder) -> None:
    root = make_folder(["a"])
    labels = {"class_names": [f"class {index}" for index in range(300)], "ignore_index": 400}
    (root / "labels.json").write_text(json.dumps(labels))
    with pytest.raises(DataError, match="8-bit"):
        open_folder(root, "all")


def test_empty_and_unknown_splits_say_what_to_do(make_folder: MakeFolder) -> None:
    root = make_folder(["a", "b"])
    with pytest.raises(DataError, match=r"no split 'test'; it has all, train, val: make split/"):
        open_folder(root, "test")
    listing(root, "none", "\n\n")
    with pytest.raises(DataError, match=r"'none' of .* is empty: list images"):
        open_folder(root, "none")
    (root / "images" / "hollow").mkdir()
    with pytest.raises(DataError, match=r"'hollow' of .* is empty"):
        open_folder(root, "hollow")


def test_a_faulty_split_file_is_named(make_folder: MakeFolder) -> None:
    root = make_folder(["a", "b"])
    listing(root, "lost", "a\nz\n")
    with pytest.raises(DataError, match=r"'lost' names z, .* split/lost\.txt"):
        open_folder(root, "lost")
    listing(root, "twice", "a\nb\na\n")
    with pytest.raises(DataError, match=r"twice\.txt names a more than once"):
        open_folder(root, "twice")
    (root / "split" / "bytes.txt").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(DataError, match=r"bytes\.txt.*UTF-8"):
        open_folder(root, "bytes")


@pytest.mark.parametrize(
    ("split", "count"), [("train", 367), ("val", 101), ("blocked_train", 293), ("blocked_val", 70)]
)
def test_camvids_splits(shared_data: Path, split: str, count: int) -> None:
    folder = open_folder(shared_data / "camvid", split)
    assert len(folder) == count
    assert folder.labels.num_classes == 11
    image, label = folder.read(count - 1)
    assert image.shape == (360, 480, 3)
    assert label.shape == (360, 480)
