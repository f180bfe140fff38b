"""K-Net in PyTorch: networks, data, training, evaluation.

from knet_train import load_checkpoint

model = load_checkpoint("runs/street/best.safetensors")
logits = model(images)  # uint8 [B, H, W, 3] RGB -> float32 [B, N, H/s, W/s]
"""

from __future__ import annotations

from pathlib import Path

from knet_train.checkpoint import read_checkpoint
from knet_train.knet import KNet

__all__ = ["KNet", "load_checkpoint"]


def load_checkpoint(path: Path | str) -> KNet:
    """The network of a checkpoint that `train` or `import-mmseg` wrote, in evaluation mode.

    Raises CheckpointError when the file is missing, damaged or foreign.
    """
    return read_checkpoint(Path(path)).model
