"""The baseline for instances and panoptic segmentation: the network in PyTorch, and after it the
published steps (github ZwwWayne/K-Net, ``knet/det/kernel_iter_head.py``), which make the masks at
the frame's size before they choose among them."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from knet_deploy.bench.target import Facts, stage_times
from knet_runtime.bundle.manifest import SegmentRules
from knet_runtime.engines.hardware import cpu_budget
from knet_runtime.labels import LabelMap
from knet_runtime.postprocess import distinct_kernels
from knet_runtime.preprocess import Geometry, fit_to_input
from knet_runtime.types import ClassMap, Rgb, Size
from knet_train.checkpoint import read_segment_checkpoint
from knet_train.inference import input_spec


class SegmentsBaseline:
    """Images fitted as ours are (the same pixels make results comparable), network and published
    steps by the bundle's ``rules``, all in float32."""

    def __init__(
        self, checkpoint: Path, size: Size, rules: SegmentRules, *, channels_last: bool = False
    ) -> None:
        torch.set_num_threads(cpu_budget())
        found = read_segment_checkpoint(checkpoint)
        spec = input_spec(found.config)
        self._spec = msgspec.structs.replace(spec, height=size[0], width=size[1])
        self._labels, self._rules = found.labels, rules
        self._panoptic = found.config.model.task == "panoptic"
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self._network = found.model.to(memory_format=layout)
        self.facts = Facts("fp32", None, "a baseline")

    @torch.inference_mode()
    def segment(self, frame: Rgb) -> tuple[ClassMap, dict[str, float]]:
        began = perf_counter()
        image, geometry = fit_to_input(frame, self._spec)
        fitted = perf_counter()
        logits = self._network(torch.from_numpy(image)[None])
        ran = perf_counter()
        classes, masks = logits.classes[0], logits.masks[0]
        if self._rules.nms < 1:
            kernels = distinct_kernels(classes.numpy(), masks.numpy(), self._labels, self._rules)
            classes, masks = classes[kernels], masks[kernels]
        result = torch.full(geometry.source_hw, self._labels.ignore_index)
        if self._panoptic:
            ids, found = plain_panoptic(classes, masks, geometry, self._labels, self._rules)
            for number, class_id in enumerate(found, 1):
                result[ids == number] = class_id
        else:
            objects, found = plain_instances(classes, masks, geometry, self._rules)
            for mask, class_id in zip(reversed(objects), reversed(found), strict=True):
                result[mask] = class_id
        small = self._labels.num_classes <= 256
        numbers = result.numpy()
        class_map = numbers.astype(np.uint8) if small else numbers.astype(np.uint16)
        ended = perf_counter()
        return class_map, stage_times(began, preprocess=fitted, infer=ran, postprocess=ended)


def plain_panoptic(
    classes: Tensor, masks: Tensor, geometry: Geometry, labels: LabelMap, rules: SegmentRules
) -> tuple[Tensor, list[int]]:
    """Class logits [N, K] and mask logits [N, h, w] -> segments' numbers [H, W] from 1, 0 for void,
    and their classes."""
    things = torch.tensor(labels.things, dtype=torch.long)
    stuff = torch.tensor([c for c in range(labels.num_classes) if c not in labels.things])
    count = len(classes) - len(stuff)
    found = classes.sigmoid()
    scores, best = found[:count, things].max(1)
    scores = torch.cat([scores, found[torch.arange(count, len(classes)), stuff]])
    kinds = torch.cat([things[best], stuff])
    probabilities = _resized(masks.sigmoid(), geometry)
    winner = (scores[:, None, None] * probabilities).argmax(0)
    ids = torch.zeros(geometry.source_hw, dtype=torch.int64)
    kept: list[int] = []
    for kernel in scores.argsort(descending=True).tolist():
        if kernel < count and scores[kernel] < rules.score:
            continue
        won = winner == kernel
        area, own = int(won.sum()), int((probabilities[kernel] >= rules.mask).sum())
        if area and own and area / own >= rules.overlap:
            kept.append(int(kinds[kernel]))
            ids[won] = len(kept)
    return ids, kept


def plain_instances(
    classes: Tensor, masks: Tensor, geometry: Geometry, rules: SegmentRules
) -> tuple[Tensor, list[int]]:
    """The same logits -> masks bool [S, H, W] of the best pairs of a kernel and a class, the best
    first, and their classes; those below the score are left out at the end."""
    pairs = classes.sigmoid().flatten()
    scores, best = pairs.topk(min(rules.top_k, len(pairs)))
    chosen = masks[best // classes.shape[1]].sigmoid()
    found = _resized(chosen, geometry) > rules.mask
    sure = scores > rules.score
    return found[sure], (best % classes.shape[1])[sure].tolist()


def _resized(planes: Tensor, geometry: Geometry) -> Tensor:
    """Probabilities [N, h, w] at the image's size: first at the network's, cut to the image."""
    top, left, height, width = geometry.window
    whole = F.interpolate(planes[None], geometry.model_hw, mode="bilinear", align_corners=False)
    cut = whole[..., top : top + height, left : left + width]
    return F.interpolate(cut, geometry.source_hw, mode="bilinear", align_corners=False)[0]
