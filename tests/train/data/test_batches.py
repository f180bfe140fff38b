from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from knet_runtime.labels import LabelMap
from knet_synthetic import CAMVID11
from knet_train.config import Config, DataConfig
from knet_train.data.batches import TrainingSamples
from knet_train.data.dataset import LabelledFolder, open_folder
from knet_train.data.layouts import Layout

Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]


class Numbered(LabelledFolder):
    """Ten images whose pixels all hold ten times their index; counts what was read."""

    def __init__(self, labels: LabelMap, count: int = 10, size: tuple[int, int] = (64, 96)) -> None:
        super().__init__(Layout(Path("made"), "knet-deploy", labels), "all", ())
        object.__setattr__(self, "count", count)
        object.__setattr__(self, "size", size)

    def __len__(self) -> int:
        return int(self.count)  # type: ignore[attr-defined]

    def read(self, index: int) -> Pair:
        size = self.size  # type: ignore[attr-defined]
        return np.full((*size, 3), index * 10, np.uint8), np.zeros(size, np.uint8)


class Encoded(LabelledFolder):
    """One image whose colour is its label: black 0, grey 1, white 2, in blocks."""

    def __init__(self, labels: LabelMap, size: tuple[int, int] = (96, 144)) -> None:
        super().__init__(Layout(Path("made"), "knet-deploy", labels), "all", ())
        rng = np.random.default_rng(5)
        blocks = rng.integers(0, 3, (size[0] // 12, size[1] // 12)).astype(np.uint8)
        object.__setattr__(self, "label", np.kron(blocks, np.ones((12, 12), np.uint8)))

    def __len__(self) -> int:
        return 1

    def read(self, index: int) -> Pair:
        label = self.label  # type: ignore[attr-defined]
        return np.repeat((label * 127)[..., None], 3, -1), label


@pytest.fixture
def data(tiny_config: Callable[..., Config]) -> DataConfig:
    return tiny_config().data


@pytest.fixture
def folder(make_folder: Callable[..., Path]) -> LabelledFolder:
    return open_folder(make_folder(), "all")


def equal(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_samples_have_the_crops_shape_and_known_labels(
    folder: LabelledFolder, data: DataConfig
) -> None:
    samples = TrainingSamples(folder, data, 0, 20)
    assert len(samples) == 20
    for index in range(20):
        image, label = samples[index]
        assert type(image) is torch.Tensor
        assert type(label) is torch.Tensor
        assert (image.shape, image.dtype) == ((64, 64, 3), torch.uint8)
        assert (label.shape, label.dtype) == ((64, 64), torch.uint8)
        assert set(label.unique().tolist()) <= {0, 1, 2, 255}


def test_a_sample_is_a_function_of_seed_and_index(folder: LabelledFolder, data: DataConfig) -> None:
    forward = [TrainingSamples(folder, data, 3, 12)[i] for i in range(12)]
    torch.manual_seed(99)
    np.random.default_rng(1)
    again = TrainingSamples(folder, data, 3, 12)
    for index in reversed(range(12)):
        torch.rand(index)
        assert equal(again[index], forward[index])
    other = TrainingSamples(folder, data, 4, 12)
    assert not any(equal(other[i], forward[i]) for i in range(12))


def test_the_global_generator_is_left_alone(folder: LabelledFolder, data: DataConfig) -> None:
    samples = TrainingSamples(folder, data, 0, 4)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    _ = samples[1]
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.slow
def test_workers_draw_what_the_main_process_draws(folder: LabelledFolder, data: DataConfig) -> None:
    samples = TrainingSamples(folder, data, 0, 6)
    loader = DataLoader(samples, 2, num_workers=1, multiprocessing_context="spawn")
    drawn = torch.cat([images for images, _ in loader])
    assert torch.equal(drawn, torch.stack([samples[i][0] for i in range(6)]))


def test_every_image_is_used_once_a_turn_in_a_new_order(
    tiny_labels: LabelMap, data: DataConfig
) -> None:
    plain = msgspec.structs.replace(data, photometric=0.0, scale=(1.0, 1.0), aspect=1.0)
    samples = TrainingSamples(Numbered(tiny_labels), plain, 0, 30)
    seen = [int(samples[index][0].max()) // 10 for index in range(30)]
    turns = [seen[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(turn) == list(range(10)) for turn in turns)
    assert turns[0] != turns[1] != turns[2]


def test_colours_are_jittered_but_never_swapped(tiny_labels: LabelMap, data: DataConfig) -> None:
    class Blue(Numbered):
        def read(self, index: int) -> Pair:
            image, label = super().read(index)
            image[:] = (40, 80, 200)
            return image, label

    always = msgspec.structs.replace(data, photometric=1.0, scale=(1.5, 1.5), synthetic_share=0.0)
    samples = TrainingSamples(Blue(tiny_labels), always, 0, 40)
    colours = torch.stack([samples[index][0].flatten(0, 1).float().mean(0) for index in range(40)])
    assert (colours.argmax(1) == 2).all()
    assert (colours.argmin(1) == 0).all()
    assert colours.std(0).min() > 5


@pytest.mark.parametrize("share", [0.0, 0.125, 0.3, 1.0])
def test_the_synthetic_share_is_exact_and_does_not_skip_images(
    share: float, data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class White:
        def frame(self, index: int) -> Pair:
            return np.full((64, 96, 3), 255, np.uint8), np.zeros((64, 96), np.uint8)

    monkeypatch.setattr("knet_train.data.batches._street", lambda seed, size: White())
    plain = msgspec.structs.replace(
        data, photometric=0.0, scale=(1.0, 1.0), aspect=1.0, synthetic_share=share
    )
    samples = TrainingSamples(Numbered(CAMVID11), plain, 0, 40)
    seen = [int(samples[index][0].min()) for index in range(40)]
    assert seen.count(255) == int(40 * share)
    real = [value for value in seen if value != 255]
    assert sorted(real[:10]) == sorted({*real[:10]})


def test_real_streets_mix_in(make_folder: Callable[..., Path], data: DataConfig) -> None:
    root = make_folder(classes=CAMVID11.names)
    folder = open_folder(root, "all")
    labels = replace(folder, layout=replace(folder.layout, labels=CAMVID11))
    mixed = msgspec.structs.replace(data, synthetic_share=1.0)
    image, label = TrainingSamples(labels, mixed, 0, 2)[1]
    assert image.shape == (64, 64, 3)
    assert len(label.unique()) > 2
    assert int(label.max()) <= 11


def test_image_and_label_stay_aligned(tiny_labels: LabelMap, data: DataConfig) -> None:
    plain = msgspec.structs.replace(data, photometric=0.0, max_class_share=1.0)
    samples = TrainingSamples(Encoded(tiny_labels), plain, 0, 40)
    right = total = 0
    for index in range(40):
        image, label = samples[index]
        inside = label != 255
        decoded = torch.round(image[..., 0].float() / 127)
        right += int((decoded == label)[inside].sum())
        total += int(inside.sum())
        assert (image[~inside] == 128).all()
    # Only the blurred pixels at a block's edge may round to another class.
    assert right / total > 0.93


def test_flip_is_a_mirror_of_both(tiny_labels: LabelMap, data: DataConfig) -> None:
    still = msgspec.structs.replace(data, photometric=0.0, flip=0.0)
    mirrored = msgspec.structs.replace(still, flip=1.0)
    for index in range(5):
        image, label = TrainingSamples(Encoded(tiny_labels), still, 0, 5)[index]
        image_m, label_m = TrainingSamples(Encoded(tiny_labels), mirrored, 0, 5)[index]
        assert torch.equal(image.flip(1), image_m)
        assert torch.equal(label.flip(-1), label_m)


def test_without_augmentation_the_image_comes_through(
    folder: LabelledFolder, data: DataConfig
) -> None:
    plain = msgspec.structs.replace(
        data, photometric=0.0, flip=0.0, scale=(1.0, 1.0), aspect=1.0, crop=(64, 96)
    )
    samples = TrainingSamples(folder, plain, 0, 6)
    images = {folder.read(index)[0].tobytes() for index in range(6)}
    drawn = {samples[index][0].numpy().tobytes() for index in range(6)}
    assert drawn == images


@pytest.mark.parametrize(
    ("size", "expected"), [((60, 80), (64, 85)), ((60, 400), (38, 256)), ((400, 60), (256, 38))]
)
def test_scale_one_is_the_published_size_of_evaluation(
    tiny_labels: LabelMap, data: DataConfig, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    """mmsegmentation's keep-ratio resize: inside (longest, shortest side)."""
    plain = msgspec.structs.replace(
        data,
        eval_mode="keep_ratio",
        eval_scale=(256, 64),
        crop=(300, 300),
        scale=(1.0, 1.0),
        aspect=1.0,
    )
    _, label = TrainingSamples(Numbered(tiny_labels, size=size), plain, 0, 1)[0]
    inside = label != 255  # around it is what fills the crop
    assert (int(inside.any(1).sum()), int(inside.any(0).sum())) == expected


def test_no_crop_is_mostly_one_class_where_another_is_to_be_had(
    tiny_labels: LabelMap, data: DataConfig
) -> None:
    class Edge(Encoded):
        """Ten crops wide, with one edge between two classes."""

        def read(self, index: int) -> Pair:
            label = np.zeros((64, 640), np.uint8)
            label[:, :300] = 1
            return np.repeat((label * 127)[..., None], 3, -1), label

    config = msgspec.structs.replace(
        data, eval_size=(64, 640), scale=(1.0, 1.0), aspect=1.0, photometric=0.0
    )
    capped = TrainingSamples(Edge(tiny_labels), config, 0, 60)
    ones = [float(capped[index][1].float().mean()) for index in range(60)]
    # One draw in 17 has no more than three quarters of a class: ten tries find it in 44 of 100.
    assert sum(0.25 < share < 0.75 for share in ones) > 15


@pytest.mark.parametrize("size", [(8, 12), (1, 1), (200, 20)])
def test_images_of_any_size_fill_the_crop(
    tiny_labels: LabelMap, data: DataConfig, size: tuple[int, int]
) -> None:
    small = msgspec.structs.replace(data, scale=(0.1, 0.5))
    samples = TrainingSamples(Numbered(tiny_labels, size=size), small, 0, 10)
    for index in range(10):
        image, label = samples[index]
        assert image.shape == (64, 64, 3)
        assert set(label.unique().tolist()) == {0, 255}
