"""The deploy form: what of a trained K-Net goes into the graph.

A separate module around the trained model, which stays as it is (see
``knet_train.kernels`` for the kernels as one batched product, which keeps the batch dynamic).
It takes pictures as the runtime has them and gives the low-resolution logits of the last stage:
upsampling and argmax are the runtime's exact tail.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from knet_train.knet import KNet


class DeployKNet(nn.Module):
    """uint8 [B, H, W, 3] RGB -> float32 [B, N, H/s, W/s] logits; cast and normalised inside."""

    def __init__(self, model: KNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.model(image)
        return logits


@torch.no_grad()
def reference_logits(model: KNet, images: Tensor) -> Tensor:
    """What the graph must give for uint8 [B, H, W, 3]: PyTorch's own logits in float32."""
    result: Tensor = DeployKNet(model)(images).float()
    return result
