"""From a configuration to a network: the one place where K-Net's parts are chosen."""

from __future__ import annotations

from knet_train.config import ModelConfig
from knet_train.models.backbones import build_backbone, level_channels
from knet_train.models.heads import ASPPHead, AuxiliaryHead, FCNHead, FPNHead, PSPHead, UPerHead
from knet_train.models.knet import KernelUpdateStage, KNet

_HEADS = {"fpn": FPNHead, "fcn": FCNHead, "psp": PSPHead, "aspp": ASPPHead, "uper": UPerHead}


def build_model(config: ModelConfig, classes: int) -> KNet:
    """An untrained K-Net for ``classes`` classes."""
    backbone = build_backbone(config)
    levels = level_channels(backbone)
    auxiliary = None
    if config.auxiliary_channels:
        auxiliary = AuxiliaryHead(levels, config.auxiliary_channels, classes, config.dropout)
    head = _HEADS[config.head](levels, config.channels)
    sizes = (config.channels, config.update_channels, config.heads, config.ffn_channels)
    return KNet(
        backbone,
        head,
        [KernelUpdateStage(*sizes) for _ in range(config.stages)],
        classes=classes,
        channels=config.channels,
        dropout=config.dropout,
        mean=config.mean,
        std=config.std,
        auxiliary=auxiliary,
    )
