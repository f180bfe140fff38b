"""Logits and class maps; at an image's own ratio against plain PyTorch that resizes, sums and
counts as mmsegmentation does."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from knet_runtime.errors import CheckpointError
from knet_train.config import Config
from knet_train.inference import (
    RATIOS,
    best_classes,
    bilinear,
    input_spec,
    look,
    predict,
    predict_logits,
    window_starts,
)
from knet_train.models.knet import KNet

SCALE = (160, 72)
SIZES = [(50, 83), (97, 64), (36, 150), (200, 131)]


def test_the_input_is_what_the_configuration_says(tiny_config: Callable[..., Config]) -> None:
    spec = input_spec(tiny_config("data.eval_resize=letterbox"))
    assert (spec.height, spec.width, spec.resize) == (64, 96, "letterbox")


def test_logits_are_the_last_stages(tiny_model: KNet) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    logits = predict_logits(tiny_model, image[None])
    assert (logits.shape, logits.dtype) == ((1, 3, 16, 24), np.float32)
    with torch.no_grad():
        expected = tiny_model(torch.from_numpy(image)[None])
    np.testing.assert_array_equal(logits, expected.numpy())


@pytest.mark.parametrize("resize", ["stretch", "letterbox"])
@pytest.mark.parametrize("size", [(64, 96), (37, 81), (200, 120)])
def test_a_class_map_has_the_images_own_size(
    tiny_model: KNet, tiny_config: Callable[..., Config], resize: str, size: tuple[int, int]
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    predicted = predict(tiny_model, image, tiny_config(f"data.eval_resize={resize}"))
    assert predicted.shape == size
    assert predicted.max() < 3


def test_a_fitting_image_is_upsampled_as_torch_would(
    tiny_model: KNet, tiny_config: Callable[..., Config]
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    logits = torch.from_numpy(predict_logits(tiny_model, image[None]))
    full = F.interpolate(logits, (64, 96), mode="bilinear", align_corners=False)[0]
    top = full.topk(2, dim=0).values
    clear = (top[0] - top[1] > 1e-4).numpy()
    predicted = predict(tiny_model, image, tiny_config())
    np.testing.assert_array_equal(predicted[clear], full.argmax(0).numpy()[clear])


class Blobs(nn.Module):
    """Logits of seven classes at stride 4 that depend on where and on what: every class wins
    somewhere, and no two are near one another over large areas."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.register_buffer("mean", torch.zeros(1))
        self.conv = nn.Conv2d(3, 7, 9, stride=4, padding=4)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images.permute(0, 3, 1, 2).float() / 64)


@pytest.fixture
def blobs() -> KNet:
    return Blobs().eval()  # type: ignore[return-value]


def an_image(size: tuple[int, int]) -> NDArray[np.uint8]:
    noise = np.random.default_rng(size[0]).integers(0, 256, (6, 9, 3), np.uint8)
    return np.asarray(cv2.resize(noise, (size[1], size[0])), np.uint8)


