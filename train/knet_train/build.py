"""From a configuration to a network: the one place where K-Net's parts are chosen."""

from __future__ import annotations

from knet_train.backbones import build_backbone, level_channels
from knet_train.config import ModelConfig
from knet_train.heads import FPNHead
from knet_train.kernels import KernelUpdateStage
from knet_train.knet import KNet


def build_model(config: ModelConfig, classes: int) -> KNet:
    """An untrained K-Net for ``classes`` classes."""
    backbone = build_backbone(config)
    return KNet(
        backbone,
        FPNHead(level_channels(backbone), config.channels),
        [
            KernelUpdateStage(config.channels, config.channels, config.heads, config.ffn_channels)
            for _ in range(config.stages)
        ],
        classes=classes,
        channels=config.channels,
        dropout=config.dropout,
        mean=config.mean,
        std=config.std,
    )
