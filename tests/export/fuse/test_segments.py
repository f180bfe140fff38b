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
from knet_export.verify.measure import segment_tolerance
from knet_runtime.bundle.manifest import InputSpec, Precision, SizeRange
from knet_runtime.errors import ConfigError
from knet_runtime.types import Task
from knet_synthetic import Street
from knet_train.models.build import build_segment_model

SPEC = InputSpec("image", *SIZE, multiple=32)
FREE = InputSpec("image", *SIZE, multiple=32, sizes=SizeRange((64, 64), (128, 128), 32))


def textured(count: int, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.from_numpy(np.stack([Street(50 + n, size).frame(0)[0] for n in range(count)]))


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
    fused = fuse_segments(model, SPEC, precision)
    got = fused(textured(2))
    assert difference(got.classes, expected.classes) <= 1e-9
    assert difference(got.masks, expected.masks) <= 1e-9
    assert not any(isinstance(m, nn.BatchNorm2d | nn.GroupNorm) for m in fused.modules())
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in before.items())


@torch.no_grad()
def test_of_free_sizes_it_is_the_same_function() -> None:
    model = segment_knet("panoptic").double()
    fused = fuse_segments(model, FREE, "fp16")
    assert fused.scale == 4.0  # of the largest size
    for size in (SIZE, (128, 64)):
        expected, got = model(textured(1, size)), fused(textured(1, size))
        assert difference(got.classes, expected.classes) <= 1e-9
        assert difference(got.masks, expected.masks) <= 1e-9


@torch.no_grad()
def test_swin_is_fused_too_but_of_one_size() -> None:
    config = segment_config("panoptic", "model.backbone=swin_tiny_patch4_window7_224")
    torch.manual_seed(0)
    model = build_segment_model(config.model, labels_of("panoptic")).eval().double()
    expected, got = model(textured(1)), fuse_segments(model, SPEC)(textured(1))
    assert difference(got.classes, expected.classes) <= 1e-9
    assert difference(got.masks, expected.masks) <= 1e-9
    with pytest.raises(ConfigError, match="Swin"):
        fuse_segments(model, FREE)


def test_what_only_training_needs_is_not_in_it() -> None:
    """The classifier's rows for things, and the classes of all stages but the last."""
    for task, rows in (("instance", 12), ("panoptic", 15)):
        fused = fuse_segments(segment_knet(task), SPEC)
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


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_in_half_precision_most_pixels_stay_where_they_were(
    task: Task, precision: Precision
) -> None:
    model = segment_knet(task)
    fused = to_precision(fuse_segments(model, SPEC, precision), precision)
    half = {name for name, weight in fused.named_parameters() if weight.dtype != torch.float32}
    assert {"head.laterals.0.weight", "first.things"} <= half
    assert not {name for name in half if name.startswith(("stages.", "fc_class."))}
    norms = [module for module in fused.modules() if isinstance(module, PlainGroupNorm)]
    assert {norm.weight.dtype for norm in norms} == {torch.float32}
    got, expected = fused(textured(4)), model(textured(4))
    assert got.classes.dtype == got.masks.dtype == torch.float32
    limits = segment_tolerance(precision)
    same = (got.masks > 0) == (expected.masks > 0)
    assert float(same.float().mean()) > limits.agreement
    assert float(same[expected.masks.abs() > 1].float().mean()) > limits.agreement_confident
    off = (got.classes - expected.classes).abs().mean() / expected.classes.abs().max()
    assert 0 < float(off) < limits.mean_logit_diff
