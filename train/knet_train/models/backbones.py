"""Backbones as K-Net wants them: a list of levels, finest first, at strides 4, 8, 16 and 32.

Any timm model with features at these strides will do. Swin Transformers (arXiv 2103.14030) have an
adapter of their own: timm rolls a map and then pads it to whole windows, and mmsegmentation
(``mmseg/models/backbones/swin.py``) pads and then rolls. On a map whose side is no multiple of the
window the two differ, and published segmentation weights expect the second.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import FeatureInfo
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from knet_runtime.errors import ConfigError
from knet_train.config import ModelConfig

PATCH = 4  # pixels a side that Swin embeds as one
# What a model needs besides its name. The symmetric-padding twin of the TensorFlow network takes
# the same weights (its BatchNorms want 1e-3) and has no Pad nodes in ONNX.
_OPTIONS: dict[str, dict[str, Any]] = {"efficientnet_lite0": {"bn_eps": 1e-3}}
_STRIDES = (4, 8, 16, 32)


def build_backbone(config: ModelConfig) -> nn.Module:
    """An untrained feature extractor; its levels run from ``config.stride`` to 32 for head "fpn",
    else from 4 to 32 (the last ones are finer where ``config.output_stride`` is below 32).

    Raises ConfigError when timm has no such model, or it has no such levels.
    """
    name = config.backbone
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5]) or "see timm's models"
        raise ConfigError(f"model.backbone: timm has no {name!r}; near it: {close}")
    strides = [s for s in _STRIDES if config.head != "fpn" or s >= config.stride]
    if name.startswith("swin_"):
        if config.output_stride != 32 or len(strides) < 4:
            raise ConfigError(f"model.backbone: {name} needs output_stride 32 and stride 4")
        return SwinBackbone(name, config.drop_path)
    options = dict(_OPTIONS.get(name, {}))
    if config.output_stride != 32:
        options["output_stride"] = config.output_stride
    if config.drop_path > 0:
        options["drop_path_rate"] = config.drop_path
    try:
        with torch.device("meta"):
            probe: Any = timm.create_model(name, features_only=True)
        reductions = probe.feature_info.reduction()
        levels = tuple(reductions.index(stride) for stride in strides)
        module: nn.Module = timm.create_model(
            name, features_only=True, out_indices=levels, **options
        )
    except (ValueError, RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        raise ConfigError(
            f"model.backbone: {name} cannot give features at strides {strides} with "
            f"output_stride {config.output_stride} and drop_path {config.drop_path} ({error}): "
            "take a convolutional network such as resnet50c or convnext_tiny, or a swin_*"
        ) from error
    if getattr(module, "output_fmt", "NCHW") not in ("NCHW", None):
        raise ConfigError(f"model.backbone: {name} gives channels last, which is not supported")
    return module


def level_channels(backbone: nn.Module) -> list[int]:
    """Channels of each level that the backbone returns, finest first."""
    channels: list[int] = backbone.feature_info.channels()  # type: ignore[union-attr,operator]
    return channels


class SwinBackbone(nn.Module):
    """RGB [B, 3, H, W], normalised, of any size -> four levels [B, C_i, H/s, W/s], s = 4 … 32
    (rounded up), finest first. Every level has a LayerNorm of its own, as in mmsegmentation."""

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
