"""Cross-entropy on every stage's masks, with class weights taken from the data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

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
        total = total + scale * _summed(stage, target, weights, ignore_index) / divisor
    if auxiliary is not None:
        loss = _summed(auxiliary, labels, weights, ignore_index) / divisors[-1]
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


def _summed(logits: Tensor, target: Tensor, weights: Tensor, ignore_index: int) -> Tensor:
    full = F.interpolate(logits.float(), target.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(full, target.long(), weights, ignore_index=ignore_index, reduction="sum")
