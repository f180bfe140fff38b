"""Every rewrite of the dynamic kernels against what it replaces, on random shapes and weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knet_export.fuse.kernels import (
    FoldedGather,
    FoldedMaskKernels,
    apply_kernels,
    constant_inputs,
    gather,
    sum_scale,
)
from knet_export.fuse.model import FusedStage
from knet_train.models.knet import KernelUpdateStage, KernelUpdator

Precision = tuple[torch.dtype, float]  # and the largest difference, as a share of the largest value

PRECISIONS: list[Precision] = [(torch.float64, 1e-9), (torch.float32, 1e-4)]
# batch, kernels, channels, parts that a kernel is updated in, height, width
SHAPES = [(2, 5, 16, 1, 3, 7), (1, 11, 32, 2, 8, 6), (3, 1, 24, 3, 5, 5), (2, 19, 64, 2, 17, 9)]


@pytest.fixture(params=PRECISIONS, ids=["float64", "float32"])
def precision(request: pytest.FixtureRequest) -> Precision:
    torch.manual_seed(5)
    chosen: Precision = request.param
    return chosen


Shape = tuple[int, int, int, int, int, int]


def assert_same(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    assert float((got - expected).abs().max() / expected.abs().max()) <= tolerance


def random_weights(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Norms and biases too: their initial ones and zeros would hide a fault."""
    for weight in module.parameters():
        nn.init.normal_(weight, std=0.5 if weight.ndim == 1 else weight.shape[1] ** -0.5)
    return module.to(dtype).eval()


def a_stage(shape: Shape, dtype: torch.dtype) -> KernelUpdateStage:
    _, _, channels, parts, _, _ = shape
    stage = KernelUpdateStage(channels, channels // parts, 2, 2 * channels)
    random_weights(stage, dtype)
    return stage


@pytest.mark.parametrize("shape", SHAPES)
def test_one_batched_product_is_a_convolution_per_image(shape: Shape, precision: Precision) -> None:
    (batch, count, channels, _, height, width), (dtype, tolerance) = shape, precision
    features = torch.randn(batch, channels, height, width, dtype=dtype)
    kernels = torch.randn(batch, count, channels, dtype=dtype)
    offset = torch.randn(batch, count, dtype=dtype)
    each = [
        F.conv2d(image[None], kernel[:, :, None, None], bias)
        for image, kernel, bias in zip(features, kernels, offset, strict=True)
    ]
    masks = apply_kernels(features.flatten(2).transpose(1, 2), kernels, offset)
    assert_same(masks, torch.cat(each).flatten(2).transpose(1, 2), tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_the_transform_before_the_gather_moves_into_the_next_layer(
    shape: Shape, precision: Precision
) -> None:
    (batch, count, channels, parts, height, width), (dtype, tolerance) = shape, precision
    stage = a_stage(shape, dtype)
    features = torch.randn(batch, channels, height, width, dtype=dtype)
    masks = 3 * torch.randn(batch, count, height, width, dtype=dtype)
    transformed = stage.feat_transform(features).flatten(2)
    group = torch.softmax(masks.flatten(2), 1) @ transformed.transpose(1, 2)
    layer = stage.updator.dynamic_layer
    expected = layer(group.reshape(batch, count * parts, channels // parts))
    for scale in (1.0, 32.0):
        folded = FoldedGather(stage.feat_transform, layer, scale)
        sums, amounts = gather(features.flatten(2), masks.flatten(2).mT, scale, dtype)
        assert_same(folded(sums, amounts), expected, tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_the_transform_before_the_masks_moves_into_the_last_layer_of_their_kernels(
    shape: Shape, precision: Precision
) -> None:
    (batch, count, channels, _, height, width), (dtype, tolerance) = shape, precision
    stage = a_stage(shape, dtype)
    features = torch.randn(batch, channels, height, width, dtype=dtype)
    branch = torch.randn(batch, count, channels, dtype=dtype)
    expected = stage.fc_mask(branch) @ stage.feat_transform(features).flatten(2)
    kernels, offset = FoldedMaskKernels(stage.feat_transform, stage.fc_mask)(branch)
    masks = apply_kernels(features.flatten(2).mT, kernels, offset)
    assert_same(masks.mT, expected, tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_what_reads_only_the_initial_kernels_is_a_constant(
    shape: Shape, precision: Precision
) -> None:
    (_, count, channels, parts, _, _), (dtype, tolerance) = shape, precision
    updator = random_weights(KernelUpdator(channels // parts), dtype)
    assert isinstance(updator, KernelUpdator)
    kernels = torch.randn(count, channels, dtype=dtype)
    halves = updator.input_layer(kernels.reshape(1, count * parts, -1)).chunk(2, -1)
    gate, candidate = constant_inputs(updator, kernels)
    assert_same(gate, halves[0], tolerance)
    assert_same(candidate, updator.input_norm_out(halves[1]), tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_and_features_with_pixels_first_give_the_same_sums(
    shape: Shape, precision: Precision
) -> None:
    (batch, count, channels, _, height, width), (dtype, tolerance) = shape, precision
    features = torch.randn(batch, channels, height * width, dtype=dtype)
    masks = torch.randn(batch, count, height * width, dtype=dtype)
    assignment = torch.softmax(masks, 1)
    sums, amounts = gather(features, masks.mT, 1, dtype)
    assert_same(sums, torch.einsum("bnp,bcp->bnc", assignment, features), tolerance)
    assert_same(amounts, assignment.sum(2), tolerance)


def test_a_rescaled_sum_fits_fp16_where_a_plain_one_does_not_and_loses_nothing() -> None:
    pixels = 128 * 256
    scale = sum_scale(pixels)
    assert scale == 2 ** round(torch.tensor(scale).log2().item()), "a power of two rounds nothing"
    assert sum_scale(1) == 1
    features = torch.full((1, 8, pixels), 20.0)
    masks = torch.zeros(1, pixels, 2)
    masks[..., 0] = 5  # nearly all pixels are of one kernel
    half = (features.half(), masks.half())
    plain, _ = gather(*half, 1, torch.float32)
    scaled, amounts = gather(*half, scale, torch.float32)
    exact, exact_amounts = gather(features.double(), masks.double(), 1, torch.float64)
    assert torch.isinf(plain).any()
    assert_same(scaled.double() * scale, exact, 1e-3)
    assert_same(amounts.double() * scale, exact_amounts, 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("first", [True, False])
@torch.no_grad()
def test_a_stage_without_its_transform_gives_the_same_kernels_and_masks(
    shape: Shape, first: bool, precision: Precision
) -> None:
    (batch, count, channels, _, height, width), (dtype, tolerance) = shape, precision
    stage = a_stage(shape, dtype)
    features = torch.randn(batch, channels, height, width, dtype=dtype)
    kernels = torch.randn(1 if first else batch, count, channels, dtype=dtype)
    masks = torch.randn(batch, count, height, width, dtype=dtype)
    expected = stage(features, kernels.expand(batch, -1, -1), masks)
    scale = sum_scale(1000 * height * width)
    deployed = FusedStage(stage, scale, kernels[0] if first else None)
    sums, amounts = gather(features.flatten(2), masks.flatten(2).mT, scale, dtype)
    new, mask_kernels, offset = deployed(sums, amounts, None if first else kernels)
    assert_same(new, expected[0], tolerance)
    got = apply_kernels(features.flatten(2).mT, mask_kernels, offset)
    assert_same(got.mT, expected[1].flatten(2), tolerance)
