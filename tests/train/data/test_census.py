"""Labels that are well-formed and still not what their owner meant."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from knet_runtime.errors import DataError
from knet_train.data import dataset
from knet_train.data.census import Census, doubts
from knet_train.data.check import DataReport, check, survey
from knet_train.data.dataset import check_pairs, open_folder

SIZE = (12, 16)
BLACK, RED, BLUE = [0, 0, 0], [128, 0, 0], [0, 0, 200]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """A data folder of small labels by stem: arrays, or images with a palette."""

    def folder(labels: dict[str, object], place: str = "labels", **names: object) -> Path:
        root = tmp_path / "data"
        for stem, label in labels.items():
            for part in ("images", place):
                (root / part / stem).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", SIZE[::-1]).save(root / "images" / f"{stem}.png")
            image = label if isinstance(label, Image.Image) else Image.fromarray(np.array(label))
            image.save(root / place / f"{stem}.png")
        if names:
            (root / "labels.json").write_text(json.dumps(names))
        return root

    return folder


def half(low: int, high: int) -> np.ndarray:
    """The upper half ``low``, the lower half ``high``."""
    label = np.full(SIZE, low, np.uint8)
    label[SIZE[0] // 2 :] = high
    return label


def painted(values: np.ndarray, *colours: list[int]) -> Image.Image:
    image = Image.fromarray(values, "L").copy()
    image.putpalette([channel for colour in colours for channel in colour])
    return image


def report_of(root: Path) -> DataReport:
    return check(survey(root))[0]


def warnings_of_training(root: Path) -> list[str]:
    folders = [open_folder(root, split) for split in ("train", "val")]
    return doubts(folders[0].layout, {each.split: check_pairs(each) for each in folders})


def test_masks_of_0_and_255_are_called_so(make: Callable[..., Path]) -> None:
    root = make(
        {"train/a": half(0, 255), "val/b": half(0, 255)}, class_names=["background", "crack"]
    )
    expected = [
        "no label has a pixel of crack",
        "value 255 is ignored; these look like 0/255 masks: write 1 instead of 255, or set "
        "ignore_index in labels.json",
        "split train: 50.0 % of the pixels are ignored (value 255)",
        "split val: 50.0 % of the pixels are ignored (value 255)",
    ]
    assert list(report_of(root).warnings) == expected
    assert warnings_of_training(root) == expected


def test_a_class_that_one_split_lacks_is_named(make: Callable[..., Path]) -> None:
    root = make(
        {"train/a": half(0, 1), "val/b": half(0, 2)}, class_names=["road", "car", "bus", "tram"]
    )
    expected = [
        "no label has a pixel of tram",
        "split train has no pixel of bus",
        "split val has no pixel of car",
    ]
    assert list(report_of(root).warnings) == expected
    assert warnings_of_training(root) == expected


def test_a_value_that_is_ignored_and_large_may_be_a_class(make: Callable[..., Path]) -> None:
    label = half(0, 255)
    label[0] = 1
    root = make({"a": label}, class_names=["road", "car", "bus"])
    assert list(report_of(root).warnings) == [
        "no label has a pixel of bus",
        "value 255 is ignored: where it stands for a class, write its index",
        "split all: 50.0 % of the pixels are ignored (value 255)",
    ]


def test_one_class_is_refused(make: Callable[..., Path]) -> None:
    root = make({"train/a": half(0, 255), "val/b": half(0, 255)}, class_names=["crack"])
    said = r'names one class.*name the background too, \["background", "crack"\]'
    with pytest.raises(DataError, match=said):
        check_pairs(open_folder(root, "train"))
    assert len(report_of(root).problems) == 1


def test_a_split_without_a_labelled_pixel_is_refused(make: Callable[..., Path]) -> None:
    root = make({"train/a": half(0, 1), "val/b": half(255, 255)}, class_names=["road", "car"])
    with pytest.raises(DataError, match=r"split 'val' of .* has no labelled pixel"):
        check_pairs(open_folder(root, "val"))


def test_ade20ks_names_are_not_given_to_other_classes_without_a_word(
    make: Callable[..., Path],
) -> None:
    root = make({"train/a": half(1, 2), "val/b": half(2, 3)}, "annotations")
    expected = (
        "there is no labels.json, so the classes are ADE20K's 150, and the labels hold 3 of them "
        "(wall, building, sky): if they are your own, name them in a labels.json"
    )
    assert report_of(root).warnings[0] == expected
    assert warnings_of_training(root)[0] == expected


def test_own_classes_from_0_in_annotations_are_seen_to_be_shifted(
    make: Callable[..., Path],
) -> None:
    root = make({"a": half(0, 1), "b": half(1, 2)}, "annotations", class_names=["x", "y", "z"])
    assert report_of(root).warnings[:2] == (
        "no label has a pixel of z",
        "in annotations/ label 0 means void and v means class v - 1: if 0 is a class here, call "
        "the folder labels/",
    )


def test_masks_of_0_and_255_in_annotations_are_all_void(make: Callable[..., Path]) -> None:
    root = make({"a": half(0, 255)}, "annotations")
    warnings = report_of(root).warnings
    assert "and the labels hold none of them: " in warnings[1]
    assert warnings[2].startswith("value 255 is ignored; these look like 0/255 masks: in annot")
    with pytest.raises(DataError, match="has no labelled pixel"):
        check_pairs(open_folder(root, "all"))


PAINTED = {"class_names": ["background", "crack"], "palette_rgb": [BLACK, RED]}


def test_a_palette_that_swaps_the_classes_is_a_problem(make: Callable[..., Path]) -> None:
    root = make(
        {"train/a": painted(half(0, 1), BLACK, RED), "val/b": painted(half(0, 1), RED, BLACK)},
        **PAINTED,
    )
    said = (
        r"labels.val.b\.png: its palette gives label 0 \(background\) the colour that crack has "
        r"in labels\.json: number its pixels by class"
    )
    check_pairs(open_folder(root, "train"))
    with pytest.raises(DataError, match=said + r"; run `knet-deploy data check"):
        check_pairs(open_folder(root, "val"))
    (problem,) = report_of(root).problems
    assert problem.startswith(str(root / "labels/val/b.png"))


@pytest.mark.parametrize(
    ("label", "wrong"),
    [
        (painted(half(0, 1), BLACK, RED), False),
        (painted(half(0, 1), BLACK, [122, 9, 4]), False),  # as JPEG leaves a colour
        (painted(half(0, 0), RED, BLACK), True),  # one class in this file, and the wrong one
        (painted(half(0, 1), [0, 255, 0], BLACK), True),  # void's colour has pushed it by one
        (painted(half(0, 1), BLUE, [0, 255, 0]), False),  # colours of nobody's
        (painted(half(0, 255), BLACK, *[RED] * 255), False),  # what is ignored has any colour
        (Image.fromarray(half(0, 1)), False),
    ],
)
def test_only_a_palette_that_contradicts_is_a_problem(
    make: Callable[..., Path], label: Image.Image, wrong: bool
) -> None:
    assert len(report_of(make({"a": label}, **PAINTED)).problems) == wrong


def test_palettes_that_contradict_one_another_are_a_problem(make: Callable[..., Path]) -> None:
    """Without palette_rgb: each file was numbered on its own, by how much there is of a colour."""
    one, other = painted(half(0, 1), BLACK, RED), painted(half(0, 1), RED, BLACK)
    report = report_of(make({"a": one, "b": other, "c": one}, class_names=["x", "y"]))
    (problem,) = report.problems
    assert "b.png: its palette gives label 0 (x) the colour that y has in other files'" in problem


def test_labels_are_sampled_until_every_class_was_seen(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "_PROBES", 2)
    monkeypatch.setattr(dataset, "_MOST_PROBES", 6)
    labels = {f"p{index}": half(0, 1) for index in range(8)}
    folder = open_folder(make(labels, class_names=["x", "y"]), "all")
    assert check_pairs(folder).files == 2
    assert check_pairs(folder, every_label=True).files == 8
    folder = open_folder(make(labels, class_names=["x", "y", "z"]), "all")
    census = check_pairs(folder)
    assert (census.files, census.total) == (6, 8)
    assert doubts(folder.layout, {"all": census}) == [
        "no label has a pixel of z in the 6 of 8 labels that were looked at"
    ]


def test_the_whole_census_counts_every_pixel(data: Path) -> None:
    folder = open_folder(data, "all")
    labels = np.concatenate([folder.read(index)[1].ravel() for index in range(6)])
    census: Census = check_pairs(folder, every_label=True)
    np.testing.assert_array_equal(
        census.by_class(folder.layout), [(labels == c).sum() for c in range(3)]
    )
    assert census.ignored(folder.layout) == (labels == 255).sum()
