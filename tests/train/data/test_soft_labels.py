from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from knet_runtime.errors import DataError
from knet_runtime.labels import LabelMap
from knet_train.config import Config, DataConfig
from knet_train.data.batches import SOFT_STRIDE, TrainingSamples
from knet_train.data.dataset import LabelledFolder, open_folder
from knet_train.data.layouts import Layout
from knet_train.data.soft_labels import (
    SoftLabels,
    Unlabelled,
    check_soft_labels,
    find_soft_labels,
    open_soft_labels,
    read_soft_label,
)


def write(path: Path, values: NDArray[np.uint8]) -> Path:
    """[C, h, w]"""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.reshape(-1, values.shape[2])).save(path)
    return path


def certain(label: NDArray[np.uint8], classes: int = 3) -> NDArray[np.uint8]:
    return (255 * (label == np.arange(classes)[:, None, None])).astype(np.uint8)


@pytest.fixture
def data(tiny_config: Callable[..., Config]) -> DataConfig:
    return tiny_config().data


@pytest.fixture
def folder(make_folder: Callable[..., Path]) -> LabelledFolder:
    return open_folder(make_folder(("a_1", "a_2", "b_1")), "all")


@pytest.fixture
def soft(folder: LabelledFolder, tmp_path: Path) -> Path:
    for sample in folder.samples:
        write(tmp_path / "soft" / f"{sample.name}.png", np.full((3, 4, 6), 85, np.uint8))
    return tmp_path / "soft"


@pytest.fixture
def street(tmp_path: Path) -> Path:
    """Images without labels beside their soft labels."""
    for name in ("x_1", "x_2", "b_2"):
        write(tmp_path / "street" / f"{name}.png", np.full((3, 5, 5), 85, np.uint8))
        Image.new("RGB", (60, 40), (9, 9, 9)).save(tmp_path / "street" / f"{name}.jpg")
    return tmp_path / "street"


