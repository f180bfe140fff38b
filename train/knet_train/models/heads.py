"""Feature heads: the backbone's levels, finest first, become one feature map for the kernels.

FCN, PSPNet, DeepLabV3 and UPerNet are the published K-Nets' and follow mmsegmentation 1.x,
``mmseg/models/decode_heads/{fcn,psp,aspp,uper}_head.py``, without their classifiers: K-Net's first
classifier holds the initial kernels. The light pyramid FPN is knet-edge's. All take levels
[B, C_i, H_i, W_i] and give [B, channels, h, w]: FPN and UPer at the finest level's size, the others
at the last one's. Their blocks are torchvision's: bias-free convolution, BatchNorm, ReLU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation as ConvBlock

POOLS = (1, 2, 3, 6)
_DILATIONS = (12, 24, 36)


def upsample_to(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear, half-pixel centres (``align_corners=False``), to ``like``'s height and width."""
    if x.shape[-2:] == like.shape[-2:]:
        return x
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


class FPNHead(nn.Module):
    """A light feature pyramid (arXiv 1612.03144, sum fusion as in semantic FPN 1901.02446).

    Levels come finest first. Each gets a 1×1 lateral; coarse levels are upsampled and added on the
    way down and smoothed by a separable convolution; then all levels meet at the finest size.
    The image's mean feature is added to the coarsest level as global context.
    """

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(
            ConvBlock(c, channels, 1, activation_layer=None) for c in in_channels
        )
        self.context = nn.Sequential(nn.Conv2d(in_channels[-1], channels, 1), nn.ReLU(inplace=True))
        # 5×5 where it is cheap; at the finest level it would cost more than the rest together.
        self.smooth = nn.ModuleList(
            separable(channels, 3 if level == 0 else 5) for level in range(len(in_channels))
        )
        self.fuse = nn.Sequential(*separable(channels), *separable(channels))

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Levels [B, C_i, H_i, W_i], finest first -> [B, channels, H_0, W_0]."""
        top = self.laterals[-1](levels[-1])
        top = top + self.context(levels[-1].mean((2, 3), keepdim=True))
        top = self.smooth[-1](F.relu(top))
        total = upsample_to(top, levels[0])
        for index in range(len(levels) - 2, -1, -1):
            top = self.laterals[index](levels[index]) + upsample_to(top, levels[index])
            top = self.smooth[index](F.relu(top))
            total = total + upsample_to(top, levels[0])
        out: Tensor = self.fuse(total)
        return out


def separable(channels: int, kernel: int = 3) -> nn.Sequential:
    """Depthwise then pointwise convolution, each with BatchNorm; ReLU at the end."""
    depthwise = ConvBlock(channels, channels, kernel, groups=channels, activation_layer=None)
    return nn.Sequential(depthwise, *ConvBlock(channels, channels, 1))


class FCNHead(nn.Module):
    """Two 3×3 convolutions of the last level, joined with it once more (arXiv 1411.4038)."""

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        cin = in_channels[-1]
        self.convs = nn.Sequential(ConvBlock(cin, channels), ConvBlock(channels, channels))
        self.fuse = ConvBlock(cin + channels, channels)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        last = levels[-1]
        out: Tensor = self.fuse(torch.cat([last, self.convs(last)], 1))
        return out


class PyramidPooling(nn.Module):
    """A map, and its averages over 1, 4, 9 and 36 cells, each resized to it (arXiv 1612.01105)."""

    def __init__(self, cin: int, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(ConvBlock(cin, channels, 1) for _ in POOLS)
        self.fuse = ConvBlock(cin + len(POOLS) * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        pooled = [
            upsample_to(branch(F.adaptive_avg_pool2d(x, size)), x)
            for branch, size in zip(self.branches, POOLS, strict=True)
        ]
        out: Tensor = self.fuse(torch.cat([x, *pooled], 1))
        return out


class PSPHead(nn.Module):
    """Pyramid pooling of the last level (arXiv 1612.01105)."""

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.pyramid = PyramidPooling(in_channels[-1], channels)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        out: Tensor = self.pyramid(levels[-1])
        return out


class ASPPHead(nn.Module):
    """Atrous spatial pyramid pooling of the last level (DeepLabV3, arXiv 1706.05587)."""

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        cin = in_channels[-1]
        self.image_pool = ConvBlock(cin, channels, 1)
        dilated = (ConvBlock(cin, channels, dilation=dilation) for dilation in _DILATIONS)
        self.branches = nn.ModuleList([ConvBlock(cin, channels, 1), *dilated])
        self.fuse = ConvBlock((2 + len(_DILATIONS)) * channels, channels)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        x = levels[-1]
        image = upsample_to(self.image_pool(F.adaptive_avg_pool2d(x, 1)), x)
        out: Tensor = self.fuse(torch.cat([image, *(branch(x) for branch in self.branches)], 1))
        return out


class UPerHead(nn.Module):
    """A feature pyramid whose top is pyramid pooling (arXiv 1807.10221), at the finest level."""

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.pyramid = PyramidPooling(in_channels[-1], channels)
        self.laterals = nn.ModuleList(ConvBlock(c, channels, 1) for c in in_channels[:-1])
        self.smooth = nn.ModuleList(ConvBlock(channels, channels) for _ in in_channels[:-1])
        self.fuse = ConvBlock(len(in_channels) * channels, channels)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        top = self.pyramid(levels[-1])
        outs = [top]
        parts = list(zip(self.laterals, self.smooth, levels[:-1], strict=True))
        for lateral, smooth, level in reversed(parts):
            side = lateral(level)
            top = side + upsample_to(top, side)
            outs.insert(0, smooth(top))
        out: Tensor = self.fuse(torch.cat([upsample_to(x, outs[0]) for x in outs], 1))
        return out


class AuxiliaryHead(nn.Module):
    """A classifier of its own on the last level but one, which supervises the backbone in training:
    one 3×3 convolution, dropout, a 1×1 classifier (mmsegmentation's auxiliary FCN head)."""

    def __init__(
        self, in_channels: Sequence[int], channels: int, classes: int, dropout: float
    ) -> None:
        super().__init__()
        self.conv = ConvBlock(in_channels[-2], channels)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        assert self.conv_seg.bias is not None
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        out: Tensor = self.conv_seg(self.dropout(self.conv(levels[-2])))
        return out
