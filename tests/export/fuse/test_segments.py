"""The fused K-Nets for segments are the function that was trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_segments import SIZE, TASKS, labels_of, segment_config, segment_knet
from torch import Tensor, nn

from knet_export.fuse.kernels import gather_hard
from knet_export.fuse.layers import PlainGroupNorm
from knet_export.fuse.precision import to_precision
from knet_export.fuse.segments import fuse_segments
from knet_runtime.bundle.manifest import Precision
from knet_runtime.types import Task
from knet_synthetic import Street
from knet_train.models.build import build_segment_model


def textured(count: int) -> Tensor:
    return torch.from_numpy(np.stack([Street(50 + n, SIZE).frame(0)[0] for n in range(count)]))


def difference(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_the_fused_model_is_the_trained_function(task: Task, precision: Precision) -> None:
    """Also with the sums rescaled as fp16 needs them, in float64 here."""
    model = segment_knet(task).double()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    expected = model(textured(2))
    fused = fuse_segments(model, SIZE, precision)
    got = fused(textured(2))
    assert difference(got.classes, expected.classes) <= 1e-9
    assert difference(got.masks, expected.masks) <= 1e-9
    assert not any(isinstance(m, nn.BatchNorm2d | nn.GroupNorm) for m in fused.modules())
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in before.items())


@torch.no_grad()
def test_swin_is_fused_too() -> None:
    config = segment_config("panoptic", "model.backbone=swin_tiny_patch4_window7_224")
    torch.manual_seed(0)
    model = build_segment_model(config.model, labels_of("panoptic")).eval().double()
    expected, got = model(textured(1)), fuse_segments(model, SIZE)(textured(1))
    assert difference(got.classes, expected.classes) <= 1e-9
    assert difference(got.masks, expected.masks) <= 1e-9


def test_what_only_training_needs_is_not_in_it() -> None:
    """The classifier's rows for things, and the classes of all stages but the last."""
    for task, rows in (("instance", 12), ("panoptic", 15)):
        fused = fuse_segments(segment_knet(task), SIZE)
        names = [name for name, _ in fused.named_parameters()]
        assert sum(name.startswith("fc_class.") for name in names) == 2
        assert not any("conv_seg" in name or ".fc_class." in name for name in names)
        first = dict(fused.first.named_parameters())
        assert sum(len(first[name]) for name in first if name != "offset") == rows


@torch.no_grad()
def test_group_norm_as_means_and_a_product_is_group_norm() -> None:
    norm = nn.GroupNorm(4, 12).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = 3 + 5 * torch.randn(2, 12, 7, 9, dtype=torch.float64)
    plain = PlainGroupNorm(norm)
    assert difference(plain(x), norm(x)) <= 1e-12
    half = plain.float()((100 * x).half())  # sums of squares are beyond fp16, the result is not
    assert half.dtype == torch.float16
    assert difference(half.double(), norm(100 * x)) <= 2e-3


def test_sums_over_a_whole_image_fit_into_fp16() -> None:
    cells = 100 * 168
    pixels = torch.full((1, cells, 2), 60.0).half()
    masks = torch.ones(1, 1, cells).half()
    assert float(60.0 * cells) > torch.finfo(torch.float16).max
    sums, amounts = gather_hard(pixels, masks, 512.0, torch.float32)
    np.testing.assert_allclose(512 * sums[0, 0].numpy(), 60.0 * cells, rtol=1e-3)
    assert float(512 * amounts) == cells


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_in_half_precision_most_pixels_stay_where_they_were(task: Task) -> None:
    model = segment_knet(task)
    fused = to_precision(fuse_segments(model, SIZE, "fp16"), "fp16")
    half = {name for name, weight in fused.named_parameters() if weight.dtype == torch.float16}
    assert {"head.laterals.0.weight", "first.things"} <= half
    assert not {name for name in half if name.startswith(("stages.", "fc_class."))}
    got, expected = fused(textured(4)), model(textured(4))
    assert got.classes.dtype == got.masks.dtype == torch.float32
    sure = expected.masks.abs() > 1
    same = (got.masks > 0) == (expected.masks > 0)
    assert float(same.float().mean()) > 0.99
    assert float(same[sure].float().mean()) > 0.998
    assert (
        float((got.classes - expected.classes).abs().mean() / expected.classes.abs().max()) < 0.01
    )
