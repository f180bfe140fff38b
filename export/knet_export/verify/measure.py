"""What is measured between two sides that saw the same images, and how far they may differ.

A tolerance is there to tell a fault from rounding. So each stands above what a right graph of its
precision was measured to differ by, the default model on CamVid's 101 validation images: fp32, fp16
and int8 in ONNX Runtime (whose CPU computes fp16 in fp32: only what is stored rounds), bf16 in
OpenVINO.

|                   | fp32   | fp16    | bf16    | int8    |
|-------------------|--------|---------|---------|---------|
| ΔmIoU, points     | 0.0000 | -0.0104 | -0.0573 | +0.1442 |
| worst class       | 0.0001 | -0.0449 | -0.2752 | +0.5279 |
| agreement         | 1.0000 | 0.99976 | 0.99713 | 0.99376 |
| where confident   | 1.0000 | 1.00000 | 0.99997 | 0.99991 |
| largest logit     | 2.3e-6 | 8.6e-3  | 1.1e-1  | 1.7e-1  |
| mean logit        | 1.7e-7 | 4.5e-4  | 5.4e-3  | 9.8e-3  |

Where the reference is sure, rounding turns next to nothing: that limit is the tightest of each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_runtime.bundle.manifest import Precision, Tolerance
from knet_runtime.errors import ConfigError
from knet_runtime.metrics import ConfusionMatrix

_TOLERANCES: dict[Precision, Tolerance] = {
    # ΔmIoU, worst class, agreement, largest logit, where confident, mean logit
    "fp32": Tolerance(0.02, 0.2, 0.9999, 1e-3, 0.99999, 1e-4),  # another order of sums
    "fp16": Tolerance(0.05, 0.5, 0.995, 2e-2, 0.9999, 2e-3),  # 11 bits for pixel-sized tensors
    "bf16": Tolerance(0.2, 1.0, 0.99, 3e-1, 0.999, 2e-2),  # 8 bits
    "int8": Tolerance(0.5, 5.0, 0.95, 5e-1, 0.995, 5e-2),  # 255 steps, as many as the search allows
}
# Networks for segments. Their masks are hard: a pixel that rounding turns changes all that comes
# after it, most where a mask is small. So one kernel may differ much, and most must not. And a
# segment whose overlap is near a half is matched or is not, which moves the score of a class with
# a hundred of them by a point: of a trained network PQ moved by 0.05 points in fp16 and that of a
# class by 0.6 (101 images), in fp32 by less than 0.001. For bf16 and int8 these are set on small
# networks of random weights; no trained one was measured.
_SEGMENT_TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(0.02, 0.2, 0.9999, 1e-1, 0.99999, 1e-3),
    "fp16": Tolerance(0.2, 2.0, 0.99, 5e-1, 0.998, 2e-2),
    "bf16": Tolerance(0.5, 3.0, 0.95, 1.0, 0.98, 5e-2),
    "int8": Tolerance(0.5, 5.0, 0.9, 1.0, 0.95, 1e-1),
}
CONFIDENT_MARGIN = 1.0  # logits: e times as likely as the runner-up
MARGINS = (0.0, 0.1, 0.5, CONFIDENT_MARGIN, 2.0, 4.0)  # lower ends of the bins
_RESAMPLES = 1000

Counts = NDArray[np.int64]


class MarginRow(msgspec.Struct, frozen=True):
    """Agreement of the pixels whose best two reference logits differ by ``above`` … ``below`` (or
    any more, for None): their share of all, and the share of them that agrees, None for none."""

    above: float
    below: float | None
    share: float
    agreement: float | None


class Delta(msgspec.Struct, frozen=True):
    """A score of both sides, whole and by class, in percent (None where there is nothing);
    ``interval`` is ``bootstrap``'s, ``worst`` the labelled class that changed most."""

    reference: float
    measured: float
    interval: tuple[float, float]
    classes: tuple[tuple[float | None, float | None], ...]
    worst: int | None

    @property
    def points(self) -> float:
        """The difference of the whole score."""
        return self.measured - self.reference

    @classmethod
    def of(
        cls,
        totals: Sequence[float],
        rows: Sequence[Sequence[float] | NDArray[np.float64]],
        labelled: NDArray[np.bool_],
        interval: tuple[float, float],
    ) -> Delta:
        """Of both sides' shares 0 … 1, and which classes are ``labelled`` [N]."""
        before, after = (np.asarray(row, np.float64) for row in rows)
        change = np.where(labelled, np.abs(after - before), -1.0)
        return cls(
            100 * totals[0],
            100 * totals[1],
            interval,
            tuple((_percent(was), _percent(now)) for was, now in zip(before, after, strict=True)),
            int(change.argmax()) if labelled.any() else None,
        )


