"""Panoptic quality (arXiv 1801.00868), as the official panopticapi counts it.

A found and a true segment of one class match where their IoU is above 0.5; pixels of the found one
that are void in the truth do not count in it. PQ of a class is the sum of the matches' IoU over
TP + FP / 2 + FN / 2. True crowds are neither found nor missed, and what lies by more than half in
void or in a crowd of its class is no false positive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_runtime.errors import DataError
from knet_runtime.labels import LabelMap
from knet_runtime.segmentation import Segmentation


class SegmentIds(NamedTuple):
    """An image's segments: ``ids`` [H, W] holds 1 … S, and 0 for void; ``classes`` [S] their
    classes, and ``crowds`` the ids of those that are many objects in one."""

    ids: NDArray[np.uint16]
    classes: Sequence[int]
    crowds: frozenset[int] = frozenset()


def segment_ids(found: Segmentation) -> SegmentIds:
    """A panoptic result's segments."""
    classes = [0] * max((segment.id for segment in found.segments), default=0)
    for segment in found.segments:
        classes[segment.id - 1] = segment.class_id
    return SegmentIds(found.segment_map, classes)


class Quality(msgspec.Struct, frozen=True):
    """PQ and its factors: the mean IoU of what matched (``sq``), and how much did (``rq``); all
    0 … 1. ``count`` is the number of classes that they are the mean of, those with any segment."""

    pq: float
    sq: float
    rq: float
    count: int


class PanopticQuality:
    """Counts of matches, over as many images as are given to ``update``."""

    def __init__(self, labels: LabelMap) -> None:
        self.labels = labels
        self.iou = np.zeros(labels.num_classes)
        self.tp, self.fp, self.fn = np.zeros((3, labels.num_classes), np.int64)

    def update(self, found: SegmentIds, truth: SegmentIds) -> None:
        """Count one image. Raises DataError for maps of different sizes."""
        if found.ids.shape != truth.ids.shape:
            raise DataError(f"segments are {found.ids.shape}, the truth is {truth.ids.shape}")
        width = len(truth.classes) + 1
        pairs = found.ids.astype(np.int64) * width + truth.ids
        shared = np.bincount(pairs.ravel(), minlength=(len(found.classes) + 1) * width)
        shared = shared.reshape(len(found.classes) + 1, width)
        areas, true_areas = shared.sum(1), shared.sum(0)
        matched: set[int] = set()
        seen: set[int] = set()
        for mine, theirs in np.argwhere(shared > 0).tolist():
            if not mine or not theirs or theirs in truth.crowds:
                continue
            class_id = found.classes[mine - 1]
            if class_id != truth.classes[theirs - 1]:
                continue
            both = shared[mine, theirs]
            iou = both / (areas[mine] + true_areas[theirs] - both - shared[mine, 0])
            if iou > 0.5:
                self.iou[class_id] += iou
                self.tp[class_id] += 1
                matched.add(theirs)
                seen.add(mine)
        for id_, class_id in enumerate(truth.classes, 1):
            if true_areas[id_] and id_ not in matched and id_ not in truth.crowds:
                self.fn[class_id] += 1
        for id_, class_id in enumerate(found.classes, 1):
            if not areas[id_] or id_ in seen:
                continue
            crowd = [c for c in truth.crowds if truth.classes[c - 1] == class_id]
            if (shared[id_, 0] + shared[id_, crowd].sum()) / areas[id_] <= 0.5:
                self.fp[class_id] += 1

    def per_class(self) -> list[Quality]:
        """Of each class, NaN where it has no segment on either side."""
        return [self._mean(slice(index, index + 1)) for index in range(self.labels.num_classes)]

    @property
    def all(self) -> Quality:
        """Of all classes."""
        return self._mean(slice(None))

    @property
    def things(self) -> Quality:
        """Of things alone."""
        return self._mean(list(self.labels.things))

    @property
    def stuff(self) -> Quality:
        """Of stuff alone."""
        every = range(self.labels.num_classes)
        return self._mean([index for index in every if index not in self.labels.things])

    def _mean(self, which: slice | list[int]) -> Quality:
        iou, tp = self.iou[which], self.tp[which].astype(float)
        weight = tp + self.fp[which] / 2 + self.fn[which] / 2
        any_ = weight > 0
        if not any_.any():
            return Quality(np.nan, np.nan, np.nan, 0)
        iou, tp, weight = iou[any_], tp[any_], weight[any_]
        sq = np.divide(iou, tp, out=np.zeros_like(iou), where=tp > 0)
        pq, rq = iou / weight, tp / weight
        return Quality(float(pq.mean()), float(sq.mean()), float(rq.mean()), len(iou))
