from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from knet_runtime.errors import DataError
from knet_train.data.check import DataReport, check, encode_report, survey
from knet_train.data.layouts import Sample

MakeFolder = Callable[..., Path]


def report_of(root: Path, split: str | None = None) -> tuple[DataReport, tuple[Sample, ...]]:
    return check(survey(root, split))


def test_a_whole_folder_is_counted(make_folder: MakeFolder) -> None:
    root = make_folder(["train/a", "train/b", "val/c"], size=(64, 96))
    seen: list[None] = []
    report, good = check(survey(root), lambda: seen.append(None))
    assert (report.problems, report.warnings, report.outside) == ((), (), ())
    assert report.splits == {"train": 2, "val": 1}
    assert (report.layout, report.images, len(seen), len(good)) == ("knet-deploy", 3, 3, 3)
    assert [(size.height, size.width, size.images) for size in report.sizes] == [(64, 96, 3)]
    labels = [np.array(Image.open(path)) for path in sorted(root.glob("labels/*/*.png"))]
    for index, row in enumerate(report.classes):
        assert row.pixels == sum(int((label == index).sum()) for label in labels)
        assert row.images == 3
    assert report.ignored_pixels == 3 * 96
    assert report.labelled_pixels == 3 * 63 * 96
    assert b'"labelled_pixels"' in encode_report(report)


def test_every_fault_is_listed_and_named(make_folder: MakeFolder) -> None:
    root = make_folder()
    strange = np.zeros((64, 96), np.uint8)
    strange[0, :5], strange[1, 0] = 7, 200
    Image.fromarray(strange).save(root / "labels" / "a.png")
    whole = (root / "images" / "b.png").read_bytes()
    (root / "images" / "b.png").write_bytes(whole[: len(whole) // 2])
    Image.new("L", (48, 32)).save(root / "labels" / "c.png")
    (root / "labels" / "d.png").unlink()
    (root / "labels" / "e.png").write_text("no image")
    report, good = report_of(root)
    text = "\n".join(report.problems)
    assert len(report.problems) == 5, text
    assert "d.png has no label" in report.problems[0]
    assert "a.png holds label 7 (5 pixels), 200 (1 pixels); its classes are 0 … 2" in text
    assert "b.png: is cut off" in text
    assert "c.png is 48×32 but its image is 96×64" in text
    assert "cannot read label" in text
    assert [(o.value, o.pixels) for o in report.outside] == [(7, 5), (200, 1)]
    assert [sample.name for sample in good] == ["f"]


def test_a_pair_that_is_broken_twice_has_two_lines(make_folder: MakeFolder) -> None:
    root = make_folder(["a", "b"])
    (root / "images" / "a.png").write_bytes(b"")
    (root / "labels" / "a.png").write_bytes(b"")
    assert len(report_of(root)[0].problems) == 2


def test_lone_labels_are_a_warning(make_folder: MakeFolder) -> None:
    root = make_folder(["a", "b"], root="lone")
    (root / "images" / "b.png").unlink()
    report, _ = report_of(root)
    assert report.problems == ()
    assert report.warnings == ("1 labels have no image (b.png)",)


def test_images_that_are_learnt_and_scored_are_a_warning(make_folder: MakeFolder) -> None:
    root = make_folder(["a", "b", "c"])
    (root / "split").mkdir()
    for name, stems in {
        "train": "a b",
        "val": "b c",
        "blocked_train": "a c",
        "blocked_val": "b",
    }.items():
        (root / "split" / f"{name}.txt").write_text("\n".join(stems.split()))
    (warning,) = report_of(root)[0].warnings
    assert warning.startswith("train and val share 1 images (b)")
    assert report_of(root, "val")[0].warnings == ()


@pytest.mark.parametrize("names", [("training", "validation"), ("my_train", "my_test")])
def test_a_leak_is_seen_under_other_names(make_folder: MakeFolder, names: tuple[str, str]) -> None:
    root = make_folder(["a", "b"])
    (root / "split").mkdir()
    for name in names:
        (root / "split" / f"{name}.txt").write_text("a\n")
    assert any("share 1 images" in line for line in report_of(root)[0].warnings)


def test_an_unlabelled_image_is_a_warning(make_folder: MakeFolder) -> None:
    root = make_folder(["a", "b"])
    Image.fromarray(np.full((64, 96), 255, np.uint8)).save(root / "labels" / "b.png")
    report, _ = report_of(root)
    assert report.warnings == (
        "1 images have no labelled pixel (b)",
        "split all: 50.8 % of the pixels are ignored (value 255)",
    )
    assert report.problems == ()


def test_an_empty_folder_is_refused(make_folder: MakeFolder) -> None:
    root = make_folder(["a"])
    (root / "images" / "a.png").unlink()
    with pytest.raises(DataError, match="has no image in"):
        survey(root)


def test_ade20k_values_are_judged_as_its_files_hold_them(make_folder: MakeFolder) -> None:
    root = make_folder(["a", "b"])
    (root / "labels").rename(root / "annotations")
    Image.fromarray(np.arange(4, dtype=np.uint8).repeat(64 * 24).reshape(64, 96)).save(
        root / "annotations" / "a.png"
    )
    Image.fromarray(np.full((64, 96), 4, np.uint8)).save(root / "annotations" / "b.png")
    report, _ = report_of(root)
    assert [row.pixels for row in report.classes] == [64 * 24] * 3
    assert report.ignored_pixels == 64 * 24
    (problem,) = report.problems
    assert "holds label 4 (6144 pixels); its classes are 1 … 3 and 0 (ignore)" in problem


def test_camvid_is_clean(shared_data: Path) -> None:
    report, good = report_of(shared_data / "camvid", "val")
    assert (report.problems, len(good)) == ((), 101)
    assert report.warnings == ()