def bootstrap(images: int, scores: Sequence[Callable[[Counts], float]]) -> tuple[float, float]:
    """95 % of the difference in points when images are drawn again with replacement, both sides
    alike (the paired bootstrap). ``scores`` give a side's, 0 … 1, when image i was there times[i]
    times."""
    rng, deltas = np.random.default_rng(0), []
    for _ in range(_RESAMPLES):
        times = np.bincount(rng.integers(0, images, images), minlength=images)
        before, after = (score(times) for score in scores)
        deltas.append(100 * (after - before))
    low, high = np.nanpercentile(deltas, (2.5, 97.5))
    return float(low), float(high)


def stage_limit(precision: Precision) -> float:
    """How far the masks of a stage may be from the reference's when both gather by the same masks,
    as a share of the largest logit: as a network without hard masks."""
    return _TOLERANCES[precision].max_logit_diff


def tensor_difference(expected: NDArray[Any], found: NDArray[Any]) -> float:
    """The largest difference as a share of the largest expected value; infinity for another shape,
    for NaN, and for other whole numbers in more than a thousandth of the places."""
    if expected.shape != found.shape:
        return float("inf")
    if not np.issubdtype(expected.dtype, np.floating):
        return float("inf") if (expected != found).mean() > 1e-3 else 0.0
    if not expected.size:
        return 0.0
    before, after = expected.astype(np.float64), found.astype(np.float64)
    worst = float(np.abs(after - before).max() / max(float(np.abs(before).max()), 1e-30))
    return float("inf") if np.isnan(worst) else worst


def _percent(share: float) -> float | None:
    return None if np.isnan(share) else 100 * float(share)


