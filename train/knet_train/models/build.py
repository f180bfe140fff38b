"""From a configuration to a network: the one place where K-Net's parts are chosen."""

from __future__ import annotations

from knet_runtime.errors import ConfigError
from knet_runtime.labels import LabelMap
from knet_train.config import ModelConfig
from knet_train.models.backbones import build_backbone, level_channels
from knet_train.models.heads import ASPPHead, AuxiliaryHead, FCNHead, FPNHead, PSPHead, UPerHead
from knet_train.models.knet import KernelUpdateStage, KNet
from knet_train.models.segments import LocalisationHead, SegmentKNet

_HEADS = {"fpn": FPNHead, "fcn": FCNHead, "psp": PSPHead, "aspp": ASPPHead, "uper": UPerHead}


def build_model(config: ModelConfig, classes: int) -> KNet:
    """An untrained K-Net that gives each pixel one of ``classes`` classes. Raises ConfigError for
    the configuration of another task."""
    if config.task != "semantic":
        raise ConfigError(f"this is the configuration of a network for {config.task} segmentation")
    backbone = build_backbone(config)
    levels = level_channels(backbone)
    auxiliary = None
    if config.auxiliary_channels:
        auxiliary = AuxiliaryHead(levels, config.auxiliary_channels, classes, config.dropout)
    head = _HEADS[config.head](levels, config.channels)
    return KNet(
        backbone,
        head,
        _stages(config),
        classes=classes,
        channels=config.channels,
        dropout=config.dropout,
        mean=config.mean,
        std=config.std,
        auxiliary=auxiliary,
    )


def build_segment_model(config: ModelConfig, labels: LabelMap) -> SegmentKNet:
    """An untrained K-Net that finds objects of the ``labels``' things and, for task "panoptic", its
    stuff. Raises ConfigError for the configuration of another task, or labels without a thing."""
    if config.task == "semantic":
        raise ConfigError("this is the configuration of a network for semantic segmentation")
    if not labels.things:
        raise ConfigError(
            f"task {config.task} finds objects, and no class is one: name the classes whose "
            "objects are told apart as things in labels.json"
        )
    if config.task == "instance" and len(labels.things) < labels.num_classes:
        raise ConfigError("task instance takes labels of things only: leave the others out")
    backbone = build_backbone(config)
    return SegmentKNet(
        backbone,
        LocalisationHead(level_channels(backbone), config.channels),
        _stages(config, labels.num_classes),
        channels=config.channels,
        kernels=config.kernels,
        classes=labels.num_classes,
        things=labels.things,
        panoptic=config.task == "panoptic",
        mean=config.mean,
        std=config.std,
    )


def _stages(config: ModelConfig, classes: int = 0) -> list[KernelUpdateStage]:
    sizes = (config.channels, config.update_channels, config.heads, config.ffn_channels)
    return [KernelUpdateStage(*sizes, classes) for _ in range(config.stages)]
