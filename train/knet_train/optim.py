"""AdamW groups and the learning-rate schedule."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from knet_runtime.errors import ConfigError
from knet_train.config import OptimConfig
from knet_train.models.knet import KNet


def build_optimizer(model: KNet, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that learn: each with the learning rate of the first rule of
    ``config.layers`` that matches its name, and with or without weight decay."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        scale = lr_scale(name, config)
        if scale == 0:
            continue
        plain = any(fnmatchcase(name, pattern) for pattern in config.no_decay)
        decayed = not plain and (config.decay_vectors or parameter.ndim > 1)
        groups.setdefault((scale, decayed), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": config.lr * scale,
                "weight_decay": config.weight_decay if decayed else 0.0,
            }
            for (scale, decayed), parameters in groups.items()
        ]
    )


def lr_scale(name: str, config: OptimConfig) -> float:
    """What ``config.lr`` is multiplied by for the parameter ``name``; 0 is frozen."""
    for rule in config.layers:
        if fnmatchcase(name, rule.pattern):
            return rule.lr_scale
    return 1.0


def freeze_layers(model: KNet, config: OptimConfig) -> None:
    """Parameters with an ``lr_scale`` of 0 get no gradients, and ``hold_frozen_norms``."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(lr_scale(name, config) > 0)
    hold_frozen_norms(model)


def hold_frozen_norms(model: nn.Module) -> None:
    """BatchNorms whose parameters are all frozen keep their statistics: they stay in evaluation
    mode. To be called whenever ``model`` has been switched to training mode."""
    for module in model.modules():
        if not isinstance(module, _BatchNorm) or not module.affine:
            continue
        if not any(parameter.requires_grad for parameter in module.parameters()):
            module.eval()


def check_layers(model: KNet, config: OptimConfig) -> None:
    """Refuse patterns that match nothing, and rules that freeze everything, with ConfigError."""
    names = [name for name, _ in model.named_parameters()]
    patterns = {
        **{rule.pattern: "optim.layers" for rule in config.layers},
        **dict.fromkeys(config.no_decay, "optim.no_decay"),
    }
    for pattern, key in patterns.items():
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"{key}: {pattern!r} matches no parameter; names look like {names[0]}"
            )
    if not any(lr_scale(name, config) for name in names):
        raise ConfigError("optim.layers freezes every parameter: leave one to train")


def lr_factor(step: int, config: OptimConfig) -> float:
    """Linear warm-up, then "poly": decay to zero at ``config.steps``; or "step": a tenth after
    each milestone."""
    start, warm = config.warmup_start, config.warmup_steps
    factor = start + (1 - start) * min(1.0, step / warm) if warm else 1.0
    match config.schedule:
        case "poly":
            return float(factor * max(0.0, 1.0 - step / config.steps) ** config.power)
        case "step":
            return factor * 0.1 ** sum(step >= milestone for milestone in config.milestones)
