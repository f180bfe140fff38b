from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from knet_runtime.errors import DataError
from knet_train.data.dataset import LabelledFolder, open_folder
from knet_train.data.drives import divide, drive, sequence


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0006R0_f00930", "0006R0"),
        ("0001TP_006690", "0001TP"),
        ("Seq05VD_f05100", "Seq05VD"),
        ("munich_000012_000019", "munich_000012"),
        ("brief12", "brief"),  # an f that belongs to a word stays
        ("strasse ä 7", "strasse ä"),
        ("front_0001_png.rf.5b7d", "front"),
        ("clip-frame-12", "clip"),
        ("no number", "no number"),
    ],
)
def test_a_drive_is_the_name_without_the_frames_number(name: str, expected: str) -> None:
    assert sequence(name) == expected
    assert drive(Path("images") / f"{name}.png") == expected


def test_images_whose_names_are_numbers_are_of_their_folder() -> None:
    assert drive(Path("images/north/000017.png")) == "north"


@pytest.fixture
def folder(make_folder: Callable[..., Path]) -> LabelledFolder:
    return open_folder(make_folder(("a_f01", "b_f07", "a_f02", "c_1")), "all")


def test_the_images_of_a_drive_are_taken_out(folder: LabelledFolder) -> None:
    kept, left = divide(folder, ("a",))
    assert [sample.name for sample in kept.samples] == ["b_f07", "c_1"]
    assert [sample.name for sample in left.samples] == ["a_f01", "a_f02"]


def test_an_unknown_drive_is_refused_with_those_that_there_are(folder: LabelledFolder) -> None:
    with pytest.raises(DataError, match=r"names 'd'.* a \(2 images\), b \(1 images\), c \(1 im"):
        divide(folder, ("a", "d"))


def test_not_every_drive_can_be_left_out(folder: LabelledFolder) -> None:
    with pytest.raises(DataError, match="nothing is left to learn from"):
        divide(folder, ("a", "b", "c"))