def resized(planes: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(planes, size, mode="bilinear", align_corners=False)


def mmseg_logits(
    model: nn.Module,
    image: NDArray[np.uint8],
    scale: tuple[int, int],
    crop: tuple[int, int] | None,
    mirrored: bool,
) -> Tensor:
    """Logits float32 [1, N, H, W] by mmsegmentation's steps, one after the other."""
    height, width = image.shape[:2]
    factor = min(scale[0] / max(height, width), scale[1] / min(height, width))
    size = int(height * factor + 0.5), int(width * factor + 0.5)
    scaled = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    batch = torch.from_numpy(scaled)[None]
    if mirrored:
        batch = batch.flip(2)
    if crop is None:
        logits = resized(model(batch), size)
    else:
        stride = (2 * crop[0] // 3, 2 * crop[1] // 3)
        grids = [
            max(side - window + step - 1, 0) // step + 1
            for side, window, step in zip(size, crop, stride, strict=True)
        ]
        total, count = torch.zeros(1, 7, *size), torch.zeros(1, 1, *size)
        for row in range(grids[0]):
            for column in range(grids[1]):
                bottom = min(row * stride[0] + crop[0], size[0])
                right = min(column * stride[1] + crop[1], size[1])
                top, left = max(bottom - crop[0], 0), max(right - crop[1], 0)
                window = batch[:, top:bottom, left:right]
                total[..., top:bottom, left:right] += resized(model(window), window.shape[1:3])
                count[..., top:bottom, left:right] += 1
        logits = total / count
    logits = resized(logits, (height, width))
    return logits.flip(3) if mirrored else logits


def assert_same_where_clear(found: NDArray[np.integer], scores: Tensor) -> None:
    top = scores[0].topk(2, dim=0).values
    clear = (top[0] - top[1] > 1e-4 * top.abs().max()).numpy()
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(found[clear], scores[0].argmax(0).numpy()[clear])
    assert len(np.unique(found)) > 2


def keep_ratio(tiny_config: Callable[..., Config], *overrides: str) -> Config:
    return tiny_config(
        "data.eval_mode=keep_ratio",
        f"data.eval_scale={list(SCALE)}",
        "data.crop=[40, 56]",
        *overrides,
    )


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_a_whole_image(
    blobs: KNet, tiny_config: Callable[..., Config], size: tuple[int, int]
) -> None:
    image = an_image(size)
    expected = mmseg_logits(blobs, image, SCALE, None, False)
    assert_same_where_clear(predict(blobs, image, keep_ratio(tiny_config)), expected)
    assert_same_where_clear(best_classes([look(blobs, image, SCALE)]), expected)


@pytest.mark.parametrize("crop", [(40, 56), (32, 200), (512, 512)])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_windows(blobs: KNet, size: tuple[int, int], crop: tuple[int, int]) -> None:
    image = an_image(size)
    expected = mmseg_logits(blobs, image, SCALE, crop, False)
    view = look(blobs, image, SCALE, crop)
    logits = (view.rows @ view.logits @ view.columns.T)[None]
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4)
    assert_same_where_clear(best_classes([view]), expected)


@pytest.mark.parametrize("slide", [False, True])
@pytest.mark.parametrize("size", SIZES[:2])
@torch.no_grad()
def test_scales_and_mirror_images(
    blobs: KNet, tiny_config: Callable[..., Config], size: tuple[int, int], slide: bool
) -> None:
    image, config = an_image(size), keep_ratio(tiny_config)
    expected = torch.zeros(())
    for ratio in RATIOS:
        for mirrored in (False, True):
            scale = int(SCALE[0] * ratio), int(SCALE[1] * ratio)
            crop = config.data.crop if slide else None
            expected = expected + mmseg_logits(blobs, image, scale, crop, mirrored).softmax(1) / 12
    found = predict(blobs, image, config, slide=slide, ms_flip=True)
    assert_same_where_clear(found, expected)


def test_a_real_network_sees_sizes_that_are_multiples_of_nothing(
    tiny_model: KNet, tiny_config: Callable[..., Config]
) -> None:
    image, config = an_image((53, 91)), keep_ratio(tiny_config)
    maps = [
        predict(tiny_model, image, config),
        predict(tiny_model, image, config, slide=True, ms_flip=False),
        predict(tiny_model, image, config, slide=True, ms_flip=True),
    ]
    assert {found.shape for found in maps} == {(53, 91)}
    assert {found.dtype for found in maps} == {np.dtype(np.uint8)}


def test_bands_of_rows_join_without_a_seam(blobs: KNet, monkeypatch: pytest.MonkeyPatch) -> None:
    views = [look(blobs, an_image((50, 83)), SCALE, (40, 56), mirrored=m) for m in (False, True)]
    whole = best_classes(views)
    monkeypatch.setattr("knet_train.inference._BAND", 7 * 83 * 3)
    np.testing.assert_array_equal(best_classes(views), whole)


def test_windows_cover_every_pixel_and_stay_inside() -> None:
    assert window_starts(512, 512) == [0]
    assert window_starts(100, 512) == [0]
    assert window_starts(683, 512) == [0, 171]
    assert window_starts(2048, 512) == [0, 341, 682, 1023, 1364, 1536]
    for side in range(1, 200):
        starts = window_starts(side, 24)
        covered = {pixel for start in starts for pixel in range(start, min(start + 24, side))}
        assert covered == set(range(side))


@pytest.mark.parametrize(("source", "target"), [(5, 17), (17, 5), (1, 4), (4, 1), (7, 7)])
def test_the_matrix_is_torchs_resize(source: int, target: int) -> None:
    line = torch.randn(1, 1, source, 1, dtype=torch.float64)
    expected = resized(line, (target, 1))[0, 0]
    torch.testing.assert_close(bilinear(source, target) @ line[0, 0], expected)


def test_broken_weights_are_named(tiny_model: KNet, tiny_config: Callable[..., Config]) -> None:
    with torch.no_grad():
        tiny_model.conv_seg.weight[0, 0] = torch.nan
    for overrides in ((), ("data.eval_mode=keep_ratio",)):
        with pytest.raises(CheckpointError, match="NaN or infinity"):
            predict(tiny_model, an_image((64, 96)), tiny_config(*overrides))
