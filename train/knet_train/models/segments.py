"""K-Net for instance and panoptic segmentation (arXiv 2106.14855, sections 3.3 and 3.4).

A kernel is an object ("thing") or, in panoptic segmentation, also a class of background ("stuff").
The stages are those of semantic segmentation (``knet_train.models.knet``) with two differences: a
pixel belongs to every kernel whose mask logit is above 0 there, as objects do not share the image
out among them, and each kernel says its class, by sigmoids.

The features are a pyramid (arXiv 1612.03144) whose levels meet at stride 8 in a localisation map,
which the first masks of things come from, and a semantic map, from which a classifier's stuff rows
are kernels themselves. The stages see the sum of the two. Details follow the authors' own code
(github ZwwWayne/K-Net, ``knet/det/{kernel_head,kernel_update_head,semantic_fpn_wrapper}.py`` and
mmdetection's ``FPN``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from knet_train.models.knet import KernelUpdateStage, StageOutput

MULTIPLE = 32
"""Images are padded to sides that are multiples of this: levels are doubled until they meet."""

_GROUPS = 32
# Conv2dNormActivation with GroupNorm: bias-free convolution, norm, ReLU.
_Block = partial(Conv2dNormActivation, norm_layer=partial(nn.GroupNorm, _GROUPS))


class SegmentLogits(NamedTuple):
    """What the network says of an image: ``classes`` [B, N, K], each a sigmoid's logit, and
    ``masks`` [B, N, H / 4, W / 4], of the image padded to a multiple of 32."""

    classes: Tensor
    masks: Tensor


class TrainingOutputs(NamedTuple):
    """What the losses look at: the first masks and those of every stage, ``StageOutput`` each, and
    the classifier's ``semantic`` logits [B, K, H / 8, W / 8]."""

    stages: list[StageOutput]
    semantic: Tensor


class SegmentKNet(nn.Module):
    """The whole network; its parts are built by ``knet_train.models.build`` and passed in.

    ``things`` are the classes whose objects are told apart; with ``panoptic`` the others have a
    kernel each, after the ``kernels`` of things.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        head: LocalisationHead,
        stages: Sequence[KernelUpdateStage],
        *,
        channels: int,
        kernels: int,
        classes: int,
        things: Sequence[int],
        panoptic: bool,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.init_kernels = nn.Conv2d(channels, kernels, 1, bias=False)
        self.conv_seg = nn.Conv2d(channels, classes, 1)
        self.stages = nn.ModuleList(stages)
        self.things = tuple(things)
        self.stuff = tuple(c for c in range(classes) if c not in self.things) if panoptic else ()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self._reset()

    def _reset(self) -> None:
        """New weights as the authors draw them (``init_cfg``, ``init_weights`` of their heads)."""
        rare = -math.log(99)  # a sigmoid of 1 %
        for module in self.head.fusion_modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
        nn.init.normal_(self.init_kernels.weight)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        assert self.conv_seg.bias is not None
        nn.init.constant_(self.conv_seg.bias, rare)
        for stage in self.stages:
            for weight in stage.parameters():
                if weight.dim() > 1:
                    nn.init.xavier_uniform_(weight)
            assert isinstance(stage, KernelUpdateStage)
            nn.init.constant_(stage.fc_class.bias, rare)

    def forward(self, images: Tensor) -> SegmentLogits:
        """RGB images [B, H, W, 3] in 0 … 255 (uint8, or floats), of any size -> the prediction of
        the last stage."""
        last = self.training_outputs(images).stages[-1]
        assert last.classes is not None
        return SegmentLogits(last.classes, upsample_twice(last.masks))

    def training_outputs(self, images: Tensor) -> TrainingOutputs:
        """RGB images [B, H, W, 3] in 0 … 255 -> the outputs of the first kernels and of all
        stages, masks at stride 8."""
        return self.decode(self.levels(images))

    def levels(self, images: Tensor) -> list[Tensor]:
        """RGB images [B, H, W, 3] in 0 … 255 -> the backbone's levels at strides 4 … 32. Zeros are
        added at the right and the bottom of the normalised image."""
        planes = images.permute(0, 3, 1, 2).to(self.mean.dtype).contiguous()
        height, width = planes.shape[-2:]
        margins = (0, -width % MULTIPLE, 0, -height % MULTIPLE)
        levels: list[Tensor] = self.backbone(F.pad((planes - self.mean) / self.std, margins))
        return levels

    def decode(self, levels: Sequence[Tensor]) -> TrainingOutputs:
        """The backbone's levels -> the outputs of the first kernels and of all stages."""
        location, semantic = self.head(levels)
        features = location + semantic
        masks, classified = self.init_kernels(location), self.conv_seg(semantic)
        # The first masks come from the localisation map, and gather from the sum of both.
        chosen = (masks > 0).flatten(2).to(features.dtype)
        kernels = self.init_kernels.weight.flatten(1) + chosen @ features.flatten(2).mT
        if self.stuff:
            stuff = self.conv_seg.weight.flatten(1)[list(self.stuff)]
            kernels = torch.cat([kernels, stuff.expand(len(kernels), -1, -1)], 1)
            masks = torch.cat([masks, classified[:, list(self.stuff)]], 1)
        stages = [StageOutput(kernels, masks)]
        for stage in self.stages:
            stages.append(stage(features, *stages[-1][:2]))
        return TrainingOutputs(stages, classified)


