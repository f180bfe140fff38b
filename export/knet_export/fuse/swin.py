"""Swin for one fixed size: windows, shifts and masks that are constants of the graph.

The same function as ``knet_train.models.backbones`` at that size. What depends on the size alone
is made here, once: which sides are padded, and the masks that keep a shifted window from attending
across the image's edge. The relative positions' biases are looked up, and the query's weights
hold 1/√d.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knet_runtime.types import Size
from knet_train.models.backbones import PATCH, SwinBackbone


class StaticSwin(nn.Module):
    """Normalised RGB [B, 3, H, W] of the one size -> four levels [B, C_i, H/s, W/s], finest first.
    It takes a copy of the backbone's weights."""

    def __init__(self, swin: SwinBackbone, size: Size) -> None:
        super().__init__()
        swin = copy.deepcopy(swin)
        self.size = size
        self.patch_embed = swin.patch_embed
        height, width = (-(-side // PATCH) for side in size)
        stages = []
        for number, (layer, norm) in enumerate(zip(swin.layers, swin.norms, strict=True)):
            if number:
                height, width = -(-height // 2), -(-width // 2)
            stages.append(_Stage(layer, norm, (height, width)))
        self.stages = nn.ModuleList(stages)

    def forward(self, image: Tensor) -> list[Tensor]:
        x = self.patch_embed(_pad_to(image, 2, PATCH, self.size))
        levels = []
        for stage in self.stages:
            x, level = stage(x)
            levels.append(level)
        return levels


class _Stage(nn.Module):
    """Map [B, H, W, C] of the stage before -> this stage's map, and its level [B, C, H, W]."""

    def __init__(self, layer: Any, norm: nn.Module, size: Size) -> None:
        super().__init__()
        self.downsample = layer.downsample
        masks: dict[Size, Tensor | None] = {}  # one for all blocks of a stage that shift alike
        for block in layer.blocks:
            if block.shift_size not in masks:
                padded = (side + -side % w for side, w in zip(size, block.window_size, strict=True))
                like = block.norm1.weight.new_zeros(1, *padded, 1)
                masks[block.shift_size] = block.get_attn_mask(like)
        self.blocks = nn.ModuleList(
            StaticBlock(block, size, masks[block.shift_size]) for block in layer.blocks
        )
        self.norm = norm

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.downsample(x)
        for block in self.blocks:
            x = block(x)
        return x, self.norm(x).permute(0, 3, 1, 2)


class StaticBlock(nn.Module):
    """timm's ``SwinTransformerBlock`` on maps [B, H, W, C] of one size: padded, then rolled."""

    def __init__(self, block: Any, size: Size, mask: Tensor | None) -> None:
        super().__init__()
        self.size, self.window, self.shift = size, block.window_size, block.shift_size
        self.heads: int = block.attn.num_heads
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        self.qkv = _scaled_query(block.attn.qkv, block.attn.scale)
        self.proj = block.attn.proj
        self.softmax = WindowSoftmax(block.attn._get_rel_pos_bias().detach(), mask)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out

    def _attend(self, x: Tensor) -> Tensor:
        (height, width), (rows, columns) = self.size, self.window
        channels = x.shape[-1]
        x = _pad_to(x, 1, rows, self.size, columns)
        down, across = x.shape[1] // rows, x.shape[2] // columns
        if any(self.shift):
            x = torch.roll(x, (-self.shift[0], -self.shift[1]), (1, 2))
        x = x.reshape(-1, down, rows, across, columns, channels).transpose(2, 3)
        x = x.reshape(-1, down * across, rows * columns, channels)
        query, key, value = (
            part.unflatten(-1, (self.heads, channels // self.heads)).transpose(2, 3)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        x = self.softmax(query @ key.transpose(-2, -1)) @ value
        x = self.proj(x.transpose(2, 3).flatten(3))
        x = x.reshape(-1, down, across, rows, columns, channels).transpose(2, 3)
        x = x.reshape(-1, down * rows, across * columns, channels)
        if any(self.shift):
            x = torch.roll(x, self.shift, (1, 2))
        if x.shape[1:3] != self.size:
            x = x[:, :height, :width]
        return x


class WindowSoftmax(nn.Module):
    """Scores [B, windows, heads, n, n] -> attention of the same dtype; biases and masks are added,
    and the softmax is computed, in the precision that they have."""

    bias: Tensor
    mask: Tensor | None

    def __init__(self, bias: Tensor, mask: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("bias", bias)  # [1, heads, n, n]
        self.register_buffer("mask", None if mask is None else mask.unsqueeze(1))

    def forward(self, scores: Tensor) -> Tensor:
        total = scores.to(self.bias.dtype) + self.bias
        if self.mask is not None:
            total = total + self.mask
        return torch.softmax(total, dim=-1).to(scores.dtype)


def _pad_to(x: Tensor, dim: int, rows: int, size: Size, columns: int = 0) -> Tensor:
    """Zeros below and to the right, up to multiples, where ``dim`` is the height's axis; ``x`` has
    the height and width ``size``."""
    below, right = -size[0] % rows, -size[1] % (columns or rows)
    if not below and not right:
        return x
    return F.pad(x, (0, 0) * (x.ndim - dim - 2) + (0, right, 0, below))


@torch.no_grad()
def _scaled_query(qkv: nn.Linear, scale: float) -> nn.Linear:
    """The packed projection whose queries are already multiplied by ``scale``."""
    queries = qkv.out_features // 3
    for part in (qkv.weight, qkv.bias):
        if part is not None:
            part[:queries] *= scale
    return qkv
