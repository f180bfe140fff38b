"""The score of a PyTorch model over a split, as published scores are: by the runtime's metrics."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np

from knet_runtime.atomic import json_bytes
from knet_runtime.errors import ConfigError, DataError
from knet_runtime.labels import LabelMap
from knet_runtime.metrics import ConfusionMatrix
from knet_train.checkpoint import Checkpoint
from knet_train.config import Config
from knet_train.data.dataset import LabelledFolder
from knet_train.inference import RATIOS, predict
from knet_train.models.knet import KNet


class ClassRow(msgspec.Struct, frozen=True):
    """One class in percent; None where it is 0 / 0. The names are mmsegmentation's."""

    name: str
    iou: float | None
    acc: float | None  # of the pixels with this label, those predicted as such (recall)
    precision: float | None
    pixels: int


class EvalReport(msgspec.Struct, frozen=True, kw_only=True):
    """What ``knet-deploy eval`` measured; scores in percent, None where nothing was labelled."""

    checkpoint_sha256: str
    preset: str
    data: str
    images: int
    mode: str  # how the images were seen, in words
    miou: float | None = msgspec.field(name="mIoU")
    macc: float | None = msgspec.field(name="mAcc")
    aacc: float | None = msgspec.field(name="aAcc")
    classes: tuple[ClassRow, ...]
    confusion: list[list[int]]  # pixels; rows are labels, columns predictions


def evaluate(
    model: KNet,
    folder: LabelledFolder,
    config: Config,
    *,
    slide: bool = False,
    ms_flip: bool = False,
    on_image: Callable[[], None] = lambda: None,
) -> ConfusionMatrix:
    """Confusion matrix over a split, at the images' own sizes; see ``predict``. The model must be
    in evaluation mode.

    Raises ConfigError when windows or scales are asked for in ``eval_mode`` "fixed", and what
    ``LabelledFolder.read`` raises.
    """
    check_mode(config, slide=slide, ms_flip=ms_flip)
    confusion = ConfusionMatrix(folder.labels.num_classes, folder.labels.ignore_index)
    for index in range(len(folder)):
        image, label = folder.read(index)
        confusion.update(predict(model, image, config, slide=slide, ms_flip=ms_flip), label)
        on_image()
    return confusion


def check_mode(config: Config, *, slide: bool, ms_flip: bool) -> None:
    """ConfigError where windows or scales are asked for and images have one fixed size."""
    if config.data.eval_mode == "fixed" and (slide or ms_flip):
        raise ConfigError(
            f"{'--slide' if slide else '--ms-flip'} sees images at their own ratio, but "
            f"{config.preset} is evaluated at one fixed size: "
            "pass --set data.eval_mode=keep_ratio too"
        )


def describe_mode(config: Config, *, slide: bool, ms_flip: bool) -> str:
    """How images are seen, in words."""
    data = config.data
    if data.eval_mode == "fixed":
        return f"{data.eval_resize} to {data.eval_size[1]}×{data.eval_size[0]}"
    words = [f"keep ratio inside ({data.eval_scale[0]}, {data.eval_scale[1]})"]
    words.append(f"windows of {data.crop[1]}×{data.crop[0]}" if slide else "whole")
    if ms_flip:
        words.append(f"scales {' '.join(f'{ratio:g}' for ratio in RATIOS)}, mirrored too")
    return ", ".join(words)


def check_classes(labels: LabelMap, folder: LabelledFolder) -> None:
    """Refuse data of another task: DataError unless its classes are the checkpoint's."""
    if labels.names == folder.labels.names:
        return
    wanted, found = labels.num_classes, folder.labels.num_classes
    what = f"{found} classes, the checkpoint {wanted}"
    if found == wanted:
        pairs = zip(folder.labels.names, labels.names, strict=True)
        has, wants = next(pair for pair in pairs if pair[0] != pair[1])
        what = f"class {has!r} where the checkpoint has {wants!r}"
    raise DataError(
        f"{folder.root} has {what}: evaluate on data labelled with the checkpoint's classes"
    )


def make_report(
    confusion: ConfusionMatrix, checkpoint: Checkpoint, folder: LabelledFolder, mode: str
) -> EvalReport:
    """The scores in percent; ``mode`` is ``describe_mode``'s."""
    return EvalReport(
        checkpoint_sha256=checkpoint.sha256,
        preset=checkpoint.config.preset,
        data=f"{folder.root.resolve().name}, split {folder.split}",
        images=len(folder),
        mode=mode,
        miou=_percent(confusion.miou),
        macc=_percent(confusion.mean_accuracy),
        aacc=_percent(confusion.pixel_accuracy),
        classes=tuple(
            ClassRow(
                row.name,
                _percent(row.iou),
                _percent(row.recall),
                _percent(row.precision),
                row.pixels,
            )
            for row in confusion.rows(folder.labels)
        ),
        confusion=confusion.matrix.tolist(),
    )


def encode_report(report: EvalReport) -> bytes:
    """The report as JSON."""
    return json_bytes(report) + b"\n"


def _percent(share: float) -> float | None:
    """0 … 1 -> 0 … 100; None for NaN."""
    return None if np.isnan(share) else 100 * float(share)
