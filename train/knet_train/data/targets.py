"""What the losses of instance and panoptic segmentation compare a prediction with: the objects of
an image as soft masks at a quarter of its size."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from knet_train.data.truth import Truth
from knet_train.models.segments import MULTIPLE
from knet_train.segment_loss import STRIDE, SegmentTargets


def segment_targets(
    ids: Tensor, truth: Truth, things: Collection[int], void: Tensor | None = None
) -> SegmentTargets:
    """The targets of layers [L, H, W] of the ids of ``truth``, as augmentation left them, padded as
    the network pads. An object of which no pixel is left, or none at a quarter of the size, is
    none; crowds belong to no kernel. ``void`` bool [H, W] is what nothing is learnt from. No mask
    is made at full size.
    """
    corners = _corners(ids, 0)
    masks: list[Tensor] = []
    classes: list[int] = []
    stuff: dict[int, Tensor] = {}
    for id_ in torch.unique(corners).tolist():
        if not id_ or id_ in truth.crowds:
            continue
        mask = (corners == id_).sum((0, 1)) / 4
        class_id = truth.classes[id_ - 1]
        if class_id in things:
            masks.append(mask)
            classes.append(class_id)
        else:  # one segment of a class of stuff, or several
            stuff[class_id] = (stuff[class_id] + mask).clamp(max=1) if class_id in stuff else mask
    none = torch.zeros((0, *corners.shape[-2:]))
    return SegmentTargets(
        torch.stack(masks) if masks else none,
        torch.tensor(classes, dtype=torch.int64),
        torch.stack(list(stuff.values())) if stuff else none,
        torch.tensor(list(stuff), dtype=torch.int64),
        None if void is None else _corners(void[None], 1).float().mean((0, 1)),
    )


def _corners(planes: Tensor, padding: int) -> Tensor:
    """The four pixels in the middle of each cell, [4, P, H / 4, W / 4]: bilinear sampling at a
    quarter of the size reads these."""
    height, width = planes.shape[-2:]
    planes = F.pad(planes, (0, -width % MULTIPLE, 0, -height % MULTIPLE), value=padding)
    return torch.stack([planes[:, y::STRIDE, x::STRIDE] for y in (1, 2) for x in (1, 2)])
