"""Scores of class maps: confusion matrix, IoU, pixel agreement.

Training evaluation, verification and the device count with these same functions.
IoU of a class is TP / (TP + FP + FN), summed over all images; NaN where that is 0 / 0.
All scores here are fractions of 0 … 1 unless a name says "points" (0 … 100).
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_runtime.errors import DataError
from knet_runtime.labels import LabelMap


class ClassScore(msgspec.Struct, frozen=True):
    """One class's row of a table; IoU, precision and recall are NaN where they are 0 / 0."""

    name: str
    iou: float
    precision: float
    recall: float
    pixels: int  # labelled pixels of the class


class ClassDelta(msgspec.Struct, frozen=True):
    """The class whose IoU changed most, and by how much: signed, in points."""

    index: int
    points: float


class ConfusionMatrix:
    """Counts of (label, prediction) pairs of N classes; rows are labels, columns predictions."""

    def __init__(self, num_classes: int, ignore_index: int) -> None:
        if num_classes < 1:
            raise ValueError("a confusion matrix needs at least one class")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.matrix: NDArray[np.int64] = np.zeros((num_classes, num_classes), np.int64)

    def update(self, prediction: NDArray[Any], label: NDArray[Any]) -> None:
        """Count one pair of integer maps of equal shape (any shape; images or batches).

        Pixels labelled ``ignore_index`` are left out, whatever was predicted there.
        Raises DataError on other shapes, types, or values outside the classes; counts nothing then.
        """
        _check_pair(prediction, label, "prediction", "label")
        labelled = label != self.ignore_index
        truth = label[labelled].astype(np.int64)
        guess = prediction[labelled].astype(np.int64)
        if truth.size == 0:
            return
        for what, values in (("label", truth), ("prediction", guess)):
            low, high = int(values.min()), int(values.max())
            if low < 0 or high >= self.num_classes:
                raise DataError(
                    f"{what} holds class {low if low < 0 else high}, but the label map has "
                    f"classes 0 … {self.num_classes - 1} and ignores {self.ignore_index}: "
                    "use the label map that the data was labelled with"
                )
        counts = np.bincount(truth * self.num_classes + guess, minlength=self.num_classes**2)
        self.matrix += counts.reshape(self.matrix.shape)

    def __add__(self, other: ConfusionMatrix) -> ConfusionMatrix:
        """The matrix of both sets of images together; DataError when the classes differ."""
        if not isinstance(other, ConfusionMatrix):
            return NotImplemented
        if (self.num_classes, self.ignore_index) != (other.num_classes, other.ignore_index):
            raise DataError("confusion matrices of different label maps cannot be added")
        total = ConfusionMatrix(self.num_classes, self.ignore_index)
        total.matrix = self.matrix + other.matrix
        return total

    @property
    def iou(self) -> NDArray[np.float64]:
        """float64 [N]: IoU per class; NaN where a class is in neither labels nor predictions."""
        hits = np.diag(self.matrix)
        return _divide(hits, self.matrix.sum(0) + self.matrix.sum(1) - hits)

    @property
    def miou(self) -> float:
        """The mean IoU of the classes that were labelled or predicted; NaN when nothing was."""
        iou = self.iou
        seen = ~np.isnan(iou)
        return float(iou[seen].mean()) if seen.any() else float("nan")

    @property
    def scored_classes(self) -> int:
        """How many classes ``miou`` is the mean of."""
        return int(np.count_nonzero(~np.isnan(self.iou)))

    @property
    def pixel_accuracy(self) -> float:
        """The fraction of labelled pixels that were predicted right; NaN when there are none."""
        return float(_divide(np.trace(self.matrix), self.matrix.sum()))

    @property
    def mean_accuracy(self) -> float:
        """The mean recall of the classes that were labelled (mmsegmentation's mAcc); NaN when none
        was."""
        labelled = self.matrix.sum(1)
        recall = _divide(np.diag(self.matrix), labelled)[labelled > 0]
        return float(recall.mean()) if recall.size else float("nan")

    def rows(self, labels: LabelMap) -> list[ClassScore]:
        """One row per class of ``labels``, in its order; DataError when it has other classes."""
        if labels.num_classes != self.num_classes:
            raise DataError(
                f"the label map has {labels.num_classes} classes, the matrix {self.num_classes}"
            )
        hits = np.diag(self.matrix)
        labelled, predicted = self.matrix.sum(1), self.matrix.sum(0)
        columns = zip(
            labels.names,
            self.iou.tolist(),
            _divide(hits, predicted).tolist(),
            _divide(hits, labelled).tolist(),
            labelled.tolist(),
            strict=True,
        )
        return [ClassScore(*row) for row in columns]


def worst_class_delta(reference: ConfusionMatrix, other: ConfusionMatrix) -> ClassDelta | None:
    """The class whose IoU in ``other`` differs most from ``reference``, either way, in points.

    Only labelled classes count: without a labelled pixel an IoU is 0 or NaN and says nothing.
    None when nothing is labelled; DataError when the two were not counted on the same labels.
    """
    if not np.array_equal(reference.matrix.sum(1), other.matrix.sum(1)):
        raise DataError(
            "the two matrices were not counted on the same labels: compare like with like"
        )
    labelled = np.flatnonzero(reference.matrix.sum(1))
    if labelled.size == 0:
        return None
    points = 100 * (other.iou[labelled] - reference.iou[labelled])
    worst = int(np.abs(points).argmax())
    return ClassDelta(int(labelled[worst]), float(points[worst]))


def agreement(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The fraction of equal pixels of two integer class maps of one shape (DataError otherwise)."""
    _check_pair(a, b, "first map", "second map")
    if a.size == 0:
        raise DataError("class maps without a pixel cannot be compared")
    return float(np.count_nonzero(a == b) / a.size)


def inside(masks: NDArray[np.floating]) -> NDArray[np.uint8]:
    """1 where a mask's logit is above 0, that is its probability above one half; else 0."""
    return np.asarray(masks > 0).view(np.uint8)


def _check_pair(a: NDArray[Any], b: NDArray[Any], a_name: str, b_name: str) -> None:
    for array, name in ((a, a_name), (b, b_name)):
        if not np.issubdtype(array.dtype, np.integer):
            raise DataError(f"{name} is {array.dtype}: class maps are integers")
    if a.shape != b.shape:
        raise DataError(
            f"{a_name} is {a.shape}, {b_name} is {b.shape}: "
            "class maps are compared at one size and never resized"
        )


def _divide(over: Any, under: Any) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(over, np.float64) / np.asarray(under, np.float64)
