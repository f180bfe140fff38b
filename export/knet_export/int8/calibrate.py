"""Activation ranges of a float graph, measured in ONNX Runtime on the user's own pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray

from knet_export.graph.session import open_session
from knet_export.int8.histogram import Histogram
from knet_runtime.errors import CheckpointError, DataError, SourceError
from knet_runtime.labels import LabelMap
from knet_runtime.manifest import InputSpec
from knet_runtime.preprocess import fit
from knet_runtime.source.image_file import read_image
from knet_runtime.source.images import list_images
from knet_train.dataset import LabelledFolder, open_folder
from knet_train.evaluate import check_classes

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
    stride: int,
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
        values = session.run(list(tensors), {spec.name: fit(image, spec, stride)[0][None]})
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
