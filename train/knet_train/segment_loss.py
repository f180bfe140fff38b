"""The losses of K-Net for instances and panoptic segmentation (arXiv 2106.14855, section 3.4).

Kernels of things are matched one to one with an image's objects (Hungarian matching); each stage
is matched by what the stage before it said, so that a kernel refines the object it already has.
Kernels of stuff belong to their class. Formulas and their order follow the authors' own code
(github ZwwWayne/K-Net, ``knet/det/``: ``kernel_head.py``, ``kernel_iter_head.py``,
``kernel_update_head.py``, ``mask_hungarian_assigner.py``).

Masks are compared at stride 4: those of the ground truth are made smaller, bilinearly, and stay
soft; the predictions are doubled.

The authors' code takes what is not labelled for background. Ours can leave it out
(``SegmentTargets.void``), which pictures with a few labelled classes need: masks of stuff and the
classifier learn nothing there, and a kernel that lies mostly there is not told that it is none. An
object is labelled as a whole, so its mask ends where its label does, whatever is beyond.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from knet_train.models.segments import TrainingOutputs, upsample_twice

_ALPHA, _GAMMA = 0.25, 2.0
_SMOOTH = 1e-3  # of dice
_IGNORED = -1
STRIDE = 4


class SegmentTargets(NamedTuple):
    """What is in one image, padded to the batch's size, at a quarter of it: ``masks`` [M, h, w] in
    0 … 1 and ``classes`` [M] of its things, ``stuff`` [S, h, w] and ``stuff_classes`` [S] of the
    classes of stuff that are in it (none for instances). ``void`` [h, w], in 0 … 1, is what nothing
    is learnt from; None takes it for background."""

    masks: Tensor
    classes: Tensor
    stuff: Tensor
    stuff_classes: Tensor
    void: Tensor | None = None


class Divisors(NamedTuple):
    """What the sums of a batch's losses are divided by: how many kernels of things have an object,
    how many kernels of all have a mask to make, and how many pixels have a class."""

    things: Tensor
    kernels: Tensor
    pixels: Tensor


def image_counts(targets: Sequence[SegmentTargets]) -> Tensor:
    """Objects, classes of stuff and pixels with a class in each image: float32 [B, 3]."""
    rows = []
    for one in targets:
        labelled = (torch.cat([one.masks, one.stuff]) > 0).any(0).sum()
        rows.append([len(one.masks), len(one.stuff), int(labelled)])
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 3)


def loss_divisors(counts: Tensor, kernels: int) -> Tensor:
    """Those of images with these ``image_counts`` [B, 3] and so many kernels of things, as they are
    added up over processes: float32 [3]. Objects beyond the number of kernels have none."""
    things = counts[:, 0].clamp(max=kernels).sum()
    return torch.stack([things, things + counts[:, 1].sum(), counts[:, 2].sum()])


def shrunk(masks: Tensor) -> Tensor:
    """Masks [M, H, W] of 0 and 1 -> soft ones at a quarter of the size."""
    height, width = masks.shape[-2:]
    size = (height // STRIDE, width // STRIDE)
    if not len(masks):
        return masks.new_zeros((0, *size), dtype=torch.float32)
    return F.interpolate(masks[None].float(), size, mode="bilinear", align_corners=False)[0]


def match(masks: Tensor, classes: Tensor | None, targets: SegmentTargets) -> Tensor:
    """The object that each kernel of things has, int64 [N], or -1.

    ``masks`` [N, h, w] are logits at the targets' size; ``classes`` [N, K] logits, None before
    there are any. One to one, at the smallest sum of class, dice and mask costs.
    """
    found = torch.full((len(masks),), -1, dtype=torch.int64, device=masks.device)
    if not len(targets.masks):
        return found
    predicted = masks.sigmoid().flatten(1)
    truth = targets.masks.flatten(1)
    inner = predicted @ truth.T
    squares = (predicted**2).sum(1)[:, None] + (truth**2).sum(1) + 2 * _SMOOTH
    cost = -4 * 2 * inner / squares
    cost -= (inner + (1 - predicted) @ (1 - truth).T) / predicted.shape[1]
    if classes is not None:
        p = classes.sigmoid()
        rest = 1 - p
        positive = -(p + 1e-12).log() * _ALPHA * rest**_GAMMA
        negative = -(rest + 1e-12).log() * (1 - _ALPHA) * p**_GAMMA
        cost += 2 * (positive - negative)[:, targets.classes]
    rows, columns = linear_sum_assignment(cost.detach().cpu().numpy())
    found[torch.from_numpy(rows)] = torch.from_numpy(columns).to(found)
    return found


@dataclass(frozen=True)
class _Positives:
    """Of one image: the kernels that have a mask to make, and which."""

    kernels: Tensor
    masks: Tensor
    classes: Tensor
    known: Tensor  # [P, h, w] in 0 … 1: where each mask is


def segment_losses(
    outputs: TrainingOutputs,
    targets: Sequence[SegmentTargets],
    *,
    things: Sequence[int],
    stuff: Sequence[int],
    class_weight: float = 2.0,
    rank_weight: float = 0.1,
    negative_iou: float = 1.0,
    divisors: Divisors | None = None,
) -> dict[str, Tensor]:
    """All terms by name, weighted; their sum is what is minimised. ``class_weight`` is that of the
    kernels' classes, ``rank_weight`` (with ``stuff``) that of which kernel is the highest at a
    pixel: 2 and 0.1 in the authors' recipes. A kernel of things without an object is not told that
    it is none if its mask has an IoU above ``negative_iou`` with one: theirs is 1, so all are.

    Where ``targets`` are a part of what a step's means are over, ``divisors`` are those of the
    whole, divided by the number of parts: the mean of the parts' losses is then the loss of the
    whole. Without them they are the targets' own.
    """
    count = outputs.stages[0].masks.shape[1] - len(stuff)  # kernels of things
    of_things, of_all, pixels = divisors or (None, None, None)
    masks = [upsample_twice(stage.masks) for stage in outputs.stages]
    first = [match(m[:count].detach(), None, t) for m, t in zip(masks[0], targets, strict=True)]
    initial, rank = _positives(first, targets), rank_weight if stuff else None
    losses = _mask_losses("init", masks[0][:, :count], initial, of_things, rank=rank)
    losses["init_class"] = _semantic_loss(
        upsample_twice(outputs.semantic), initial, targets, pixels
    )
    matched = first
    thing_columns = torch.as_tensor(things, device=masks[0].device)
    for number, stage in enumerate(outputs.stages[1:]):
        if number:  # the first stage's are the initial kernels'
            before = outputs.stages[number].classes
            assert before is not None
            matched = [
                match(masks[number][b, :count].detach(), before[b, :count].detach(), target)
                for b, target in enumerate(targets)
            ]
        found = _positives(matched, targets, count, stuff)
        losses |= _mask_losses(f"stage{number}", masks[number + 1], found, of_all, rank=rank)
        assert stage.classes is not None
        own = masks[number + 1].detach()
        unknown = _in_void(own, targets)
        if negative_iou < 1:
            unknown[:, :count] |= _on_object(own[:, :count], targets, negative_iou)
        losses[f"stage{number}_class"] = class_weight * _class_loss(
            stage.classes, found, unknown, count, thing_columns, stuff, of_all
        )
    return losses


def _positives(
    matched: Sequence[Tensor],
    targets: Sequence[SegmentTargets],
    count: int = 0,
    stuff: Sequence[int] = (),
) -> list[_Positives]:
    """The kernels with a target in each image: matched ones, and, with ``stuff``, its rows after
    the ``count`` of things."""
    rows = {label: count + row for row, label in enumerate(stuff)}
    found = []
    for objects, target in zip(matched, targets, strict=True):
        kernels = (objects >= 0).nonzero()[:, 0]
        masks, classes = target.masks[objects[kernels]], target.classes[objects[kernels]]
        known = torch.ones_like(masks)
        if stuff:
            own = [rows[label] for label in target.stuff_classes.tolist()]
            kernels = torch.cat([kernels, torch.as_tensor(own, dtype=torch.int64).to(kernels)])
            masks = torch.cat([masks, target.stuff])
            classes = torch.cat([classes, target.stuff_classes])
            labelled = torch.ones_like(target.stuff)
            if target.void is not None:
                labelled = labelled - target.void
            known = torch.cat([known, labelled])
        found.append(_Positives(kernels, masks, classes, known))
    return found


def _in_void(masks: Tensor, targets: Sequence[SegmentTargets]) -> Tensor:
    """Which kernels have more than half of their mask where nothing is known: bool [B, N]."""
    rows = []
    for mask, target in zip(masks > 0, targets, strict=True):
        if target.void is None:
            rows.append(torch.zeros_like(mask[:, 0, 0]))
        else:
            rows.append(2 * (mask * target.void).sum((1, 2)) > mask.sum((1, 2)))
    return torch.stack(rows)


def _on_object(masks: Tensor, targets: Sequence[SegmentTargets], iou: float) -> Tensor:
    """Which kernels' masks have more than this IoU with an object's: bool [B, N]."""
    rows = []
    for mask, target in zip(masks > 0, targets, strict=True):
        own, objects = mask.flatten(1).float(), (target.masks > 0.5).flatten(1).float()
        both = own @ objects.T
        either = own.sum(1)[:, None] + objects.sum(1) - both
        rows.append((both > iou * either).any(1))
    return torch.stack(rows)


def _mask_losses(
    name: str,
    masks: Tensor,
    found: Sequence[_Positives],
    divisor: Tensor | None,
    *,
    rank: float | None,
) -> dict[str, Tensor]:
    """Cross-entropy and dice of the positive masks, and, weighted by ``rank``, which kernel is the
    highest at a pixel."""
    predicted = torch.cat([masks[b, one.kernels] for b, one in enumerate(found)]).flatten(1)
    truth = torch.cat([one.masks for one in found]).flatten(1)
    known = torch.cat([one.known for one in found]).flatten(1)
    if len(predicted):
        p = predicted.sigmoid() * known
        covered = truth * known
        inner = 2 * (p * covered).sum(1)
        squares = (p**2).sum(1) + (covered**2).sum(1) + 2 * _SMOOTH
        share = 1.0 if divisor is None else len(predicted) / divisor
        losses = {
            f"{name}_mask": F.binary_cross_entropy_with_logits(predicted, truth, known) * share,
            f"{name}_dice": 4 * (1 - inner / squares).mean() * share,
        }
    else:
        losses = {f"{name}_mask": 0 * masks.sum(), f"{name}_dice": 0 * masks.sum()}
    if rank is not None:
        winner = torch.full_like(masks[:, 0], _IGNORED, dtype=torch.int64)
        for b, one in enumerate(found):
            for kernel, mask in zip(one.kernels, one.masks, strict=True):
                winner[b, mask > 0] = kernel
        pixels = F.cross_entropy(masks, winner, ignore_index=_IGNORED, reduction="sum")
        losses[f"{name}_rank"] = rank * pixels / winner.numel()
    return losses


def _class_loss(
    logits: Tensor,
    found: Sequence[_Positives],
    unknown: Tensor,
    count: int,
    things: Tensor,
    stuff: Sequence[int],
    divisor: Tensor | None,
) -> Tensor:
    """Focal loss: rows of things over the classes of things, each row of stuff over its own, and
    those ``unknown`` [B, N] only where they have a target."""
    wanted = torch.zeros_like(logits)
    weights = torch.zeros_like(logits)
    weights[:, :count, things] = 1
    for row, label in enumerate(stuff):
        weights[:, count + row, label] = 1
    for b, one in enumerate(found):
        wanted[b, one.kernels, one.classes] = 1
        unknown[b, one.kernels] = False
    weights *= ~unknown[..., None]
    if divisor is None:
        divisor = torch.tensor(max(1, sum(len(one.kernels) for one in found)))
    return (_focal(logits, wanted) * weights).sum() / divisor


def _semantic_loss(
    logits: Tensor,
    found: Sequence[_Positives],
    targets: Sequence[SegmentTargets],
    divisor: Tensor | None,
) -> Tensor:
    """Focal loss of the classifier: what no mask covers belongs to no class, unless it is void."""
    wanted = torch.zeros_like(logits)
    known = torch.ones_like(logits[:, 0])
    labelled = 0
    for b, (one, target) in enumerate(zip(found, targets, strict=True)):
        label = torch.full_like(logits[b, 0], _IGNORED, dtype=torch.int64)
        masks = torch.cat([target.stuff, one.masks])
        for mask, value in zip(masks, torch.cat([target.stuff_classes, one.classes]), strict=True):
            label[mask > 0] = value
        there = label >= 0
        labelled += int(there.sum())
        wanted[b] = F.one_hot(label.clamp(min=0), logits.shape[1]).permute(2, 0, 1) * there
        if target.void is not None:
            known[b] = (1 - target.void).where(~there, 1)
    if divisor is None:
        divisor = torch.tensor(max(1, labelled))
    return (_focal(logits, wanted) * known[:, None]).sum() / divisor


def _focal(logits: Tensor, wanted: Tensor) -> Tensor:
    """Sigmoid focal loss (arXiv 1708.02002), α = 0.25, γ = 2, element by element."""
    p = logits.sigmoid()
    missed = wanted * (1 - p) + (1 - wanted) * p
    weight = (_ALPHA * wanted + (1 - _ALPHA) * (1 - wanted)) * missed**_GAMMA
    return weight * F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
