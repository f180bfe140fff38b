"""AdamW groups and the learning-rate schedule."""

from __future__ import annotations

import torch
from torch import nn

from knet_train.config import OptimConfig
from knet_train.knet import KNet


def build_optimizer(model: KNet, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW; the backbone learns slower, and norms and biases are not decayed."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        key = (name.startswith("backbone."), parameter.ndim > 1)
        groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": config.lr * (config.backbone_lr_scale if backbone else 1.0),
                "weight_decay": config.weight_decay if decayed else 0.0,
            }
            for (backbone, decayed), parameters in groups.items()
        ]
    )


def lr_factor(step: int, config: OptimConfig) -> float:
    """Linear warm-up, then polynomial decay to zero at ``config.steps``."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    left = max(0.0, 1.0 - step / config.steps)
    return float(warm * left**config.power)
