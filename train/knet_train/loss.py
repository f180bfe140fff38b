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


def stage_losses(
    logits: Sequence[Tensor],
    labels: Tensor,
    config: LossConfig,
    weights: Tensor,
    ignore_index: int,
) -> Tensor:
    """Weighted sum of the cross-entropies of all stages.

    Logits [B, N, h, w] are upsampled bilinearly to the label size [B, H, W]; the mean is over
    labelled pixels, weighted by class. The last stage is compared at every pixel, the earlier
    ones at every ``early_label_stride``-th, which saves a fifth of a step.
    """
    total = torch.zeros((), device=labels.device)
    last = len(logits) - 1
    for index, (scale, stage) in enumerate(zip(config.stage_weights, logits, strict=True)):
        step = 1 if index == last else config.early_label_stride
        # No pixel lies at the centre of an even stride's cell; the stages take the pixel before
        # it and the pixel behind it in turn, so that no shift is learnt.
        offset = (step - 1) // 2 if index % 2 else step // 2
        target = labels[:, offset::step, offset::step].long()
        full = F.interpolate(stage.float(), target.shape[-2:], mode="bilinear", align_corners=False)
        summed = F.cross_entropy(full, target, weights, ignore_index=ignore_index, reduction="sum")
        labelled = target[target != ignore_index]
        total = total + scale * summed / weights[labelled].sum().clamp(min=1e-6)
    return total