def top_two_margin(logits: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """The lead of the best class, float32 [H, W] = ``size``, of logits float32 [N, h, w] resized as
    ``postprocess.upsampled_argmax`` resizes them; infinity for a single class."""
    to = (size[1], size[0])
    best, second = np.full(size, -np.inf, np.float32), np.full(size, -np.inf, np.float32)
    for plane in np.ascontiguousarray(logits):
        large = np.asarray(cv2.resize(plane, to, interpolation=cv2.INTER_LINEAR), np.float32)
        np.maximum(second, np.minimum(best, large), out=second)
        np.maximum(best, large, out=best)
    return best - second


class ParityMeter:
    """Sums over images; per image only what the bootstrap needs, [3, N] counts a side."""

    def __init__(self, classes: int, ignore_index: int) -> None:
        self.classes, self.ignore_index = classes, ignore_index
        self.reference = ConfusionMatrix(classes, ignore_index)
        self.measured = ConfusionMatrix(classes, ignore_index)
        self.images, self.broken = 0, 0
        self._per_image: list[tuple[Counts, Counts]] = []
        self._pixels = np.zeros(len(MARGINS), np.int64)
        self._equal = np.zeros(len(MARGINS), np.int64)
        self._worst, self._summed, self._count, self._largest = 0.0, 0.0, 0, 1e-30

    def logits(self, reference: NDArray[np.float32], found: NDArray[np.float32]) -> None:
        """Float32 [N, h, w] of one image on both sides, finite."""
        difference = np.abs(reference - found)
        self._worst = max(self._worst, float(difference.max()))
        self._largest = max(self._largest, float(np.abs(reference).max()))
        self._summed += float(difference.sum(dtype=np.float64))
        self._count += difference.size

    def maps(
        self,
        reference: NDArray[np.integer],
        found: NDArray[np.integer] | None,
        margin: NDArray[np.float32],
        label: NDArray[np.uint8] | None,
    ) -> float:
        """Class maps [H, W] of one image, the margin of the reference at each pixel, and its label;
        the share of equal pixels. An image whose map was not ``found`` (its logits hold NaN) agrees
        nowhere, and is class 0 everywhere to the scores."""
        self.images += 1
        if found is None:
            self.broken += 1
            found, equal = np.zeros_like(reference), np.zeros(reference.shape, bool)
        else:
            equal = reference == found
        bins = np.digitize(margin, MARGINS[1:])
        self._pixels += np.bincount(bins.ravel(), minlength=len(MARGINS))
        self._equal += np.bincount(bins[equal], minlength=len(MARGINS))
        if label is not None:
            sides = []
            for total, prediction in ((self.reference, reference), (self.measured, found)):
                one = ConfusionMatrix(self.classes, self.ignore_index)
                one.update(prediction, label)
                total.matrix += one.matrix
                sides.append(np.stack([np.diag(one.matrix), one.matrix.sum(1), one.matrix.sum(0)]))
            self._per_image.append((sides[0], sides[1]))
        return float(np.count_nonzero(equal) / equal.size)

    @property
    def labelled(self) -> bool:
        """Whether any pixel had a label."""
        return bool(self.reference.matrix.sum())

    @property
    def agreement(self) -> float:
        """The share of equal pixels, of all images together."""
        return float(self._equal.sum() / self._pixels.sum())

    @property
    def agreement_confident(self) -> float:
        """The same where the reference's best class leads by ``CONFIDENT_MARGIN``; 1 if nowhere."""
        sure = np.array(MARGINS) >= CONFIDENT_MARGIN
        pixels = int(self._pixels[sure].sum())
        return float(self._equal[sure].sum() / pixels) if pixels else 1.0

    def margins(self) -> tuple[MarginRow, ...]:
        """The agreement by margin, one row a bin."""
        total = int(self._pixels.sum())
        return tuple(
            MarginRow(
                above=above,
                below=below,
                share=float(pixels / total),
                agreement=float(equal / pixels) if pixels else None,
            )
            for above, below, pixels, equal in zip(
                MARGINS, (*MARGINS[1:], None), self._pixels, self._equal, strict=True
            )
        )

    def logit_differences(self) -> tuple[float, float] | None:
        """The largest and the mean difference, as shares of the reference's largest logit; None
        where no logits were compared, or some hold NaN or infinity."""
        if not self._count or self.broken:
            return None
        return self._worst / self._largest, self._summed / self._count / self._largest

    def delta(self) -> Delta | None:
        """mIoU of both sides; None without a label."""
        if not self.labelled:
            return None
        sides, labelled = (self.reference, self.measured), self.reference.matrix.sum(1) > 0
        return Delta.of(
            [one.miou for one in sides], [one.iou for one in sides], labelled, self.interval()
        )

    def interval(self) -> tuple[float, float]:
        """``bootstrap`` of ΔmIoU."""
        counts = [np.stack([pair[side] for pair in self._per_image]) for side in (0, 1)]
        return bootstrap(len(self._per_image), [partial(_miou_of, side) for side in counts])


def _miou_of(counts: Counts, times: Counts) -> float:
    """mIoU of images [I, 3, N] of (hits, labelled, predicted), each so many times."""
    hits, labelled, predicted = np.tensordot(times, counts, 1)
    union = labelled + predicted - hits
    return float((hits[union > 0] / union[union > 0]).mean()) if (union > 0).any() else np.nan


def default_tolerance(precision: Precision) -> Tolerance:
    """What a graph of this precision is held to unless somebody asks for less."""
    return _TOLERANCES[precision]


def segment_tolerance(precision: Precision) -> Tolerance:
    """The same for a network for segments."""
    return _SEGMENT_TOLERANCES[precision]


def tightened(tolerance: Tolerance, settings: Sequence[str]) -> Tolerance:
    """``tolerance`` with ``NAME=VALUE`` settings such as "delta_miou=0.01".

    Raises ConfigError for an unknown name, what is no number, and a value that would loosen it: a
    bundle is held to its own tolerance at least.
    """
    values, changed = msgspec.structs.asdict(tolerance), tolerance
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or name not in values:
            raise ConfigError(f"--tolerance {setting}: write NAME=VALUE, of {', '.join(values)}")
        try:
            value = float(text)
        except ValueError as error:
            raise ConfigError(f"--tolerance {setting}: {text!r} is no number") from error
        try:
            changed = msgspec.structs.replace(changed, **{name: value})
        except ValueError as error:
            raise ConfigError(f"--tolerance: {error}") from error
        if tolerance.failures(**{name: value}):  # what just passes the new limit fails its own
            raise ConfigError(
                f"--tolerance {setting} is looser than the bundle's own {values[name]:g}: a "
                "tolerance can only be tightened"
            )
    return changed
