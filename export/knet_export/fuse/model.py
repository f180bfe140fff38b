"""The fused model: the function of a trained K-Net, in the operations that a graph should have.

A separate module made from a trained model, which stays as it is. What is rewritten, and why that
is exact, stands in ``kernels`` (the dynamic kernels), ``layers`` (BatchNorm and pyramid pooling)
and ``swin`` (windows). The auxiliary classifier and dropout are left out; upsampling and argmax are
not part of it: ``graph.classmap`` or the runtime's exact postprocessing add them.
"""

from __future__ import annotations

import copy
from math import prod
from typing import ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from knet_export.fuse.kernels import (
    FoldedGather,
    FoldedMaskKernels,
    apply_kernels,
    constant_inputs,
    gather,
    sum_scale,
)
from knet_export.fuse.layers import MatrixPyramid, fold_batch_norms
from knet_export.fuse.swin import StaticSwin
from knet_runtime.bundle.manifest import InputSpec, OutputSpec, Precision
from knet_runtime.errors import ConfigError
from knet_runtime.types import Size
from knet_train.models.backbones import SwinBackbone, level_channels
from knet_train.models.heads import PyramidPooling
from knet_train.models.knet import KernelUpdateStage, KNet

_PROBE = 64  # pixels a side of the images that show which norm follows which convolution


