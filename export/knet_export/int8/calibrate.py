"""Activation ranges of a float graph, measured in ONNX Runtime on the user's own pictures.

How large a tensor's values are, and the largest that int8 should still tell apart.

A histogram of |x| that grows with what it sees, in bounded memory; minmax, percentile and entropy
thresholds are all read from it, so one pass over the pictures serves every method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args

import numpy as np
import onnx
from numpy.typing import NDArray

from knet_export.graph.check import open_session
from knet_runtime.bundle.manifest import InputSpec
from knet_runtime.errors import CheckpointError, DataError, SourceError
from knet_runtime.labels import LabelMap
from knet_runtime.preprocess import fit_to_input
from knet_runtime.sources.images import list_images, read_image
from knet_train.data.dataset import LabelledFolder, open_folder
from knet_train.evaluate import check_classes

Method = Literal["minmax", "percentile", "entropy"]
METHODS: tuple[Method, ...] = get_args(Method)

_BINS = 4096
_LEVELS = 128  # of |x| in symmetric int8
_STEP = 32  # bins between two thresholds that entropy tries


class Histogram:
    """Counts of |x| in equal bins of [0, limit); the limit doubles when a larger value comes."""

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
                return min(self.largest, self._edge(_least_divergence(self.counts)))

    def _edge(self, bins: int) -> float:
        return bins * self.limit / _BINS


def _least_divergence(counts: NDArray[np.int64]) -> int:
    """How many of the first bins to keep, so that the counts and what 128 levels make of them
    differ least. Ties go to the fewest clipped."""
    density = counts.astype(np.float64)
    density[0] = density[1]  # exact zeros (ReLU's, padding's) stay zeros in int8 at any scale
    used = int(np.flatnonzero(density).max(initial=0)) + 1
    best, least = used, np.inf
    for bins in range(used, _LEVELS - 1, -_STEP):
        kept = density[:bins].copy()
        kept[-1] += density[bins:].sum()  # what is clipped counts as the largest
        divergence = _divergence(kept, density[:bins])
        if divergence < least:
            best, least = bins, divergence
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


_SPLIT = "train"  # "val" is what verify judges by: nothing may be chosen on it
_RANGED = 64  # pictures at most
_JUDGED = 48

Item = TypeVar("Item")
Picture = tuple[NDArray[np.uint8], NDArray[np.uint8] | None]


@dataclass(frozen=True)
class CalibrationSet:
    """Pictures to calibrate on, read when asked for: a folder of images, or a data set's split."""

    name: str
    images: tuple[Path, ...]
    folder: LabelledFolder | None = None

    def read(self, index: int) -> Picture:
        """uint8 [H, W, 3] RGB and its label [H, W] or None; SourceError names a broken file."""
        if self.folder is not None:
            return self.folder.read(index)
        return read_image(self.images[index]), None

    def parts(self) -> tuple[list[int], list[int]]:
        """Indices to measure ranges on, and others to judge by, both spread over the whole.

        A lone picture has to serve as both.
        """
        count = len(self.images)
        judged = spread(range(count), min(_JUDGED, count // 2))
        rest = sorted(set(range(count)) - set(judged))
        return spread(rest, _RANGED), judged or rest


def open_calibration(path: Path, labels: LabelMap) -> CalibrationSet:
    """The pictures of ``path``: a folder of images, or a data set, whose split "train" is taken.

    Raises DataError when there is none, or when a data set has other classes than ``labels``.
    """
    if not path.is_dir():
        raise DataError(f"--calibration {path} is not a folder: name one with pictures of your own")
    if any((path / inner).is_dir() for inner in ("images", "leftImg8bit")):
        folder = open_folder(path, _SPLIT)
        check_classes(labels, folder)
        images = tuple(sample.image for sample in folder.samples)
        return CalibrationSet(f"{path.resolve().name}, split {_SPLIT}", images, folder)
    try:
        images = tuple(list_images(path))
    except SourceError as error:
        raise DataError(
            f"--calibration {error}, or name a data set with images/ and labels/"
        ) from error
    return CalibrationSet(path.resolve().name, images)


def measure_ranges(
    graph: onnx.ModelProto,
    weights: Path,
    tensors: Sequence[str],
    pictures: Iterable[Picture],
    spec: InputSpec,
    on_picture: Callable[[], None] = lambda: None,
) -> dict[str, Histogram]:
    """Run the float ``graph``, whose external data lies in the folder ``weights``, on fitted
    pictures, one at a time, and count what ``tensors`` hold.

    Raises CheckpointError when one holds NaN or infinity, DataError without a picture.
    """
    histograms = {name: Histogram() for name in tensors}
    seen = 0
    session = open_session(graph, weights, tensors)
    for image, _ in pictures:
        values = session.run(list(tensors), {spec.name: fit_to_input(image, spec)[0][None]})
        for name, value in zip(tensors, values, strict=True):
            try:
                histograms[name].add(value)
            except ValueError as error:
                raise CheckpointError(
                    f"the tensor {name} can not be quantised: {error} on calibration picture "
                    f"{seen + 1}; check the checkpoint with `knet-deploy eval`"
                ) from error
        seen += 1
        on_picture()
    if not seen:
        raise DataError("there is no picture to calibrate on: name at least one")
    return histograms


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most ``count`` of ``items``, evenly over the whole."""
    count = min(count, len(items))
    return [items[(2 * place + 1) * len(items) // (2 * count)] for place in range(count)]
