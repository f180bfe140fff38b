"""K-Net in PyTorch: networks, data, training, evaluation.

    from knet_train import load_checkpoint

    model = load_checkpoint("runs/street/best.safetensors")
    logits = model(images)  # uint8 [B, H, W, 3] RGB -> float32 [B, N, H/s, W/s]

PyTorch is loaded when a name is first used: data folders are read on devices without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from knet_train.checkpoint import load_checkpoint
    from knet_train.models.knet import KNet

__all__ = ["KNet", "load_checkpoint"]

_HOME = {"KNet": "knet_train.models.knet", "load_checkpoint": "knet_train.checkpoint"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