class Fused(nn.Module):
    """A network for one graph. Whatever has the image's size is in the modules ``PIXELS``, of the
    dtype of their weights; the rest is of the dtype of the input's ``mean`` and ``std``."""

    PIXELS: ClassVar[tuple[str, ...]]

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def normalised(self, image: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] RGB -> [B, 3, H, W]."""
        # Cast first: TensorRT has uint8 as a type of inputs only, not of what is transposed.
        return (image.to(self.mean.dtype).permute(0, 3, 1, 2) - self.mean) / self.std


AnyFused = TypeVar("AnyFused", bound=Fused)


class FusedStage(nn.Module):
    """A ``KernelUpdateStage`` without its feature transform. All its tensors are of the size of the
    kernels, none of the size of the image; its weights' dtype is the one it computes in."""

    gate: Tensor
    candidate: Tensor

    def __init__(self, stage: KernelUpdateStage, scale: float, initial: Tensor | None) -> None:
        """``scale`` is ``kernels.sum_scale``; ``initial`` are the kernels [N, C] if this is the
        first stage, whose kernels are constants."""
        super().__init__()
        stage = copy.deepcopy(stage)
        updator = stage.updator
        self.gather = FoldedGather(stage.feat_transform, updator.dynamic_layer, scale)
        if initial is not None:
            gate, candidate = constant_inputs(updator, initial)
            self.register_buffer("gate", gate)
            self.register_buffer("candidate", candidate)
        else:
            self.input_layer, self.input_norm_out = updator.input_layer, updator.input_norm_out
        self.width = updator.width
        self.input_gate, self.input_norm_in = updator.input_gate, updator.input_norm_in
        self.update_gate, self.norm_in = updator.update_gate, updator.norm_in
        self.norm_out = updator.norm_out
        self.fc_layer, self.fc_norm = updator.fc_layer, updator.fc_norm
        self.attention, self.attention_norm = stage.attention, stage.attention_norm
        self.ffn, self.ffn_norm = stage.ffn, stage.ffn_norm
        self.mask_fc = stage.mask_fc
        self.mask_kernels = FoldedMaskKernels(stage.feat_transform, stage.fc_mask)

    def forward(
        self, sums: Tensor, amounts: Tensor, kernels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rescaled sums [B, N, C] and amounts [B, N] (``rewrites.gather``), kernels [B, N, C] (None
        for the first stage) -> new kernels [B, N, C]; kernels [B, N, C] and offsets [B, N] that
        give the masks from the untransformed features."""
        kernels = self._update(self.gather(sums, amounts), kernels).reshape_as(sums)
        kernels = self.attention_norm(kernels + self.attention(kernels))
        kernels = self.ffn_norm(kernels + self.ffn(kernels))
        mask_kernels, offset = self.mask_kernels(self.mask_fc(kernels))
        return kernels, mask_kernels, offset

    def _update(self, group: Tensor, kernels: Tensor | None) -> Tensor:
        """``KernelUpdator`` (eqs. 4 and 5) on [B, N·parts, 2w] -> [B, N·parts, w]."""
        group_in, group_out = group.chunk(2, dim=-1)
        if kernels is None:
            kernel_in, candidate = self.gate, self.candidate
        else:
            parts = kernels.reshape(kernels.shape[0], -1, self.width)
            kernel_in, kernel_out = self.input_layer(parts).chunk(2, dim=-1)
            candidate = self.input_norm_out(kernel_out)
        gate = group_in * kernel_in
        input_gate = torch.sigmoid(self.input_norm_in(self.input_gate(gate)))
        update_gate = torch.sigmoid(self.norm_in(self.update_gate(gate)))
        mixed = update_gate * self.norm_out(group_out) + input_gate * candidate
        return torch.relu(self.fc_norm(self.fc_layer(mixed)))


class FusedKNet(Fused):
    """uint8 [B, H, W, 3] RGB -> float32 logits [B, N, H/s, W/s] of the last stage."""

    PIXELS = ("backbone", "head", "classifier")

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        classifier: nn.Linear,
        stages: list[FusedStage],
        scale: float,
        mean: Tensor,
        std: Tensor,
    ) -> None:
        super().__init__(mean, std)
        self.backbone, self.head, self.classifier = backbone, head, classifier
        self.stages = nn.ModuleList(stages)
        self.scale = scale

    def forward(self, image: Tensor) -> Tensor:
        exact, fast = self.mean.dtype, self.classifier.weight.dtype
        grid = self.head(self.backbone(self.normalised(image).to(fast)))
        features = grid.flatten(2)  # [B, C, P]
        if self.stages:
            logits = self._updated(features, exact)
        else:  # the initial kernels are the answer
            logits = self.classifier.weight @ features + self.classifier.bias.unsqueeze(-1)
        grid_logits = logits.unflatten(2, (grid.shape[2], grid.shape[3]))  # type: ignore[no-untyped-call]
        out: Tensor = grid_logits.to(exact)
        return out

    def _updated(self, features: Tensor, exact: torch.dtype) -> Tensor:
        """Features [B, C, P] -> logits [B, N, P] of the last stage."""
        fast = features.dtype
        pixels = features.transpose(1, 2)
        masks: Tensor = self.classifier(pixels)  # [B, P, N]
        kernels: Tensor | None = None
        last = len(self.stages) - 1
        for number, stage in enumerate(self.stages):
            sums, amounts = gather(features, masks, self.scale, exact)
            kernels, mask_kernels, offset = stage(sums, amounts, kernels)
            mask_kernels, offset = mask_kernels.to(fast), offset.to(fast)
            if number < last:
                masks = apply_kernels(pixels, mask_kernels, offset)
        logits: Tensor = mask_kernels @ features + offset.unsqueeze(-1)
        return logits


def fuse_for(model: KNet, spec: InputSpec, output: OutputSpec, precision: Precision) -> FusedKNet:
    """The fused model for all images that ``spec`` takes. It is float32 still; for fp16 its sums
    over pixels are rescaled so that they will fit. Raises ConfigError for Swin with free sizes."""
    largest = spec.sizes.max if spec.sizes else spec.size
    pixels = prod(output.shape(largest)[1:]) if precision == "fp16" else 0
    return fuse(model, None if spec.sizes else largest, pixels=pixels)


@torch.no_grad()
def fuse(model: KNet, size: Size | None, *, pixels: int = 0) -> FusedKNet:
    """The fused model of ``model`` (in evaluation mode, float32 or float64), for images of ``size``
    or, where that is None, of any.

    ``pixels`` is the largest number of logits' pixels of an image if sums over them must fit into
    fp16; 0 leaves them unscaled. Raises ConfigError for Swin without a size.
    """
    backbone = fuse_backbone(model.backbone, size)
    initial = model.conv_seg.weight.flatten(1)
    classifier = nn.Linear(initial.shape[1], initial.shape[0], device="meta", dtype=initial.dtype)
    classifier.weight = nn.Parameter(initial.clone())
    assert model.conv_seg.bias is not None
    classifier.bias = nn.Parameter(model.conv_seg.bias.clone())
    scale = sum_scale(pixels) if pixels else 1.0
    fused = FusedKNet(
        backbone,
        _with_matrices(copy.deepcopy(model.head)),
        classifier,
        [
            FusedStage(cast(KernelUpdateStage, stage), scale, initial if number == 0 else None)
            for number, stage in enumerate(model.stages)
        ],
        scale,
        model.mean.clone(),
        model.std.clone(),
    )
    channels = level_channels(model.backbone)
    sides = (_PROBE >> (level + 2) for level in range(len(channels)))
    levels = [model.mean.new_zeros(1, c, s, s) for c, s in zip(channels, sides, strict=True)]
    fold_batch_norms(fused.head, levels)
    return plain(fused)


@torch.no_grad()
def fuse_backbone(backbone: nn.Module, size: Size | None) -> nn.Module:
    """A copy without BatchNorm; Swin's windows become constants. Raises ConfigError for Swin
    without a size."""
    if isinstance(backbone, SwinBackbone):  # which has no BatchNorm
        if size is None:
            raise ConfigError(
                "a Swin backbone's windows and masks are constants of one size: "
                "export it with --size, not --dynamic"
            )
        return StaticSwin(backbone, size).eval()
    copied = copy.deepcopy(backbone)
    fold_batch_norms(copied, next(copied.parameters()).new_zeros(1, 3, _PROBE, _PROBE))
    return copied


def plain(fused: AnyFused) -> AnyFused:
    """``fused``, in evaluation mode, as a graph wants it: there is no "in place", and tracing it
    costs time."""
    for module in fused.modules():
        if isinstance(module, nn.ReLU | nn.ReLU6):
            module.inplace = False
    return fused.eval().requires_grad_(False)


def _with_matrices(head: nn.Module) -> nn.Module:
    for name, child in head.named_children():
        if isinstance(child, PyramidPooling):
            setattr(head, name, MatrixPyramid(child))
    return head
