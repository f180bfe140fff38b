"""What is measured between two sides' segments: which of them match, and the task's own score.

Masks inside a network are hard, so a rounding that turns one pixel may turn a segment. What counts
is the result: panoptic quality, or average precision, on labelled images; and on any images the
share of segments that both sides have.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from knet_export.verify.measure import Delta, bootstrap
from knet_runtime.labels import LabelMap
from knet_runtime.panoptic_quality import PanopticQuality, SegmentIds, segment_ids
from knet_runtime.segmentation import Segmentation
from knet_runtime.types import METRICS, Task
from knet_train.segment_pairs import partners

if TYPE_CHECKING:
    from knet_train.average_precision import AveragePrecision
    from knet_train.data.truth import Truth


class SegmentMeter:
    """Sums over images of both sides' segments, and their scores where there is a truth."""

    def __init__(self, labels: LabelMap, task: Task) -> None:
        self.labels = labels
        self.metric = METRICS[task]
        self._pairs, self._segments, self._images = 0, 0, 0
        self._quality = [PanopticQuality(labels), PanopticQuality(labels)]
        self._per_image: list[list[NDArray[np.float64]]] = []
        self._precision: list[AveragePrecision] = []

    def compare(self, reference: Segmentation, found: Segmentation | None) -> None:
        """Segments of one image as they are shown; None for one whose outputs hold NaN."""
        self._segments += len(reference.segments)
        if found is not None:
            self._segments += len(found.segments)
            self._pairs += 2 * len(partners(reference, found))

    def score(self, reference: Segmentation, found: Segmentation | None, truth: Truth) -> None:
        """Segments of one image, for average precision those of every score."""
        if self.metric == "AP":
            from knet_train.average_precision import AveragePrecision

            self._precision = self._precision or [AveragePrecision(self.labels) for _ in range(2)]
        self._images += 1
        sides = []
        for side, result in enumerate((reference, found)):
            if self.metric == "AP":
                objects = [] if result is None else result.to_coco()
                self._precision[side].update(self._images, objects, truth)
                continue
            nothing = SegmentIds(np.zeros(truth.void.shape, np.uint16), ())
            one = PanopticQuality(self.labels)
            one.update(nothing if result is None else segment_ids(result), truth.flat())
            self._quality[side] += one
            sides.append(np.stack([one.iou, one.tp, one.fp, one.fn]))
        self._per_image.append(sides)

    @property
    def matched(self) -> float | None:
        """The share of both sides' segments that have a partner; None where there is no segment."""
        return self._pairs / self._segments if self._segments else None

    def delta(self) -> Delta | None:
        """The scores of both sides; None without a truth."""
        if not self._images:
            return None
        resampled: list[Callable[[NDArray[np.int64]], float]]
        if self.metric == "AP":
            totals = [one.all.ap for one in self._precision]
            rows = [[row.ap for row in one.per_class()] for one in self._precision]
            labelled = ~np.isnan(rows[0])
            resampled = [one.resampling() for one in self._precision]
        else:
            totals = [one.all.pq for one in self._quality]
            rows = [[row.pq for row in one.per_class()] for one in self._quality]
            labelled = self._quality[0].tp + self._quality[0].fn > 0
            counts = [np.stack([image[side] for image in self._per_image]) for side in (0, 1)]
            resampled = [partial(_quality_of, side) for side in counts]
        return Delta.of(totals, rows, labelled, bootstrap(self._images, resampled))


def _quality_of(counts: NDArray[np.float64], times: NDArray[np.int64]) -> float:
    """Panoptic quality of images [I, 4, N] of (IoU, matched, wrong, missed), each so many times."""
    iou, tp, fp, fn = np.tensordot(times, counts, 1)
    weight = tp + fp / 2 + fn / 2
    return float((iou[weight > 0] / weight[weight > 0]).mean()) if (weight > 0).any() else np.nan
