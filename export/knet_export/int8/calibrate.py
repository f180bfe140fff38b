"""What the activations of a float graph hold on the user's own images, and which ranges int8 needs.

Some images give the ranges, others score the result. Of every tensor a histogram of |x| is kept,
from which minmax, percentile and entropy thresholds are all read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from knet_export.data import LabelledImage
from knet_export.graph.onnx_graph import OnnxGraph
from knet_export.int8 import Method
from knet_runtime.bundle.manifest import InputSpec
from knet_runtime.errors import CheckpointError, DataError
from knet_runtime.preprocess import fit_to_input

_MAX_RANGED = 64  # images
_MAX_SCORED = 48
_BINS = 4096
_LEVELS = 128  # of |x| in symmetric int8
_STEP = 32  # bins between two thresholds that entropy tries

Item = TypeVar("Item")


def split_images(count: int) -> tuple[list[int], list[int]]:
    """Which of ``count`` images give the ranges, and which others score the result, both spread
    over the whole. A lone image has to serve as both."""
    scored = spread(range(count), min(_MAX_SCORED, count // 2))
    rest = sorted(set(range(count)) - set(scored))
    return spread(rest, _MAX_RANGED), scored or rest


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most ``count`` of ``items``, evenly over the whole."""
    count = min(count, len(items))
    return [items[(2 * place + 1) * len(items) // (2 * count)] for place in range(count)]


def measure_ranges(
    graph: OnnxGraph, tensors: Sequence[str], images: Iterable[LabelledImage], spec: InputSpec
) -> dict[str, Histogram]:
    """Run the float ``graph`` on fitted images, one at a time, and count what ``tensors`` hold.

    Raises CheckpointError when one holds NaN or infinity, DataError without an image.
    """
    histograms = {name: Histogram() for name in tensors}
    seen = 0
    session = graph.session(tensors)
    for image, _ in images:
        seen += 1
        values = session.run(list(tensors), {spec.name: fit_to_input(image, spec)[0][None]})
        for name, value in zip(tensors, values, strict=True):
            try:
                histograms[name].add(value)
            except ValueError as error:
                raise CheckpointError(
                    f"the tensor {name} cannot be quantised: {error} on calibration image {seen}; "
                    "check the checkpoint with `knet-deploy eval`"
                ) from error
    if not seen:
        raise DataError("there is no image to calibrate on: name at least one")
    return histograms


class Histogram:
    """Counts of |x| in equal bins of [0, limit); the limit doubles when a larger value comes.

    So one pass over the images, in bounded memory, serves every method.
    """

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(_BINS, np.int64)
        self.limit = 0.0
        self.largest = 0.0

    def add(self, values: NDArray[np.float32]) -> None:
        """Count an array of any shape. Raises ValueError when it holds NaN or infinity."""
        sizes = np.abs(values, dtype=np.float32).ravel()
        largest = float(sizes.max(initial=0.0))  # carries a NaN on
        if not np.isfinite(largest):
            raise ValueError("it holds NaN or infinity")
        self.largest = max(self.largest, largest)
        if largest > 0:
            self._reach(largest)
            places = sizes * np.float32(_BINS / self.limit)
            found = np.bincount(places.astype(np.int32), minlength=_BINS)
        else:
            found = np.bincount([0], [sizes.size], minlength=_BINS).astype(np.int64)
        found[_BINS - 1] += found[_BINS:].sum()  # rounded up onto the limit
        self.counts += found[:_BINS]

    def _reach(self, largest: float) -> None:
        if self.limit == 0:
            self.limit = largest
        while self.limit < largest:
            pairs = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.concatenate((pairs, np.zeros_like(pairs)))
            self.limit *= 2

    def threshold(self, method: Method, percent: float = 100.0) -> float:
        """The |x| that is to become 127, never above the largest seen; 0 when all was 0.

        "minmax" is the largest, "percentile" the one that ``percent`` % of the values reach at
        most, "entropy" the one whose int8 loses least information (Kullback-Leibler divergence;
        Migacz, "8-bit inference with TensorRT", 2017).
        """
        match method:
            case "minmax":
                return self.largest
            case "percentile":
                if not 0 < percent <= 100:
                    raise ValueError(f"a percentile is in (0, 100], not {percent}")
                enough = self.counts.cumsum() >= percent / 100 * self.counts.sum()
                return min(self.largest, self._edge(int(enough.argmax()) + 1))
            case "entropy":
                return min(self.largest, self._edge(_min_divergence(self.counts)))

    def _edge(self, bins: int) -> float:
        return bins * self.limit / _BINS


def _min_divergence(counts: NDArray[np.int64]) -> int:
    """How many of the first bins to keep, so that the counts and what 128 levels make of them
    differ least. Ties go to the fewest clipped."""
    density = counts.astype(np.float64)
    density[0] = density[1]  # exact zeros (ReLU's, padding's) stay zeros in int8 at any scale
    used = int(np.flatnonzero(density).max(initial=0)) + 1
    best, lowest = used, np.inf
    for bins in range(used, _LEVELS - 1, -_STEP):
        kept = density[:bins].copy()
        kept[-1] += density[bins:].sum()  # what is clipped counts as the largest
        divergence = _divergence(kept, density[:bins])
        if divergence < lowest:
            best, lowest = bins, divergence
    return best


def _divergence(reference: NDArray[np.float64], counts: NDArray[np.float64]) -> float:
    """KL(reference ‖ ``counts`` merged into 128 levels and spread evenly over the bins that each
    level's non-zero counts came from)."""
    level = np.arange(len(counts)) * _LEVELS // len(counts)
    filled = counts > 0
    merged = np.bincount(level, counts, _LEVELS)
    share = merged / np.maximum(np.bincount(level, filled, _LEVELS), 1)
    spread = np.where(filled, share[level], 0.0)
    seen = reference > 0
    if not spread.any() or (seen & ~filled).any():
        return float(np.inf)
    p, q = reference[seen] / reference.sum(), spread[seen] / spread.sum()
    return float((p * np.log(p / q)).sum())
