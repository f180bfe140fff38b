"""Feature heads: backbone levels in, one feature map for the kernels out."""

from __future__ import annotations

from collections.abc import Sequence

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
