"""K-Net for semantic segmentation (arXiv 2106.14855): backbone, feature head, dynamic kernels.

The learned weights of the first 1×1 classifier are the initial kernels; S update stages (section
3.2) make them depend on the image. A stage takes the feature map X, the kernels and the masks that
those kernels produced, and returns better kernels and better masks:

1. gather    G = A · X'ᵀ, A = softmax_N(M)     a group feature per kernel, eq. 3
2. update    K' = gates(G, K)                   adaptive kernel update, eqs. 4 and 5
3. interact  attention over the N kernels, then a feed-forward network
4. predict   M' = Q(K') · X'                    every kernel is a 1×1 convolution

Every stage reads the *same* feature map, every stage's masks are supervised in training, and the
last stage's are the answer (as in mmsegmentation's ``IterativeDecodeHead``). Details (which half of
a linear is which, where norms sit) follow mmsegmentation 1.x,
``mmseg/models/decode_heads/knet_head.py``.

Kernels are applied as one batched matrix product instead of a convolution per image, so nothing
here depends on the batch. X' = T X + t is a 1×1 convolution of the features, and enters both
products linearly: G = (A Xᵀ) Tᵀ + (A 1) tᵀ and M' = (Q T) X + (Q t) 1ᵀ. So T is applied to N
kernels instead of to every pixel, and no X' is kept for the backward pass.

Input is an RGB image in 0 … 255; mean and std are buffers used inside ``forward``, so that no
runtime can normalise differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class KNet(nn.Module):
    """The whole network; its parts are built by ``knet_train.models.build`` and passed in.

    >>> import torch
    >>> from knet_deploy import load_checkpoint
    >>> model = load_checkpoint("best.safetensors")
    >>> model(torch.zeros(1, 64, 96, 3, dtype=torch.uint8)).shape
    torch.Size([1, 11, 16, 24])
    """

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
            kernels, masks, _ = stage(features, kernels, masks)
            logits.append(masks)
        return logits


class StageOutput(NamedTuple):
    """Kernels [B, N, C], their mask logits [B, N, H, W], and their class logits [B, N, K] where the
    stage has a class branch."""

    kernels: Tensor
    masks: Tensor
    classes: Tensor | None = None


class KernelUpdateStage(nn.Module):
    """One round of kernel update and mask prediction.

    In semantic segmentation every kernel is a class, so that the masks compete for each pixel: A is
    their softmax. With a class branch of so many ``classes`` (sigmoid, no background) a kernel is
    an object or a class of stuff: A is its own mask, M > 0, a hard one.
    """

    def __init__(
        self, channels: int, width: int, heads: int, ffn_channels: int, classes: int = 0
    ) -> None:
        super().__init__()
        self.feat_transform = nn.Conv2d(channels, channels, 1)
        self.updator = KernelUpdator(width)
        self.attention = KernelAttention(channels, heads)
        self.attention_norm = nn.LayerNorm(channels)
        self.ffn = nn.Sequential(
            nn.Linear(channels, ffn_channels),
            nn.ReLU(inplace=True),
            nn.Linear(ffn_channels, channels),
        )
        self.ffn_norm = nn.LayerNorm(channels)
        self.mask_fc = nn.Sequential(
            nn.Linear(channels, channels, bias=False), nn.LayerNorm(channels), nn.ReLU(inplace=True)
        )
        self.fc_mask = nn.Linear(channels, channels)
        self.class_fc: nn.Sequential | None = None
        if classes:
            self.class_fc = nn.Sequential(
                nn.Linear(channels, channels, bias=False),
                nn.LayerNorm(channels),
                nn.ReLU(inplace=True),
            )
            self.fc_class = nn.Linear(channels, classes)

    def forward(self, features: Tensor, kernels: Tensor, masks: Tensor) -> StageOutput:
        """Features [B, C, H, W], kernels [B, N, C], mask logits [B, N, H, W] -> new ones."""
        height, width = features.shape[-2:]
        pixels = features.flatten(2)
        transform, shift = self.feat_transform.weight.flatten(1), self.feat_transform.bias
        assert shift is not None
        assignment = masks.flatten(2) > 0 if self.class_fc else torch.softmax(masks.flatten(2), 1)
        assignment = assignment.to(pixels.dtype)
        sums = assignment @ pixels.transpose(1, 2)
        gathered = sums @ transform.T + assignment.sum(-1, keepdim=True) * shift

        kernels = self.updator(gathered, kernels)
        kernels = self.attention_norm(kernels + self.attention(kernels))
        kernels = self.ffn_norm(kernels + self.ffn(kernels))

        mask_kernels = self.fc_mask(self.mask_fc(kernels))
        offset = (mask_kernels @ shift).unsqueeze(-1)
        predicted: Tensor = torch.baddbmm(offset, mask_kernels @ transform, pixels)
        classes = self.fc_class(self.class_fc(kernels)) if self.class_fc else None
        return StageOutput(kernels, predicted.reshape(*predicted.shape[:2], height, width), classes)


class KernelUpdator(nn.Module):
    """Adaptive kernel update, eqs. 4 and 5: how much of the gathered feature enters a kernel.

    ``width`` may be a divisor of the kernels' C: each kernel is then ``C / width`` parts that
    share all weights (the published models use C = 512, width = 256).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.dynamic_layer = nn.Linear(width, 2 * width)
        self.input_layer = nn.Linear(width, 2 * width)
        self.input_gate = nn.Linear(width, width)
        self.update_gate = nn.Linear(width, width)
        self.norm_in = nn.LayerNorm(width)
        self.norm_out = nn.LayerNorm(width)
        self.input_norm_in = nn.LayerNorm(width)
        self.input_norm_out = nn.LayerNorm(width)
        self.fc_layer = nn.Linear(width, width)
        self.fc_norm = nn.LayerNorm(width)

    def forward(self, gathered: Tensor, kernels: Tensor) -> Tensor:
        """Group features and kernels, both [B, N, C] -> updated kernels [B, N, C]."""
        batch, count, channels = kernels.shape
        parts = (batch, count * channels // self.width, self.width)
        group_in, group_out = self.dynamic_layer(gathered.reshape(parts)).chunk(2, dim=-1)
        kernel_in, kernel_out = self.input_layer(kernels.reshape(parts)).chunk(2, dim=-1)
        gate = group_in * kernel_in
        input_gate = torch.sigmoid(self.input_norm_in(self.input_gate(gate)))
        update_gate = torch.sigmoid(self.norm_in(self.update_gate(gate)))
        group_part = update_gate * self.norm_out(group_out)
        mixed = group_part + input_gate * self.input_norm_out(kernel_out)
        updated: Tensor = torch.relu(self.fc_norm(self.fc_layer(mixed)))
        return updated.reshape(batch, count, channels)


class KernelAttention(nn.Module):
    """Multi-head self-attention over the N kernels, without positions.

    Written as plain products because ``nn.MultiheadAttention`` does not export with dynamic sizes;
    the packed ``in_proj`` keeps its weights interchangeable with it.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(channels, 3 * channels)
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj.weight)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, kernels: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        batch, count, channels = kernels.shape
        depth = channels // self.heads
        packed = self.in_proj(kernels).reshape(batch, count, 3, self.heads, depth)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (query * depth**-0.5) @ key.transpose(-2, -1)
        mixed = torch.softmax(scores, dim=-1) @ value
        out: Tensor = self.out_proj(mixed.transpose(1, 2).reshape(batch, count, channels))
        return out
