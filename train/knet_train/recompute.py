"""Gradient checkpointing (arXiv 1604.06174): the backbone is computed twice, and its activations
are not kept in between."""

from __future__ import annotations

from timm.models import FeatureHookNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from knet_runtime.errors import ConfigError


def recompute_backbone(backbone: nn.Module, name: str) -> None:
    """Switch gradient checkpointing on; ConfigError when this kind of backbone has none."""
    enable = getattr(backbone, "set_grad_checkpointing", None)
    # timm never recomputes the first module of such a network, and this one has no other.
    whole = isinstance(backbone, FeatureHookNet) and len(backbone) == 1
    if enable is None or whole:
        raise ConfigError(
            f"model.backbone: {name} can not be recomputed: pass "
            "--set trainer.gradient_checkpointing=false"
        )
    enable(True)


class HeldStatistics:
    """Keeps BatchNorms in training from updating their statistics during the backward pass: what
    is computed there for the second time must not count twice."""

    def __init__(self) -> None:
        self._held: list[tuple[_BatchNorm, float | None, Tensor]] = []

    def hold(self, model: nn.Module) -> None:
        """To be called before the backward pass."""
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.training:
                counted = module.num_batches_tracked
                if counted is not None:
                    self._held.append((module, module.momentum, counted))
        if self._held:
            nowhere = self._held[0][2].clone()
            for module, _, _ in self._held:
                module.momentum = 0.0
                module.num_batches_tracked = nowhere

    def release(self) -> None:
        """To be called after the backward pass."""
        for module, momentum, counted in self._held:
            module.momentum = momentum
            module.num_batches_tracked = counted
        self._held.clear()
