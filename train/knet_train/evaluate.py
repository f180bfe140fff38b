"""The score of a semantic model over a split, as published scores are: by the runtime's metrics.

The model is whatever gives an image's class map: a checkpoint in PyTorch, or a bundle, which needs
no PyTorch; nor does this module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_runtime.atomic import json_bytes
from knet_runtime.errors import DataError
from knet_runtime.labels import LabelMap
from knet_runtime.metrics import ConfusionMatrix
from knet_runtime.segmentation import Segmentation
from knet_train.data.dataset import LabelledFolder
from knet_train.data.drives import drive

Find = Callable[[NDArray[np.uint8]], Segmentation]
"""An image uint8 [H, W, 3] RGB to its result at its own size."""


class Scored(msgspec.Struct, frozen=True, kw_only=True):
    """What was scored, and on what."""

    checkpoint_sha256: str  # of a bundle, the one that it was exported from
    preset: str
    engine: str  # "pytorch-cpu", "pytorch-cuda", or the engine that ran a bundle
    data: str
    images: int
    mode: str  # how the images were seen, in words


class ClassRow(msgspec.Struct, frozen=True):
    """One class in percent; None where it is 0 / 0. The names are mmsegmentation's."""

    name: str
    iou: float | None
    acc: float | None  # of the pixels with this label, those predicted as such (recall)
    precision: float | None
    pixels: int


class DriveRow(msgspec.Struct, frozen=True):
    """One drive, see ``knet_train.data.drives``; scores in percent, as of the whole."""

    name: str
    images: int
    miou: float | None = msgspec.field(name="mIoU")
    iou: tuple[float | None, ...]  # of each class


class EvalReport(Scored, frozen=True, kw_only=True):
    """What ``knet-deploy eval`` measured; scores in percent, None where nothing was labelled."""

    miou: float | None = msgspec.field(name="mIoU")
    macc: float | None = msgspec.field(name="mAcc")
    aacc: float | None = msgspec.field(name="aAcc")
    classes: tuple[ClassRow, ...]
    confusion: list[list[int]]  # pixels; rows are labels, columns predictions
    drives: tuple[DriveRow, ...] = ()  # where they were asked for


def evaluate(
    find: Find, folder: LabelledFolder, on_image: Callable[[], None] = lambda: None
) -> dict[str, ConfusionMatrix]:
    """Confusion matrices over a split, by drive, at the images' own sizes. Raises what ``find`` and
    ``LabelledFolder.read`` raise."""
    found: dict[str, ConfusionMatrix] = {}
    for index, sample in enumerate(folder.samples):
        image, label = folder.read(index)
        name = drive(sample.image)
        if name not in found:
            found[name] = ConfusionMatrix(folder.labels.num_classes, folder.labels.ignore_index)
        found[name].update(find(image).class_map, label)
        on_image()
    return found


def together(by_drive: Mapping[str, ConfusionMatrix], labels: LabelMap) -> ConfusionMatrix:
    """The confusion matrix of all drives."""
    total = ConfusionMatrix(labels.num_classes, labels.ignore_index)
    for one in by_drive.values():
        total.matrix = total.matrix + one.matrix
    return total


def drive_rows(
    by_drive: Mapping[str, ConfusionMatrix], folder: LabelledFolder
) -> tuple[DriveRow, ...]:
    """The scores of each drive of a split, by name."""
    images = Counter(drive(sample.image) for sample in folder.samples)
    return tuple(
        DriveRow(name, images[name], percent(one.miou), tuple(map(percent, one.iou.tolist())))
        for name, one in sorted(by_drive.items())
    )


def check_classes(wanted: Sequence[str], found: Sequence[str], root: Path) -> None:
    """Refuse the data in ``root``, which has the classes ``found``: DataError unless they are the
    model's."""
    if wanted == found:
        return
    what = f"{len(found)} classes, the model {len(wanted)}"
    if len(found) == len(wanted):
        has, wants = next(pair for pair in zip(found, wanted, strict=True) if pair[0] != pair[1])
        what = f"class {has!r} where the model has {wants!r}"
    raise DataError(f"{root} has {what}: evaluate on data labelled with the model's classes")


def make_report(confusion: ConfusionMatrix, labels: LabelMap, scored: Scored) -> EvalReport:
    """The scores in percent."""
    return EvalReport(
        **msgspec.structs.asdict(scored),
        miou=percent(confusion.miou),
        macc=percent(confusion.mean_accuracy),
        aacc=percent(confusion.pixel_accuracy),
        classes=tuple(
            ClassRow(
                row.name, percent(row.iou), percent(row.recall), percent(row.precision), row.pixels
            )
            for row in confusion.rows(labels)
        ),
        confusion=confusion.matrix.tolist(),
    )


def percent(share: float) -> float | None:
    """0 … 1 -> 0 … 100; None for NaN."""
    return None if np.isnan(share) else 100 * float(share)


def encode_report(report: Scored) -> bytes:
    """The report as JSON."""
    return json_bytes(report) + b"\n"
