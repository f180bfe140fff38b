"""The fused model is the function that was trained, and leaves the trained model as it was."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knet_export.fuse.layers import fold_batch_norms, pooled
from knet_export.fuse.model import fuse
from knet_export.fuse.swin import StaticSwin
from knet_runtime.errors import ConfigError
from knet_train.config import load_config
from knet_train.models.backbones import SwinBackbone
from knet_train.models.build import build_model
from knet_train.models.knet import KNet

SMALL = ("model.channels=32", "model.update_channels=16", "model.ffn_channels=48")
SIZE = (40, 72)  # levels of 10×18 … 2×3: no multiple of a window, and pyramid cells overlap


def a_knet(preset: str, *, dtype: torch.dtype = torch.float64) -> KNet:
    """A small one whose norms do something."""
    torch.manual_seed(2)
    model = build_model(load_config(preset, SMALL).model, 7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval().to(dtype)


def difference(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    "preset",
    ["knet-edge", "r50-fcn", "r50-pspnet", "r50-deeplabv3", "r50-upernet", "swin-t-upernet"],
)
@torch.no_grad()
def test_the_fused_model_is_the_trained_function(preset: str) -> None:
    model = a_knet(preset)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    images = torch.randint(0, 256, (2, *SIZE, 3), dtype=torch.uint8)
    expected = model(images)
    fused = fuse(model, SIZE, pixels=SIZE[0] * SIZE[1])
    assert difference(fused(images), expected) <= 1e-9
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert difference(fused.float()(images), expected) <= 1e-4
    after = model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert torch.equal(model(images), expected)


@torch.no_grad()
def test_without_a_size_the_fused_model_takes_any() -> None:
    model = a_knet("r50-upernet")
    fused = fuse(model, None)
    for size in ((40, 72), (96, 44)):
        images = torch.randint(0, 256, (1, *size, 3), dtype=torch.uint8)
        assert difference(fused(images), model(images)) <= 1e-9


def test_swin_of_any_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="--size"):
        fuse(a_knet("swin-t-upernet", dtype=torch.float32), None)


class Odd(nn.Module):
    """What a backbone may hold: a norm with its activation inside, one that reads no convolution,
    and a convolution that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, bias=True)
        self.act_norm = timm.layers.BatchNormAct2d(6, act_layer=nn.ReLU)
        self.alone = nn.BatchNorm2d(6, affine=False)
        self.twice = nn.Conv2d(6, 6, 1, bias=False)
        self.after_twice = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.alone(self.act_norm(self.first(x)) + 1)
        out: Tensor = self.twice(self.after_twice(self.twice(x)))
        return out


@torch.no_grad()
def test_batch_norms_fold_exactly_and_only_where_they_can() -> None:
    torch.manual_seed(0)
    network = Odd().double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.1, 3)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    expected = network(x)
    assert fold_batch_norms(network, x) == 1
    assert difference(network(x), expected) <= 1e-9
    assert isinstance(network.act_norm, nn.ReLU)
    assert isinstance(network.alone, nn.BatchNorm2d)
    assert isinstance(network.after_twice, nn.BatchNorm2d)


@pytest.mark.parametrize("cells", [1, 2, 3, 6])
def test_pooling_matrices_average_as_adaptive_pooling_does(cells: int) -> None:
    for size in ((1, 1), (2, 5), (6, 6), (7, 11), (16, 15), (64, 90)):
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        assert difference(pooled(x, cells), F.adaptive_avg_pool2d(x, cells)) <= 1e-9
        close = difference(pooled(x.float(), cells), F.adaptive_avg_pool2d(x, cells))
        assert close <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("size", [(56, 84), (225, 131)])  # whole windows, and neither side of them
def test_static_windows_are_swin_at_their_size(size: tuple[int, int]) -> None:
    torch.manual_seed(1)
    swin = SwinBackbone("swin_tiny_patch4_window7_224", 0.0).eval().double()
    for block in (block for layer in swin.layers for block in layer.blocks):
        nn.init.normal_(block.attn.relative_position_bias_table)
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    for got, expected in zip(StaticSwin(swin, size)(image), swin(image), strict=True):
        assert difference(got, expected) <= 1e-9
