"""Data folders as people have them: links, litter of other programs, the same name twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from PIL import Image

from knet_runtime.errors import DataError
from knet_train.data.check import DataReport, check, encode_report, survey
from knet_train.data.dataset import open_folder
from knet_train.data.layouts import find_layout, split_names

MakeFolder = Callable[..., Path]
LITTER = (".ipynb_checkpoints", "@eaDir", "#recycle", "__MACOSX", "lost+found", "$RECYCLE.BIN")


def report_of(root: Path, split: str | None = None) -> DataReport:
    return check(survey(root, split))[0]


def pairs(root: Path, split: str) -> list[tuple[str, str, str]]:
    return [
        (
            sample.name,
            sample.image.relative_to(root).as_posix(),
            sample.label.relative_to(root).as_posix(),
        )
        for sample in open_folder(root, split).samples
    ]


def list_in(root: Path, name: str, *lines: str) -> None:
    (root / "split").mkdir(exist_ok=True)
    (root / "split" / f"{name}.txt").write_text("\n".join(lines), "utf-8")


@pytest.mark.parametrize("linked", ["images and labels", "splits", "deeper folders", "files"])
def test_the_report_on_a_linked_tree_is_that_on_the_real_one(
    make_folder: MakeFolder, tmp_path: Path, linked: str
) -> None:
    real = make_folder(["train/x/a", "train/y/b", "val/z/c"])
    root = tmp_path / "linked"
    root.mkdir()
    shutil.copy(real / "labels.json", root)
    depth = {"images and labels": 1, "splits": 2, "deeper folders": 3, "files": 4}[linked]
    for path in sorted(real.rglob("*")):
        at = path.relative_to(real)
        if len(at.parts) < depth and path.is_dir():
            (root / at).mkdir()
        elif len(at.parts) == depth and at.parts[0] != "labels.json":
            (root / at).symlink_to(path)
    expected = msgspec.structs.replace(report_of(real), root=str(root))
    assert expected.splits == {"train": 2, "val": 1}
    assert report_of(root) == expected


def test_a_link_to_a_folder_above_is_no_endless_tree(make_folder: MakeFolder) -> None:
    root = make_folder(["train/a", "val/b"])
    (root / "images" / "train" / "again").symlink_to(root / "images")
    (root / "images" / "itself").symlink_to(root / "images" / "itself")
    report = report_of(root)
    assert report.splits == {"train": 1, "val": 1}
    (problem,) = report.problems
    assert "itself is a link to" in problem


def test_links_to_nothing_are_named(make_folder: MakeFolder) -> None:
    root = make_folder(["train/a", "train/b", "val/c"])
    (root / "images" / "train" / "b.png").unlink()
    (root / "images" / "train" / "b.png").symlink_to("/gone/b.png")
    with pytest.raises(DataError, match=r"b\.png is a link to .gone.b\.png, which is not there"):
        open_folder(root, "train")
    (root / "images" / "test").symlink_to("/gone/test")
    with pytest.raises(DataError, match=r"images.test is a link to nothing"):
        open_folder(root, "test")


@pytest.mark.parametrize("name", LITTER)
def test_what_other_programs_leave_behind_is_left_out(make_folder: MakeFolder, name: str) -> None:
    root = make_folder(["train/a", "val/b"])
    expected = report_of(root)
    for where in ("images", "images/train", "labels/train"):
        (root / where / name / "a.png").mkdir(parents=True)
        shutil.copy(root / "images/train/a.png", root / where / name / "a-checkpoint.png")
        shutil.copy(root / "images/train/a.png", root / where / name / "a.png" / "THUMB.jpg")
    (root / "images" / "train" / "Thumbs.db").write_bytes(b"thumbs")
    (root / "split").mkdir()
    (root / "split" / "._train.txt").write_bytes(b"\x00\x05")
    assert report_of(root) == expected
    assert split_names(find_layout(root)) == ["train", "val"]


def test_litter_in_cityscapes_is_left_out(tmp_path: Path) -> None:
    root = tmp_path / "cityscapes"
    for part, end in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelTrainIds")):
        folder = root / part / "train" / "ulm"
        (folder.parent / "@eaDir").mkdir(parents=True)
        folder.mkdir()
        Image.new("RGB" if part == "leftImg8bit" else "L", (8, 8)).save(folder / f"u_{end}.png")
        (folder.parent / "@eaDir" / f"u_{end}.png").write_bytes(b"thumb")
        (folder / f"._u_{end}.png").write_bytes(b"Mac OS X")
        (root / part / ".Trash-1000").mkdir()
    assert [sample.name for sample in open_folder(root, "train").samples] == ["u"]
    assert split_names(find_layout(root)) == ["train"]


def test_the_same_stem_in_two_folders_is_paired_by_its_path(make_folder: MakeFolder) -> None:
    root = make_folder(["train/0", "train/more/0", "val/0", "val/1"])
    assert pairs(root, "train") == [
        ("train/0", "images/train/0.png", "labels/train/0.png"),
        ("train/more/0", "images/train/more/0.png", "labels/train/more/0.png"),
    ]
    assert pairs(root, "val")[1] == ("1", "images/val/1.png", "labels/val/1.png")
    report = report_of(root)
    assert report.splits == {"train": 2, "val": 2}
    assert (report.problems, report.warnings) == ((), ())


def test_a_label_may_lie_elsewhere_where_its_stem_is_the_only_one(make_folder: MakeFolder) -> None:
    root = make_folder(["train/a", "train/b", "val/b"])
    (root / "labels/train/a.png").rename(root / "labels/a.png")
    (root / "labels/val/b.png").rename(root / "labels/b.png")
    assert pairs(root, "train")[0] == ("a", "images/train/a.png", "labels/a.png")
    with pytest.raises(DataError, match=r"images.val.b\.png has no label: .* named val/b\.png"):
        open_folder(root, "val")


def test_lines_of_a_split_are_stems_or_paths(make_folder: MakeFolder) -> None:
    root = make_folder(["train/0", "val/0", "val/1.5"])
    lines = ("train/0", "./val/0.png", "1.5")
    list_in(root, "mine", *lines)
    expected = ["images/train/0.png", "images/val/0.png", "images/val/1.5.png"]
    assert [image for _, image, _ in pairs(root, "mine")] == expected
    list_in(root, "mine", "images/train/0.PNG", "images\\val\\0.png", "val/1.5.png")
    assert [image for _, image, _ in pairs(root, "mine")] == expected
    list_in(root, "mine", "0")
    with pytest.raises(DataError, match=r"names 0, which is the stem of 2 images: .* train/0"):
        open_folder(root, "mine")
    list_in(root, "mine", "train/0", "train/0.png")
    with pytest.raises(DataError, match=r"mine\.txt names train/0 more than once"):
        open_folder(root, "mine")


def test_suffixes_may_be_written_in_any_case(make_folder: MakeFolder) -> None:
    root = make_folder(["a", "b", "c"])
    for stem, suffix in (("a", ".JPG"), ("b", ".jpeg"), ("c", ".Tiff")):
        path = root / "images" / f"{stem}.png"
        Image.open(path).save(path.with_suffix(suffix))
        path.unlink()
    (root / "labels" / "a.png").rename(root / "labels" / "a.PNG")
    report = report_of(root)
    assert (report.images, report.problems, report.warnings) == (3, (), ())


def test_two_images_of_one_name_in_one_folder_are_both_named(make_folder: MakeFolder) -> None:
    root = make_folder(["train/a"])
    Image.open(root / "images/train/a.png").save(root / "images/train/a.jpg")
    with pytest.raises(DataError, match=r"train.a\.png and .*train.a\.jpg share a name: rename"):
        open_folder(root, "train")


def test_names_from_a_mac_and_from_elsewhere_are_the_same(make_folder: MakeFolder) -> None:
    root = make_folder(["e\u0301te\u0301"])  # as a Mac writes it
    label = root / "labels" / "e\u0301te\u0301.png"
    label.rename(root / "labels" / "\u00e9t\u00e9.png")
    list_in(root, "mine", "\u00e9t\u00e9")
    assert len(open_folder(root, "mine")) == 1


def test_names_that_are_no_unicode_are_paired_and_reported(make_folder: MakeFolder) -> None:
    root = make_folder(["caf\udce9", "b"])  # Latin-1
    Image.new("L", (8, 8)).save(root / "labels" / "caf\udce9.png")
    report = report_of(root)
    assert report.splits == {"all": 2}
    (problem,) = json.loads(encode_report(report))["problems"]
    assert r"caf\xe9.png is 8×8 but its image is 96×64" in problem