class LocalisationHead(nn.Module):
    """The backbone's levels -> the localisation map and the semantic map, at stride 8."""

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.smooth = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels
        )
        for conv in (*self.laterals, *self.smooth):
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)
        # The finest level is halved, the next has the size, the others are doubled until they do.
        self.towers = nn.ModuleList(
            nn.ModuleList(
                _Block(channels, channels, 3, stride=2 if level == 0 else 1)
                for _ in range(max(level, 1))
            )
            for level in range(len(in_channels))
        )
        self.location = nn.Sequential(_Block(channels, channels, 1), _Block(channels, channels, 1))
        self.semantic = nn.Sequential(_Block(channels, channels, 1), _Block(channels, channels, 1))
        self.placed: nn.Module = PositionalCode()

    def fusion_modules(self) -> list[nn.Module]:
        """All but the pyramid."""
        return [m for part in (self.towers, self.location, self.semantic) for m in part.modules()]

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Levels [B, C_i, H_i, W_i] at strides 4 … 32 -> two maps [B, channels, H / 8, W / 8]."""
        *finer, coarsest = self.pyramid(levels)
        levels = (*finer, self.placed(coarsest))
        towers: Any = self.towers  # torch does not say what a ModuleList holds
        climbed = [_climb(tower, level) for tower, level in zip(towers, levels, strict=True)]
        total = sum(climbed[1:], climbed[0])
        return self.location(total), self.semantic(total)

    def pyramid(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """The feature pyramid: levels of ``channels`` each, at the same strides."""
        sides = [lateral(level) for lateral, level in zip(self.laterals, levels, strict=True)]
        for fine in range(len(sides) - 2, -1, -1):
            size = sides[fine].shape[-2:]
            sides[fine] = sides[fine] + F.interpolate(sides[fine + 1], size, mode="nearest")
        return [smooth(side) for smooth, side in zip(self.smooth, sides, strict=True)]


def _climb(tower: Iterable[nn.Module], level: Tensor) -> Tensor:
    """One level to stride 8: it is doubled between any two of its blocks."""
    first, *others = tower
    level = first(level)
    for block in others:
        level = block(upsample_twice(level))
    return level


def upsample_twice(x: Tensor) -> Tensor:
    """Bilinear, half-pixel centres (``align_corners=False``), to twice the height and width."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class PositionalCode(nn.Module):
    """Adds ``positional_code`` to a map [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return x + positional_code(*x.shape[-3:]).to(x)


def positional_code(channels: int, height: int, width: int) -> Tensor:
    """Sines and cosines of each cell's place, [channels, height, width] (arXiv 2005.12872, as
    mmdetection's ``SinePositionalEncoding`` with ``normalize``): rows in the first half of the
    channels, columns in the second."""
    half = channels // 2
    wave = 10000 ** (2 * torch.div(torch.arange(half), 2, rounding_mode="floor") / half)

    def code(cells: int) -> Tensor:
        angle = (torch.arange(1, cells + 1) / (cells + 1e-6) * 2 * math.pi)[:, None] / wave
        even = torch.arange(half) % 2 == 0
        return torch.where(even, angle.sin(), angle.cos()).T

    rows = code(height)[:, :, None].expand(-1, -1, width)
    columns = code(width)[:, None, :].expand(-1, height, -1)
    return torch.cat([rows, columns])
