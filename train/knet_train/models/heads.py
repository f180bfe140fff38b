"""The feature heads of the published K-Nets: FCN, PSPNet, DeepLabV3 and UPerNet.

They follow mmsegmentation 1.x, ``mmseg/models/decode_heads/{fcn,psp,aspp,uper}_head.py``, without
their classifiers: K-Net's first classifier holds the initial kernels. All take the backbone's four
levels, finest first; all give [B, channels, h, w].

Feature heads: backbone levels in, one feature map for the kernels out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_norm(cin: int, cout: int, kernel: int, *, groups: int = 1) -> nn.Sequential:
    """Bias-free convolution and BatchNorm, which folds into it for deployment."""
    return nn.Sequential(
        nn.Conv2d(cin, cout, kernel, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(cout),
    )


def separable(channels: int, kernel: int = 3) -> nn.Sequential:
    """Depthwise then pointwise convolution, each with BatchNorm; ReLU at the end."""
    return nn.Sequential(
        conv_norm(channels, channels, kernel, groups=channels),
        *conv_norm(channels, channels, 1),
        nn.ReLU(inplace=True),
    )


class FPNHead(nn.Module):
    """A light feature pyramid (arXiv 1612.03144, sum fusion as in semantic FPN 1901.02446).

    Levels come finest first. Each gets a 1×1 lateral; coarse levels are upsampled and added on the
    way down and smoothed by a separable convolution; then all levels meet at the finest size.
    The image's mean feature is added to the coarsest level as global context.
    """

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(conv_norm(c, channels, 1) for c in in_channels)
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


def upsample_to(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear, half-pixel centres (``align_corners=False``), to ``like``'s height and width."""
    if x.shape[-2:] == like.shape[-2:]:
        return x
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


POOLS = (1, 2, 3, 6)
_DILATIONS = (12, 24, 36)


def conv_block(cin: int, cout: int, kernel: int = 3, dilation: int = 1) -> nn.Sequential:
    """Bias-free convolution that keeps the size, BatchNorm, ReLU."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(cin, cout, kernel, padding=padding, dilation=dilation, bias=False),
        nn.BatchNorm2d(cout),
        nn.ReLU(inplace=True),
    )


class FCNHead(nn.Module):
    """Two 3×3 convolutions of the last level, joined with it once more (arXiv 1411.4038)."""

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            conv_block(in_channels[-1], channels), conv_block(channels, channels)
        )
        self.fuse = conv_block(in_channels[-1] + channels, channels)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        last = levels[-1]
        out: Tensor = self.fuse(torch.cat([last, self.convs(last)], 1))
        return out


class PyramidPooling(nn.Module):
    """A map, and its averages over 1, 4, 9 and 36 cells, each resized to it (arXiv 1612.01105)."""

    def __init__(self, cin: int, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(conv_block(cin, channels, 1) for _ in POOLS)
        self.fuse = conv_block(cin + len(POOLS) * channels, channels)

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
        self.image_pool = conv_block(cin, channels, 1)
        self.branches = nn.ModuleList(
            [
                conv_block(cin, channels, 1),
                *(conv_block(cin, channels, dilation=dilation) for dilation in _DILATIONS),
            ]
        )
        self.fuse = conv_block((2 + len(_DILATIONS)) * channels, channels)

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
        self.laterals = nn.ModuleList(conv_block(c, channels, 1) for c in in_channels[:-1])
        self.smooth = nn.ModuleList(conv_block(channels, channels) for _ in in_channels[:-1])
        self.fuse = conv_block(len(in_channels) * channels, channels)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        top = self.pyramid(levels[-1])
        outs = [top]
        for lateral, smooth, level in reversed(
            list(zip(self.laterals, self.smooth, levels, strict=False))
        ):
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
        self.conv = conv_block(in_channels[-2], channels)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        assert self.conv_seg.bias is not None
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        out: Tensor = self.conv_seg(self.dropout(self.conv(levels[-2])))
        return out
