"""Cross-entropy on every stage's masks, with class weights taken from the data, and distillation:
their divergence from a teacher's probabilities (arXiv 1503.02531)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        total = total + scale * _cross_entropy(stage, target, weights, ignore_index) / divisor
    if auxiliary is not None:
        loss = _cross_entropy(auxiliary, labels, weights, ignore_index) / divisors[-1]
        total = total + config.auxiliary_weight * loss
    return total


def loss_divisors(labels: Tensor, config: LossConfig, weights: Tensor, ignore_index: int) -> Tensor:
    """What the summed cross-entropy of each stage is divided by, float32 [S + 1]."""
    divisors = []
    for target in stage_labels(labels, config):
        if config.mean_over == "all":
            divisors.append(torch.tensor(max(1.0, target.numel()), device=labels.device))
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


def distillation_loss(
    logits: Sequence[Tensor],
    soft: Tensor,
    config: LossConfig,
    weights: Tensor,
    divisor: Tensor | None = None,
) -> Tensor:
    """Weighted sum, by ``config.stage_weights``, of the divergences of the stages' softmax from the
    soft labels uint8 [B, N, h, w], to whose size the logits are upsampled bilinearly.

    Class weights w mean what they mean in the cross-entropy, whose least value has a softmax
    proportional to w·p, not to p. So with a teacher's probabilities p the target is
    r = (w·p)^(1/T), normalised; a pixel weighs Σ w·p; its loss is T²·KL(r ‖ softmax(logits / T)).
    With p of one class only and T = 1 this is the weighted cross-entropy. The mean is over the
    pixels that have soft labels: those without hold 0 for every class.

    ``divisor`` is that of the whole step where these are a part of it, as in ``training_loss``.
    """
    if divisor is None:
        divisor = distillation_divisor(soft, weights)
    has_any = soft.flatten(1).any(1).tolist()
    temperature, last = config.distill_temperature, len(logits) - 1
    total = torch.zeros((), device=soft.device)
    for index, (scale, stage) in enumerate(zip(config.stage_weights, logits, strict=True)):
        if not scale or (config.distill_stages == "last" and index < last):
            continue

        def divergence(full: Tensor, number: int) -> Tensor:
            weighted = _weighted(soft[number], weights)
            target = weighted ** (1 / temperature)
            whole = target.sum(0, keepdim=True)
            target = target / whole.masked_fill(whole == 0, 1)
            learnt = F.log_softmax(full[0] / temperature, 0)
            each = F.kl_div(learnt, target, reduction="none").sum(0)
            return (each * weighted.sum(0)).sum() * temperature**2

        size = (soft.shape[-2], soft.shape[-1])
        loss: Tensor = _SummedOverImages.apply(stage, size, has_any, divergence)
        total = total + scale * loss
    return total / divisor


def distillation_divisor(soft: Tensor, weights: Tensor) -> Tensor:
    """What the summed divergence from soft labels [B, N, h, w] is divided by, float32 []."""
    sums = [_weighted(one, weights).sum() for one in soft]
    return torch.stack(sums).sum().clamp(min=1e-6)


def _weighted(soft: Tensor, weights: Tensor) -> Tensor:
    """Values uint8 [N, h, w] -> probabilities times the classes' weights; 0 where none is known."""
    values = soft.float()
    return values / values.sum(0, keepdim=True).clamp(min=1) * weights[:, None, None]


def _cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor, ignore_index: int) -> Tensor:
    """Summed over the labels [B, H, W]."""

    def cross_entropy(full: Tensor, number: int) -> Tensor:
        label = labels[number : number + 1].long()
        return F.cross_entropy(full, label, weights, ignore_index=ignore_index, reduction="sum")

    size = (labels.shape[-2], labels.shape[-1])
    labelled = (labels != ignore_index).flatten(1).any(1).tolist()
    loss: Tensor = _SummedOverImages.apply(logits, size, labelled, cross_entropy)
    return loss


class _SummedOverImages(torch.autograd.Function):
    """The sum of ``loss_of`` each image's logits [1, N, h, w], resized to ``size``, and its number,
    for the images that ``count``.

    Its gradient is computed at once, an image at a time. The tensors [B, N, H, W] that autograd
    would keep of every stage until the backward pass (2.5 GB each for 16 images of 512×512 and
    150 classes) are then never held; the gradient is the same, as the loss is a sum over images.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        size: tuple[int, int],
        count: Sequence[bool],
        loss_of: Callable[[Tensor, int], Tensor],
    ) -> Tensor:
        total = torch.zeros((), device=logits.device)
        gradients: list[Tensor] = []
        for number, image in enumerate(torch.split(logits, 1)):
            if not count[number]:
                gradients.append(torch.zeros_like(image, dtype=torch.float32))
                continue
            with torch.enable_grad():
                # In float32, as nobody has scaled this loss yet for half precision's range.
                leaf = image.detach().float().requires_grad_()
                full = F.interpolate(leaf, size, mode="bilinear", align_corners=False)
                loss = loss_of(full, number)
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