class Blocks(LabelledFolder):
    """One image whose colour is its label: black 0, grey 1, white 2, in large blocks."""

    def __init__(self, labels: LabelMap, size: tuple[int, int] = (96, 144)) -> None:
        super().__init__(Layout(Path("made"), "knet-deploy", labels), "all", ())
        rng = np.random.default_rng(5)
        blocks = rng.integers(0, 3, (size[0] // 24, size[1] // 24)).astype(np.uint8)
        object.__setattr__(self, "label", np.kron(blocks, np.ones((24, 24), np.uint8)))

    def __len__(self) -> int:
        return 1

    def read(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        label = self.label  # type: ignore[attr-defined]
        return np.repeat((label * 127)[..., None], 3, -1), label


@pytest.mark.parametrize("step", [1, 2, 3])
def test_soft_labels_stay_on_their_pixels(
    step: int, tiny_labels: LabelMap, data: DataConfig, tmp_path: Path
) -> None:
    folder = Blocks(tiny_labels)
    label = folder.label  # type: ignore[attr-defined]
    path = write(tmp_path / "one.png", certain(label[step // 2 :: step, step // 2 :: step]))
    soft = SoftLabels(3, (path,))
    config = msgspec.structs.replace(
        data, scale=(0.5, 2.0), aspect=1.5, flip=0.5, photometric=0.5, max_class_share=1.0
    )
    samples = TrainingSamples(folder, config, 0, 40, soft)
    outside = 0
    for index in range(40):
        _, hard, values = samples[index]
        assert (values.dtype, values.shape) == (torch.uint8, (3, 32, 32))
        # Four pixels of the label lie in one of the soft labels: compared where they are one class.
        cells = hard.reshape(32, SOFT_STRIDE, 32, SOFT_STRIDE).transpose(1, 2).flatten(2)
        alike = (cells == cells[..., :1]).all(-1)
        known = cells[..., 0] != 255
        assert (values.sum(0)[alike & ~known] == 0).all()
        assert (values.sum(0)[alike & known] > 0).all()
        outside += int((~known).sum())
        # Nothing is off by as much as two pixels: away from edges all agree.
        inner = -torch.nn.functional.max_pool2d(
            -torch.nn.functional.one_hot(
                torch.where(alike & known, cells[..., 0], 3).long(), 4
            ).permute(2, 0, 1).float(),
            5, 1, 2,
        )  # fmt: skip
        for one in range(3):
            assert (values.argmax(0)[inner[one] > 0] == one).all()
    assert outside > 0


def test_without_soft_labels_samples_are_what_they_were(
    folder: LabelledFolder, data: DataConfig, soft: Path
) -> None:
    plain = TrainingSamples(folder, data, 0, 6)
    with_soft = TrainingSamples(folder, data, 0, 6, open_soft_labels(folder, [soft]))
    for index in range(6):
        image, label = plain[index]
        same_image, same_label, values = with_soft[index]
        assert torch.equal(image, same_image)
        assert torch.equal(label, same_label)
        assert values.shape == (3, 32, 32)


def test_unlabelled_images_are_a_share_of_the_samples(
    folder: LabelledFolder, data: DataConfig, street: Path
) -> None:
    config = msgspec.structs.replace(data, unlabelled_share=0.25)
    found = open_soft_labels(folder, [street], [street])
    samples = TrainingSamples(folder, config, 0, 24, found)
    sources = [samples.source(index) for index in range(24)]
    assert sum(isinstance(one, int) and one >= 3 for one in sources) == 6
    for index, source in enumerate(sources):
        _, label, values = samples[index]
        learnt_softly = isinstance(source, int) and source >= 3
        assert bool((label == 255).all()) == learnt_softly
        assert bool((values > 0).any()) == learnt_softly
    again = TrainingSamples(folder, config, 0, 24, found)
    assert all(torch.equal(a, b) for a, b in zip(samples[7], again[7], strict=True))


def test_files_are_found_by_path_or_stem(folder: LabelledFolder, soft: Path, street: Path) -> None:
    found = open_soft_labels(folder, [soft, street], [street], leave_out=("b",))
    assert [path and path.name for path in found.labelled] == ["a_1.png", "a_2.png", "b_1.png"]
    assert found.unlabelled == tuple(
        Unlabelled(street / f"{name}.jpg", street / f"{name}.png") for name in ("x_1", "x_2")
    )
    (soft / "deep").mkdir()
    (soft / "a_1.png").rename(soft / "deep" / "a_1.png")
    assert open_soft_labels(folder, [soft]).labelled[0] == soft / "deep" / "a_1.png"


def test_what_lacks_soft_labels_is_said(folder: LabelledFolder, soft: Path, street: Path) -> None:
    (soft / "a_2.png").unlink()
    Image.new("RGB", (8, 8)).save(street / "y_1.jpg")
    found = open_soft_labels(folder, [soft, street], [street])
    assert found.notices[0].startswith("1 of 4 images of")
    assert "(y_1): they are left out" in found.notices[0]
    assert "1 of 3 images of split all have no soft labels (a_2)" in found.notices[1]
    with pytest.raises(DataError, match="has soft labels of no image"):
        open_soft_labels(folder, [street])
    for path in street.glob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match="has no image with soft labels"):
        open_soft_labels(folder, [soft], [street])


def test_two_files_of_one_image_and_two_images_of_one_file_are_refused(
    folder: LabelledFolder, soft: Path, tmp_path: Path
) -> None:
    write(tmp_path / "more" / "a_1.png", np.full((3, 4, 6), 85, np.uint8))
    with pytest.raises(DataError, match=r"a_1\.png has soft labels in .*keep one"):
        open_soft_labels(folder, [soft, tmp_path / "more"])
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a_1.jpg")
    with pytest.raises(DataError, match=r"may be of .*a_1\.jpg and of .*a_1\.png"):
        open_soft_labels(folder, [soft], [tmp_path / "images"])


def test_every_fault_of_a_file_is_one_line(folder: LabelledFolder, soft: Path) -> None:
    Image.new("L", (6, 10)).save(soft / "a_1.png")
    Image.new("RGB", (6, 12)).save(soft / "a_2.png")
    empty = np.full((3, 4, 6), 85, np.uint8)
    empty[:, 1, 2:4] = 0
    write(soft / "b_1.png", empty)
    checked = check_soft_labels(find_soft_labels(folder, [soft]))
    problems = checked.problems
    assert "a_1.png has 10 rows, which are not 3 maps" in problems[0]
    assert "a_2.png is no 8-bit grey PNG (mode RGB)" in problems[1]
    assert len(problems) == 2
    assert "1 soft labels have pixels without a probability, 8.3 % at" in checked.notices[0]
    write(soft / "b_1.png", np.zeros((3, 4, 6), np.uint8))
    problems = check_soft_labels(find_soft_labels(folder, [soft])).problems
    assert "b_1.png holds nothing but 0" in problems[2]
    (soft / "a_1.png").write_bytes((soft / "b_1.png").read_bytes()[:40])
    assert "cannot read" in check_soft_labels(find_soft_labels(folder, [soft])).problems[0]
    with pytest.raises(DataError, match="cannot read"):
        open_soft_labels(folder, [soft])


def test_soft_labels_of_other_classes_are_refused(folder: LabelledFolder, soft: Path) -> None:
    (soft / "labels.json").write_text(json.dumps(["road", "car", "sky"]))
    with pytest.raises(DataError, match="has the classes road, car, sky, and"):
        open_soft_labels(folder, [soft])
    (soft / "labels.json").write_text(json.dumps(list(folder.labels.names)))
    assert None not in open_soft_labels(folder, [soft]).labelled


def test_a_folder_that_is_not_there_is_refused(folder: LabelledFolder, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder: --soft-labels wants one"):
        open_soft_labels(folder, [tmp_path / "nowhere"])


def test_maps_lie_one_below_the_other(tmp_path: Path) -> None:
    values = np.arange(3 * 2 * 4, dtype=np.uint8).reshape(3, 2, 4)
    assert np.array_equal(read_soft_label(write(tmp_path / "a.png", values), 3), values)
