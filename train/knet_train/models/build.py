"""From a configuration to a network: the one place where K-Net's parts are chosen."""

from __future__ import annotations

from torch import nn

from knet_train.config import ModelConfig
from knet_train.models.backbones import build_backbone, level_channels
from knet_train.models.heads import ASPPHead, AuxiliaryHead, FCNHead, FPNHead, PSPHead, UPerHead
from knet_train.models.knet import KernelUpdateStage, KNet


def build_model(config: ModelConfig, classes: int) -> KNet:
    """An untrained K-Net for ``classes`` classes."""
    backbone = build_backbone(config)
    levels = level_channels(backbone)
    auxiliary = None
    if config.auxiliary_channels:
        auxiliary = AuxiliaryHead(levels, config.auxiliary_channels, classes, config.dropout)
    return KNet(
        backbone,
        _build_head(config, levels),
        [
            KernelUpdateStage(
                config.channels, config.update_channels, config.heads, config.ffn_channels
            )
            for _ in range(config.stages)
        ],
        classes=classes,
        channels=config.channels,
        dropout=config.dropout,
        mean=config.mean,
        std=config.std,
        auxiliary=auxiliary,
    )


def _build_head(config: ModelConfig, levels: list[int]) -> nn.Module:
    match config.head:
        case "fpn":
            return FPNHead(levels, config.channels)
        case "fcn":
            return FCNHead(levels, config.channels)
        case "psp":
            return PSPHead(levels, config.channels)
        case "aspp":
            return ASPPHead(levels, config.channels)
        case "uper":
            return UPerHead(levels, config.channels)
