"""K-Net as published, and the graph that a plain ``torch.onnx.export`` makes of it.

As in mmsegmentation's ``knet_head.py``: every stage transforms its features by a 1×1 convolution
over all pixels, gathers by einsum, and applies the kernels as one convolution for each image in a
Python loop. Resizing to the frame's size and argmax are in the graph, since whoever exports the
model whole has them there. The weights are those of a ``KNet``, which this equals in real numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from knet_export.graph.to_onnx import quiet
from knet_runtime.manifest import Size
from knet_train.kernels import KernelUpdateStage
from knet_train.knet import KNet

INPUT_NAME, OUTPUT_NAME = "input", "classes"


class NaiveKNet(nn.Module):
    """Normalised images [B, 3, H, W] -> classes int64 [B, *size]."""

    def __init__(self, model: KNet, size: Size) -> None:
        super().__init__()
        self.model, self.size = model, size

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        logits = F.interpolate(
            self.logits(images), size=self.size, mode="bilinear", align_corners=False
        )
        return logits.argmax(1)

    def logits(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] -> the last stage's logits [B, N, h, w]."""
        model = self.model
        features = model.head(model.backbone(images))
        masks = model.conv_seg(features)
        kernels = model.conv_seg.weight.flatten(1).expand(features.shape[0], -1, -1)
        for stage in model.stages:
            kernels, masks = _update(cast(KernelUpdateStage, stage), features, kernels, masks)
        return cast(Tensor, masks)


def _update(
    stage: KernelUpdateStage, features: Tensor, kernels: Tensor, masks: Tensor
) -> tuple[Tensor, Tensor]:
    transformed = stage.feat_transform(features)
    gathered = torch.einsum("bnhw,bchw->bnc", masks.softmax(1), transformed)
    kernels = stage.updator(gathered, kernels)
    kernels = stage.attention_norm(kernels + stage.attention(kernels))
    kernels = stage.ffn_norm(kernels + stage.ffn(kernels))
    mask_kernels = stage.fc_mask(stage.mask_fc(kernels))
    predicted = [
        F.conv2d(transformed[image : image + 1], mask_kernels[image, :, :, None, None])
        for image in range(features.shape[0])
    ]
    return kernels, torch.cat(predicted)


def export_naive(model: KNet, size: Size, frame: Size, path: Path) -> None:
    """Write the graph for one image of ``size`` and frames of ``frame`` (height, width), with no
    option but the names."""
    example = torch.zeros(1, 3, *size)
    with quiet(), torch.no_grad():
        torch.onnx.export(
            NaiveKNet(model, frame).eval(),
            (example,),
            path,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            verbose=False,
        )
