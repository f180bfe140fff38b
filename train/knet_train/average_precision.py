"""COCO's average precision of masks, as pycocotools counts it.

What is void in the truth is to every class what a crowd is: what lies there is neither found nor
wrong. COCO's own files of instances have none.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from knet_runtime.labels import LabelMap
from knet_runtime.rle import Rle, rles_of
from knet_train.data.truth import Truth

_AT_50, _AT_75 = 0, 5  # places among the ten thresholds of IoU


class Precision(msgspec.Struct, frozen=True):
    """Average precision, 0 … 1, over ten thresholds of IoU (``ap``) and at two of them; ``count``
    is the number of classes that they are the mean of, those with an object in the truth. NaN where
    there is none."""

    ap: float
    ap50: float
    ap75: float
    count: int


class AveragePrecision:
    """Objects found and true, of as many images as are given to ``update``."""

    def __init__(self, labels: LabelMap) -> None:
        self.labels = labels
        self.found: list[dict[str, Any]] = []
        self.truth: list[dict[str, Any]] = []
        self.images: list[tuple[int, tuple[int, int]]] = []

    def update(self, number: int, found: Sequence[dict[str, Any]], truth: Truth) -> None:
        """Add the image of this ``number``: what was ``found`` is ``Segmentation.to_coco``'s."""
        self.images.append((number, truth.void.shape))
        self.found += [
            {"area": float(coco_mask.area(one["segmentation"])), **one, "image_id": number}
            for one in found
        ]
        for layer in truth.ids:
            for id_, (rle, area) in rles_of(layer, np.unique(layer[layer > 0]).tolist()).items():
                self._add_truth(number, truth.classes[id_ - 1], rle, area, id_ in truth.crowds)
        if truth.void.any():
            rle, area = rles_of(truth.void.view(np.uint8), (1,))[1]
            for class_id in sorted({one["category_id"] for one in found}):
                self._add_truth(number, class_id, rle, area, crowd=True)

    def _add_truth(self, number: int, class_id: int, rle: Rle, area: int, crowd: bool) -> None:
        self.truth.append(
            {
                "image_id": number,
                "category_id": class_id,
                "segmentation": msgspec.to_builtins(rle),
                "area": area,
                "bbox": [0, 0, 1, 1],
                "iscrowd": int(crowd),
            }
        )

    def scores(self) -> tuple[Precision, list[Precision]]:
        """The mean over classes, and each class: ``all`` and ``per_class``, judged once."""
        precision = self._precision()
        classes = range(precision.shape[2])
        return _mean(precision), [_mean(precision[:, :, one : one + 1]) for one in classes]

    def per_class(self) -> list[Precision]:
        """Of each class."""
        return self.scores()[1]

    @property
    def all(self) -> Precision:
        """The mean over classes."""
        return self.scores()[0]

    def resampling(self) -> Callable[[NDArray[np.int64]], float]:
        """The function that gives ``all.ap`` when each image, in the order of their numbers, was
        there so many times [I]; NaN where no object is left. Images are judged once, for all."""
        judge = self._judged()
        images, areas = len(judge.params.imgIds), len(judge.params.areaRng)
        ranked = []
        for index in range(self.labels.num_classes):
            start = index * areas * images  # "all" is the first range of areas
            rows = enumerate(judge.evalImgs[start : start + images])
            known = [(image, row) for image, row in rows if row is not None]
            wanted = np.zeros(images, np.int64)
            for image, row in known:
                wanted[image] = np.count_nonzero(row["gtIgnore"] == 0)
            if not wanted.any():
                continue
            scores = np.concatenate([row["dtScores"] for _, row in known])
            order = np.argsort(-scores, kind="stable")
            owners = np.repeat(
                [image for image, _ in known], [len(r["dtScores"]) for _, r in known]
            )
            hits, left_out = (
                np.concatenate([row[key] for _, row in known], 1)[:, order].astype(np.bool_)
                for key in ("dtMatches", "dtIgnore")
            )
            ranked.append((wanted, owners[order], hits & ~left_out, ~hits & ~left_out))
        recalls = judge.params.recThrs

        def precision(times: NDArray[np.int64]) -> float:
            found = []
            for wanted, owners, right, wrong in ranked:
                if not (count := int(times @ wanted)):
                    continue
                tp, fp = (np.cumsum(one * times[owners], 1) for one in (right, wrong))
                rising = tp / np.maximum(tp + fp, 1)
                best = np.maximum.accumulate(rising[:, ::-1], 1)[:, ::-1]
                best = np.pad(best, ((0, 0), (0, 1)))
                places = [np.searchsorted(row, recalls) for row in tp / count]
                found.append(np.take_along_axis(best, np.array(places), 1).mean())
            return float(np.mean(found)) if found else float("nan")

        return precision

    def _precision(self) -> NDArray[np.float64]:
        """Precision [threshold, recall, class], -1 where the truth has no object."""
        judge = self._judged()
        with contextlib.redirect_stdout(io.StringIO()):  # it tells what it does
            judge.accumulate()
        return np.asarray(judge.eval["precision"][:, :, :, 0, -1], np.float64)

    def _judged(self) -> COCOeval:
        """Every image's objects, found ones beside true ones."""
        order = sorted(range(len(self.truth)), key=lambda i: self.truth[i]["image_id"])
        truth = COCO()
        truth.dataset = {
            "images": [
                {"id": number, "height": height, "width": width}
                for number, (height, width) in sorted(self.images)
            ],
            "annotations": [{"id": place, **self.truth[i]} for place, i in enumerate(order, 1)],
            "categories": [
                {"id": index, "name": name} for index, name in enumerate(self.labels.names)
            ],
        }
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()
            found = COCO()
            found.dataset = {
                **truth.dataset,
                "annotations": [
                    {"id": place, "iscrowd": 0, **one}
                    for place, one in enumerate(
                        sorted(self.found, key=lambda one: one["image_id"]), 1
                    )
                ],
            }
            found.createIndex()
            judge = COCOeval(truth, found, "segm")
            judge.evaluate()
        return judge


def _mean(precision: NDArray[np.float64]) -> Precision:
    there = (precision > -1).any((0, 1))
    if not there.any():
        return Precision(np.nan, np.nan, np.nan, 0)
    valid = precision[:, :, there]
    return Precision(
        float(valid.mean()),
        float(valid[_AT_50].mean()),
        float(valid[_AT_75].mean()),
        int(there.sum()),
    )
