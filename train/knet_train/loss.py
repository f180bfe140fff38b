"""Cross-entropy on every stage's masks, with class weights taken from the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from knet_train.config import LossConfig


def class_weights(pixels: NDArray[np.int64], exponent: float) -> NDArray[np.float32]:
    """Median-frequency balancing (Eigen and Fergus, arXiv 1411.4734), softened by ``exponent``.

    ``pixels`` counts the training pixels of each class; a class that never occurs weighs 1.
    """
    frequency = pixels / max(int(pixels.sum()), 1)
    median = np.median(frequency[frequency > 0]) if (frequency > 0).any() else 1.0
    ratio = np.divide(median, frequency, out=np.ones_like(frequency), where=frequency > 0)
    return np.asarray(ratio**exponent, np.float32)


def training_loss(
    logits: Sequence[Tensor],
    auxiliary: Tensor | None,
    labels: Tensor,
    config: LossConfig,
    weights: Tensor,
    ignore_index: int,
    divisors: Tensor | None = None,
) -> Tensor:
    """Weighted sum of the cross-entropies of all stages and of the auxiliary classifier.

    Logits [B, N, h, w] are upsampled bilinearly to the label size [B, H, W]. With
    ``config.mean_over`` "labelled" the mean is over labelled pixels, weighted by class; with "all"
    the sum is divided by the number of all pixels, ignored ones too (mmsegmentation's
    ``avg_non_ignore=False``). The last stage is compared at every pixel, the earlier ones at every
    ``early_label_stride``-th, which saves a fifth of a step of a small network.

    Where ``labels`` are a part of what a step's mean is over, ``divisors`` are those of the whole
    (see ``loss_divisors``), divided by the number of parts: the mean of the parts' losses is then
    the loss of the whole.
    """
    if divisors is None:
        divisors = loss_divisors(labels, config, weights, ignore_index)
    total = torch.zeros((), device=labels.device)
    stages = zip(config.stage_weights, logits, stage_labels(labels, config), divisors, strict=True)
    for scale, stage, target, divisor in stages:
        loss: Tensor = _UpsampledCrossEntropy.apply(stage, target, weights, ignore_index)
        total = total + scale * loss / divisor
    if auxiliary is not None:
        loss = _UpsampledCrossEntropy.apply(auxiliary, labels, weights, ignore_index) / divisors[-1]
        total = total + config.auxiliary_weight * loss
    return total


def loss_divisors(labels: Tensor, config: LossConfig, weights: Tensor, ignore_index: int) -> Tensor:
    """What the summed cross-entropy of each stage is divided by, float32 [S + 1]."""
    divisors = []
    for target in stage_labels(labels, config):
        if config.mean_over == "all":
            divisors.append(torch.tensor(float(target.numel()), device=labels.device))
        else:
            labelled = target[target != ignore_index].long()
            divisors.append(weights[labelled].sum().clamp(min=1e-6))
    return torch.stack(divisors)


def stage_labels(labels: Tensor, config: LossConfig) -> list[Tensor]:
    """The labels that each stage is compared with, [B, H / stride, W / stride] for all but the
    last."""
    last = len(config.stage_weights) - 1
    targets = []
    for index in range(last + 1):
        step = 1 if index == last else config.early_label_stride
        # No pixel lies at the centre of an even stride's cell; the stages take the pixel before
        # it and the pixel behind it in turn, so that no shift is learnt.
        offset = (step - 1) // 2 if index % 2 else step // 2
        targets.append(labels[:, offset::step, offset::step])
    return targets


class _UpsampledCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of logits [B, N, h, w], resized to the labels [B, H, W].

    Its gradient is computed at once, an image at a time. The tensors [B, N, H, W] that autograd
    would keep of every stage until the backward pass (2.5 GB each for 16 images of 512×512 and
    150 classes) are then never held; the gradient is the same, as the loss is a sum over images.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, weights: Tensor, ignore_index: int
    ) -> Tensor:
        total = torch.zeros((), device=labels.device)
        gradients: list[Tensor] = []
        for image, label in zip(torch.split(logits, 1), torch.split(labels, 1), strict=True):
            with torch.enable_grad():
                # In float32, as nobody has scaled this loss yet for half precision's range.
                leaf = image.detach().float().requires_grad_()
                full = F.interpolate(leaf, label.shape[-2:], mode="bilinear", align_corners=False)
                loss = F.cross_entropy(
                    full, label.long(), weights, ignore_index=ignore_index, reduction="sum"
                )
            gradients += torch.autograd.grad(loss, leaf)
            total = total + loss.detach()
        ctx.save_for_backward(torch.cat(gradients))
        ctx.dtype = logits.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        return (saved * gradient).to(ctx.dtype), None, None, None
