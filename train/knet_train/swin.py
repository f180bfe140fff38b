"""Swin Transformer (arXiv 2103.14030) for dense prediction: timm's blocks, mmsegmentation's order.

timm rolls a map and then pads it to whole windows; mmsegmentation (``mmseg/models/backbones/
swin.py``) pads and then rolls. On a map whose side is no multiple of the window the two differ,
and published segmentation weights expect the second. Every level has a LayerNorm of its own.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import FeatureInfo
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

PATCH = 4


class SwinBackbone(nn.Module):
    """RGB [B, 3, H, W], normalised, of any size -> four levels [B, C_i, H/s, W/s], s = 4 … 32
    (rounded up), finest first."""

    def __init__(self, name: str, drop_path: float) -> None:
        super().__init__()
        # The image size is of no consequence: windows keep their size and masks are made per map.
        swin: Any = timm.create_model(
            name,
            num_classes=0,
            drop_path_rate=drop_path,
            img_size=512,
            strict_img_size=False,
            always_partition=True,
        )
        self.patch_embed = swin.patch_embed
        self.layers = swin.layers
        self.feature_info: Any = FeatureInfo(swin.feature_info, (0, 1, 2, 3))
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.feature_info.channels())
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute every block twice instead of keeping its activations."""
        self.grad_checkpointing = enable

    def forward(self, image: Tensor) -> list[Tensor]:
        height, width = image.shape[-2:]
        x = self.patch_embed(F.pad(image, (0, -width % PATCH, 0, -height % PATCH)))
        levels = []
        for stage, norm in zip(self.layers, self.norms, strict=True):
            x = stage.downsample(x)
            for block in stage.blocks:
                if self.grad_checkpointing and torch.is_grad_enabled():
                    x = checkpoint(_run_block, block, x, use_reentrant=False)
                else:
                    x = _run_block(block, x)
            levels.append(norm(x).permute(0, 3, 1, 2))
        return levels


def _run_block(block: Any, x: Tensor) -> Tensor:
    """timm's ``SwinTransformerBlock.forward`` on [B, H, W, C], padded before it is rolled."""
    height, width = x.shape[1:3]
    rows, columns = block.window_size
    padded = F.pad(block.norm1(x), (0, 0, 0, -width % columns, 0, -height % rows))
    x = x + block.drop_path1(block._attn(padded)[:, :height, :width])
    out: Tensor = x + block.drop_path2(block.mlp(block.norm2(x)))
    return out
