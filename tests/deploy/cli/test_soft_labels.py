"""soft-labels: what a bundle makes of images, for a smaller network; and where it is read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from knet_runtime.bundle.store import Bundle
from knet_train.data.layouts import load_labels_json
from knet_train.data.soft_labels import read_soft_label

Call = Callable[..., Any]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A little more red on the left and more blue on the right; and one in a folder."""
    image = np.full((40, 60, 3), 100, np.uint8)
    image[:, :20, 0] = 102
    image[:, 40:, 2] = 103
    folder = tmp_path / "photos"
    (folder / "ü").mkdir(parents=True)
    Image.fromarray(image).save(folder / "a.png")
    Image.fromarray(image[:, ::-1]).save(folder / "ü" / "b.png")
    return folder


def softmax(*logits: float) -> list[int]:
    powers = np.exp(np.array(logits) - max(logits))
    return [round(value) for value in (255 * powers / powers.sum()).tolist()]


def maps(path: Path, classes: int = 3) -> NDArray[np.uint8]:
    return read_soft_label(path, classes)


def test_probabilities_are_written_as_maps_one_below_the_other(
    call: Call, free_bundle: Bundle, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "soft"
    answer = call("soft-labels", photos, "--out", out, "-b", free_bundle.path)
    assert answer.code == 0, answer.err
    assert "wrote        2 files" in answer.out
    values = maps(out / "a.png")
    assert values.shape == (3, 8, 12)  # half of the input
    assert values[:, 4, 1].tolist() == softmax(2, 0, 0)
    assert values[:, 4, 6].tolist() == softmax(0, 0, 0)
    assert values[:, 4, 10].tolist() == softmax(0, 0, 3)
    assert np.array_equal(maps(out / "ü" / "b.png"), values[..., ::-1])
    assert load_labels_json(out / "labels.json").names == ("red", "green", "blue")


def test_views_are_averaged_where_they_belong(
    call: Call, free_bundle: Bundle, photos: Path, tmp_path: Path
) -> None:
    out, options = tmp_path / "soft", ("--flip", "--scales", "1,2", "--map-size", "16x24")
    answer = call("soft-labels", photos, "--out", out, "-b", free_bundle.path, *options)
    assert answer.code == 0, answer.err
    assert "24×16, 48×32, mirrored too" in answer.out
    values = maps(out / "a.png")
    assert values.shape == (3, 16, 24)
    assert values[:, 8, 2].tolist() == softmax(2, 0, 0)
    assert values[:, 8, 21].tolist() == softmax(0, 0, 3)


def test_classes_are_renamed_merged_and_chosen(
    call: Call, free_bundle: Bundle, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "soft"
    options = ("--map", "red=warm", "--map", "green=cold", "--map", "blue=cold")
    words = ("soft-labels", photos, "-b", free_bundle.path)
    assert call(*words, "--out", out, *options, "--classes", "cold,warm").code == 0
    assert load_labels_json(out / "labels.json").names == ("cold", "warm")
    red, green, blue = softmax(2, 0, 0)
    cold, warm = maps(out / "a.png", 2)[:, 4, 1].tolist()
    assert warm == red
    assert abs(cold - green - blue) <= 1
    # What is mostly of another class is not labelled.
    other = tmp_path / "other"
    answer = call(*words, "--out", other, "--classes", "green,blue")
    assert "left out     red" in answer.out
    values = maps(other / "a.png", 2)
    assert values[:, 4, 1].tolist() == [0, 0]
    assert values[:, 4, 10].tolist() == softmax(0, 0, 3)[1:]
    answer = call(*words, "--out", tmp_path / "no", "--classes", "green,purple")
    assert (answer.code, "--classes names 'purple'" in answer.err) == (2, True)


def test_the_same_command_continues_and_another_is_refused(
    call: Call, free_bundle: Bundle, photos: Path, tmp_path: Path
) -> None:
    words = ("soft-labels", photos, "--out", photos / "soft", "-b", free_bundle.path)
    assert call(*words).code == 0
    first = (photos / "soft" / "a.png").read_bytes()
    (photos / "soft" / "a.png").unlink()
    assert "wrote        1 files into" in (answer := call(*words)).out
    assert "; 1 were there" in answer.out
    assert (photos / "soft" / "a.png").read_bytes() == first
    answer = call(*words, "--flip")
    assert answer.code == 2
    assert "holds soft labels of another teacher, or with other options" in answer.err


def test_what_cannot_be_read_is_named_and_the_rest_is_written(
    call: Call, free_bundle: Bundle, photos: Path, tmp_path: Path
) -> None:
    (photos / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    answer = call("soft-labels", photos, "--out", tmp_path / "soft", "-b", free_bundle.path)
    assert answer.code == 1
    assert "broken.jpg" in answer.out
    assert "1 of 3 images have no soft labels" in answer.err
    assert len(list((tmp_path / "soft").rglob("*.png"))) == 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--scales", "1,1.5"), "--scales 1.5: .*was exported for 360×480 only.*--dynamic"),
        (("--scales", "one"), "--scales is 'one': write numbers"),
        (("--scales", "0"), "--scales takes numbers above 0"),
        (("--map-size", "8"), "--map-size is '8': write HEIGHTxWIDTH"),
        (("--map", "Car"), "--map is 'Car': write OLD=NEW"),
        (("-b", "street-panoptic"), "is for panoptic segmentation"),
    ],
)
def test_options_that_do_not_fit_are_one_line(
    call: Call, photos: Path, tmp_path: Path, options: tuple[str, ...], expected: str
) -> None:
    answer = call("soft-labels", photos, "--out", tmp_path / "soft", *options)
    assert answer.code == 2
    (line,) = answer.err.splitlines()
    assert re.search(expected, line), line
    assert not (tmp_path / "soft").exists()


def test_data_check_reads_soft_labels_too(
    call: Call, free_bundle: Bundle, photos: Path, tmp_path: Path
) -> None:
    data, soft = tmp_path / "data", tmp_path / "soft"
    for split in ("train", "val"):
        shutil.copytree(photos, data / "images" / split)
        for image in photos.rglob("*.png"):
            label = data / "labels" / split / image.relative_to(photos)
            label.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.eye(40, 60, dtype=np.uint8)).save(label)
    (data / "labels.json").write_text(json.dumps(["red", "green", "blue"]))
    words = ("-b", free_bundle.path)
    assert call("soft-labels", data / "images" / "train", "--out", soft, *words).code == 0
    check = ("data", "check", data, "--soft-labels", soft)
    answer = call(*check)
    assert answer.code == 0, answer.err
    assert "soft labels  2 files" in answer.out
    (soft / "a.png").write_bytes(b"")
    (soft / "ü" / "b.png").unlink()
    answer = call(*check, "--json", tmp_path / "report.json")
    assert answer.code == 1
    assert "a.png" in answer.out
    assert "1 of 2 images of split train have no soft labels (train/ü/b)" in answer.out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["soft_labels"] == 1
    answer = call("data", "check", data, "--unlabelled", photos)
    assert (answer.code, "pass --soft-labels too" in answer.err) == (2, True)
