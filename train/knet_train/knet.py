"""K-Net for semantic segmentation (arXiv 2106.14855): backbone, feature head, kernels.

The learned weights of the first 1×1 classifier are the initial kernels; S update stages make them
depend on the image. Every stage reads the *same* feature map, every stage's masks are supervised
in training, and the last stage's are the answer (as in mmsegmentation's ``IterativeDecodeHead``).
Input is an RGB image in 0 … 255; mean and std are buffers used inside ``forward``, so that no
runtime can normalise differently.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from knet_train.kernels import KernelUpdateStage


class KNet(nn.Module):
    """The whole network; its parts are built by ``knet_train.build`` and passed in."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        stages: Sequence[KernelUpdateStage],
        *,
        classes: int,
        channels: int,
        dropout: float,
        mean: Sequence[float],
        std: Sequence[float],
        auxiliary: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.conv_seg = nn.Conv2d(channels, classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        assert self.conv_seg.bias is not None
        nn.init.zeros_(self.conv_seg.bias)
        self.dropout = nn.Dropout2d(dropout)
        self.stages = nn.ModuleList(stages)
        self.auxiliary = auxiliary
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """RGB images [B, H, W, 3] in 0 … 255 (uint8, or floats), of any size -> logits
        [B, N, H/s, W/s] (rounded up) of the last stage: the prediction."""
        return self.stage_logits(images)[-1]

    def stage_logits(self, images: Tensor) -> list[Tensor]:
        """RGB images [B, H, W, 3] in 0 … 255 -> logits [B, N, H/s, W/s] of the initial kernels
        and of every stage."""
        return self.decode(self.levels(images))

    def training_logits(self, images: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """``stage_logits``, and the auxiliary classifier's logits where the model has one."""
        levels = self.levels(images)
        auxiliary = None if self.auxiliary is None else self.auxiliary(levels)
        return self.decode(levels), auxiliary

    def levels(self, images: Tensor) -> list[Tensor]:
        """RGB images [B, H, W, 3] in 0 … 255 -> the backbone's levels, finest first."""
        # The weights decide the memory layout. The permuted view would make it channels-last, where
        # a CPU sums in another order: levels of resnet50c then differ from mmsegmentation's by up
        # to 1e-4, and otherwise by nothing.
        planes = images.permute(0, 3, 1, 2).to(self.mean.dtype).contiguous()
        levels: list[Tensor] = self.backbone((planes - self.mean) / self.std)
        return levels

    def decode(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """The backbone's levels -> logits of the initial kernels and of every stage."""
        features = self.head(levels)
        masks = self.conv_seg(self.dropout(features))
        kernels = self.conv_seg.weight.flatten(1).expand(features.shape[0], -1, -1)
        logits = [masks]
        for stage in self.stages:
            kernels, masks = stage(features, kernels, masks)
            logits.append(masks)
        return logits
