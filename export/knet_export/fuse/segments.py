"""The fused model of a K-Net for instance or panoptic segmentation.

The rewrites are those of the semantic one (``fuse.kernels``), and these:

- Only the last stage's classes are computed, and only the classifier's rows for stuff, which are
  kernels; the others are there for training.
- The first kernels are W + A Xᵀ, with the masks A of the learned kernels W, and the first stage
  gathers by the same masks: the product over the pixels is there once.
- GroupNorm is a scale and a shift per image and channel, from means in float32.
- The positional code is a constant of the one size, or what the graph computes of a free one.
"""

from __future__ import annotations

import copy
from math import prod
from typing import cast

import torch
from torch import Tensor, nn

from knet_export.fuse.kernels import gather_hard, sum_scale
from knet_export.fuse.layers import plain_group_norms
from knet_export.fuse.model import Fused, FusedStage, fuse_backbone, plain
from knet_runtime.bundle.manifest import InputSpec, Precision
from knet_runtime.types import Size
from knet_train.models.knet import KernelUpdateStage
from knet_train.models.segments import (
    MULTIPLE,
    LocalisationHead,
    SegmentKNet,
    SegmentLogits,
    positional_code,
    upsample_twice,
)

_STRIDE = 8  # of the features


class FirstMasks(nn.Module):
    """Location and semantic features, both [B, C, P] -> the first mask logits [B, N, P]: of things
    from the one, of stuff from the other."""

    def __init__(self, things: Tensor, stuff: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.things = nn.Parameter(things)
        if len(stuff):
            self.stuff = nn.Parameter(stuff)
            self.offset = nn.Parameter(offset.unsqueeze(-1))
        self.panoptic = len(stuff) > 0

    def forward(self, location: Tensor, semantic: Tensor) -> Tensor:
        masks = self.things @ location
        if self.panoptic:
            masks = torch.cat([masks, self.stuff @ semantic + self.offset], 1)
        return masks


class FusedSegmentKNet(Fused):
    """uint8 [B, H, W, 3] RGB, H and W multiples of 32 -> float32 class logits [B, N, K] and mask
    logits [B, N, H / 4, W / 4] of the last stage."""

    PIXELS = ("backbone", "head", "first")

    kernels: Tensor
    grown: Tensor

    def __init__(self, model: SegmentKNet, size: Size | None, scale: float) -> None:
        super().__init__(model.mean.clone(), model.std.clone())
        self.backbone = fuse_backbone(model.backbone, size)
        self.head = _fused_head(model.head, size)
        things = model.init_kernels.weight.detach().flatten(1)
        assert model.conv_seg.bias is not None
        rows = list(model.stuff)
        stuff, offset = model.conv_seg.weight.detach().flatten(1)[rows], model.conv_seg.bias[rows]
        self.first = FirstMasks(things.clone(), stuff, offset.detach())
        stages = [cast(KernelUpdateStage, stage) for stage in model.stages]
        self.stages = nn.ModuleList(FusedStage(stage, scale, None) for stage in stages)
        last = copy.deepcopy(stages[-1])
        assert last.class_fc is not None
        self.class_fc, self.fc_class = last.class_fc, last.fc_class
        self.scale = scale
        self.register_buffer("kernels", torch.cat([things, stuff]))
        # What the first kernels take of the rescaled sums: things all, stuff nothing.
        share = torch.cat(
            [things.new_full((len(things), 1), scale), stuff.new_zeros(len(stuff), 1)]
        )
        self.register_buffer("grown", share)

    def forward(self, image: Tensor) -> SegmentLogits:
        exact, fast = self.mean.dtype, self.first.things.dtype
        location, semantic = self.head(self.backbone(self.normalised(image).to(fast)))
        grid = location + semantic
        features = grid.flatten(2)  # [B, C, P]
        pixels = features.transpose(1, 2)
        masks = self.first(location.flatten(2), semantic.flatten(2))
        kernels: Tensor | None = None
        for stage in self.stages:
            sums, amounts = gather_hard(pixels, masks, self.scale, exact)
            if kernels is None:
                kernels = self.kernels + sums * self.grown
            kernels, mask_kernels, offset = stage(sums, amounts, kernels)
            masks = mask_kernels.to(fast) @ features + offset.to(fast).unsqueeze(-1)
        classes = self.fc_class(self.class_fc(kernels))
        cells = masks.unflatten(2, (grid.shape[2], grid.shape[3]))
        return SegmentLogits(classes, upsample_twice(cells.to(exact)))


@torch.no_grad()
def fuse_segments(
    model: SegmentKNet, spec: InputSpec, precision: Precision = "fp32"
) -> FusedSegmentKNet:
    """The fused model of ``model`` (in evaluation mode, float32 or float64) for all images that
    ``spec`` takes, of multiples of 32. Its weights stay as they are; for fp16 its sums over pixels
    are rescaled so that they will fit. Raises ConfigError for Swin with free sizes."""
    largest = spec.sizes.max if spec.sizes else spec.size
    scale = sum_scale(prod(largest) // _STRIDE**2) if precision == "fp16" else 1.0
    return plain(FusedSegmentKNet(model, None if spec.sizes else largest, scale))


class _FixedCode(nn.Module):
    """``PositionalCode`` for maps of one size."""

    code: Tensor

    def __init__(self, code: Tensor) -> None:
        super().__init__()
        self.register_buffer("code", code)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.code


def _fused_head(head: nn.Module, size: Size | None) -> nn.Module:
    copied = cast(LocalisationHead, copy.deepcopy(head))
    if size is not None:
        weight = next(copied.parameters())
        channels = copied.smooth[-1].out_channels
        assert isinstance(channels, int)
        code = positional_code(channels, size[0] // MULTIPLE, size[1] // MULTIPLE)
        copied.placed = _FixedCode(code.to(weight))
    return plain_group_norms(copied)
