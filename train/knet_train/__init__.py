"""K-Net in PyTorch: networks, data, training, evaluation.

from knet_train import load_checkpoint

model = load_checkpoint("runs/street/best.safetensors")
logits = model(images)  # uint8 [B, H, W, 3] RGB -> float32 [B, N, H/s, W/s]
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from knet_train.models.knet import KNet

__all__ = ["KNet", "load_checkpoint"]


def __getattr__(name: str) -> Any:
    # PyTorch is loaded when it is asked for: data folders are read on devices without it.
    if name == "KNet":
        from knet_train.models.knet import KNet

        return KNet
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load_checkpoint(path: Path | str) -> KNet:
    """The network of a checkpoint that `train` or `import-mmseg` wrote, in evaluation mode.

    Raises CheckpointError when the file is missing, damaged or foreign.
    """
    from knet_train.checkpoint import read_checkpoint

    return read_checkpoint(Path(path)).model
