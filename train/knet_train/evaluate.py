"""Scores of a PyTorch model, by the runtime's own preprocessing, upsampling and metrics.

A confusion matrix as a picture that can be read for eleven classes and for 150.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from knet_runtime.bundle.manifest import InputSpec
from knet_runtime.errors import ConfigError, DataError
from knet_runtime.labels import LabelMap
from knet_runtime.metrics import ConfusionMatrix
from knet_runtime.postprocess import class_map, upsampled_argmax
from knet_runtime.preprocess import fit_to_input, keep_ratio
from knet_runtime.types import ClassMap, Rgb
from knet_train import inference
from knet_train.checkpoint import Checkpoint
from knet_train.config import Config
from knet_train.data.dataset import LabelledFolder
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
    mode: str  # how the pictures were seen, in words
    miou: float | None = msgspec.field(name="mIoU")
    macc: float | None = msgspec.field(name="mAcc")
    aacc: float | None = msgspec.field(name="aAcc")
    classes: tuple[ClassRow, ...]
    confusion: list[list[int]]  # pixels; rows are labels, columns predictions


def input_spec(config: Config) -> InputSpec:
    """The network's input as export fixes it, and as pictures of ``eval_mode`` "fixed" see it."""
    height, width = config.data.eval_size
    return InputSpec(
        name="image",
        height=height,
        width=width,
        resize=config.data.eval_resize,
        max_batch=16,
        multiple=config.model.stride,
    )


def predict_logits(model: KNet, image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """An image uint8 [H, W, 3] RGB -> the last stage's logits float32 [N, H/s, W/s], rounded up.
    Raises CheckpointError when they hold NaN or infinity."""
    found = inference.logits(model, torch.from_numpy(image).to(model.mean.device))
    return np.asarray(found.cpu().numpy(), np.float32)


def predict(model: KNet, image: NDArray[np.uint8], config: Config) -> ClassMap:
    """An image uint8 [h, w, 3] RGB of any size -> its class map [h, w], seen as
    ``config.data.eval_mode`` says. The model must be in evaluation mode."""
    match config.data.eval_mode:
        case "fixed":
            fitted, geometry = fit_to_input(image, input_spec(config))
            return class_map(predict_logits(model, fitted), geometry)
        case "keep_ratio":
            scaled = keep_ratio(image, config.data.eval_scale)
            return upsampled_argmax(
                predict_logits(model, scaled),
                (image.shape[0], image.shape[1]),
                via=(scaled.shape[0], scaled.shape[1]),
            )


def predict_many(
    model: KNet, image: NDArray[np.uint8], config: Config, *, slide: bool, ms_flip: bool
) -> ClassMap:
    """``predict`` in windows of ``config.data.crop`` (``slide``), or as the mean softmax at
    ``inference.RATIOS`` of ``eval_scale``, plain and mirrored (``ms_flip``), or both."""
    crop = config.data.crop if slide else None
    looks = [(ratio, mirrored) for ratio in inference.RATIOS for mirrored in (False, True)]
    views = []
    for ratio, mirrored in looks if ms_flip else [(1.0, False)]:
        longest, shortest = (int(side * ratio) for side in config.data.eval_scale)
        views.append(inference.look(model, image, (longest, shortest), crop, mirrored=mirrored))
    return inference.class_map(views)


def evaluate(
    model: KNet,
    folder: LabelledFolder,
    config: Config,
    *,
    slide: bool = False,
    ms_flip: bool = False,
    on_image: Callable[[], None] = lambda: None,
) -> ConfusionMatrix:
    """Confusion matrix over a split, at the images' own sizes; see ``predict`` and
    ``predict_many``. The model must be in evaluation mode.

    Raises ConfigError when windows or scales are asked for in ``eval_mode`` "fixed", and what
    ``LabelledFolder.read`` raises.
    """
    check_mode(config, slide=slide, ms_flip=ms_flip)
    confusion = ConfusionMatrix(folder.labels.num_classes, folder.labels.ignore_index)
    for index in range(len(folder)):
        image, label = folder.read(index)
        if slide or ms_flip:
            prediction = predict_many(model, image, config, slide=slide, ms_flip=ms_flip)
        else:
            prediction = predict(model, image, config)
        confusion.update(prediction, label)
        on_image()
    return confusion


def check_mode(config: Config, *, slide: bool, ms_flip: bool) -> None:
    """ConfigError where windows or scales are asked for and pictures have one fixed size."""
    if config.data.eval_mode == "fixed" and (slide or ms_flip):
        raise ConfigError(
            f"{'--slide' if slide else '--ms-flip'} sees pictures at their own ratio, but "
            f"{config.preset} is evaluated at one fixed size: "
            "pass --set data.eval_mode=keep_ratio too"
        )


def describe_mode(config: Config, *, slide: bool, ms_flip: bool) -> str:
    """How pictures are seen, in words."""
    data = config.data
    if data.eval_mode == "fixed":
        return f"{data.eval_resize} to {data.eval_size[1]}×{data.eval_size[0]}"
    words = [f"keep ratio inside ({data.eval_scale[0]}, {data.eval_scale[1]})"]
    words.append(f"windows of {data.crop[1]}×{data.crop[0]}" if slide else "whole")
    if ms_flip:
        words.append(f"scales {' '.join(f'{ratio:g}' for ratio in inference.RATIOS)}, mirrored too")
    return ", ".join(words)


def check_classes(labels: LabelMap, folder: LabelledFolder) -> None:
    """Refuse data of another task: DataError unless its classes are the checkpoint's."""
    if labels.names == folder.labels.names:
        return
    ours, theirs = labels.num_classes, folder.labels.num_classes
    what = f"{theirs} classes, the checkpoint {ours}"
    if ours == theirs:
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
    return msgspec.json.encode(report) + b"\n"


def _percent(share: float) -> float | None:
    """0 … 1 -> 0 … 100; None for NaN."""
    return None if np.isnan(share) else 100 * float(share)


_FONT = cv2.FONT_HERSHEY_SIMPLEX
_INK, _PALE, _PAPER, _LINE = (40, 40, 40), (120, 120, 120), 255, (232, 232, 232)
_MARGIN, _LONGEST_NAME = 24, 26
_TICKS = (0, 1, 5, 10, 25, 50, 75, 100)  # percent, on the scale beside the matrix
# From white over blue to near black: brightness falls evenly, so that a grey print can be read too.
_RAMP = ((255, 255, 255), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107))


def draw_confusion(confusion: ConfusionMatrix, labels: LabelMap, title: str) -> bytes:
    """PNG bytes. A row is a labelled class, a column a predicted one; colours are shares of the
    row's pixels on a square-root scale, so that confusions of one in a hundred show. Up to 30
    classes have the percentages in the cells. A class that was never labelled has a grey row."""
    count = labels.num_classes
    totals = confusion.matrix.sum(1)
    shares = confusion.matrix / np.maximum(totals, 1)[:, None]
    cell, scale = (46, 0.46) if count <= 30 else (14, 0.36)
    names = [_short(name) for name in labels.names]
    widest = max(_width(name, scale) for name in names)
    left, top = _MARGIN + 22 + widest + 8, _MARGIN + 40 + widest + 8
    side = cell * count
    picture = np.full((top + side + _MARGIN, left + side + 110, 3), _PAPER, np.uint8)
    colours = _ramp(np.sqrt(shares))
    colours[totals == 0] = 243
    picture[top : top + side, left : left + side] = colours.repeat(cell, 0).repeat(cell, 1)
    for index in range(count + 1):
        edge = index * cell
        cv2.line(picture, (left, top + edge), (left + side, top + edge), _LINE, 1)
        cv2.line(picture, (left + edge, top), (left + edge, top + side), _LINE, 1)
    for index, name in enumerate(names):
        ink = _INK if totals[index] else _PALE
        middle = index * cell + cell // 2
        _text(picture, name, (left - 8 - _width(name, scale), top + middle + 4), scale, ink)
        _upright(picture, name, (left + middle, top - 8), scale, _INK)
    if count <= 30:
        _percentages(picture[top:, left:], shares, totals, cell)
    _text(picture, _short(title, 110), (_MARGIN, _MARGIN + 12), 0.6, _INK)
    _text(picture, "predicted", (left, _MARGIN + 34), 0.46, _PALE)
    _upright(picture, "labelled", (_MARGIN + 4, top + _width("labelled", 0.46)), 0.46, _PALE)
    _draw_scale(picture, left + side + 24, top, min(side, 400))
    _, data = cv2.imencode(".png", np.ascontiguousarray(picture[..., ::-1]))
    return data.tobytes()


def _percentages(
    cells: Rgb, shares: NDArray[np.float64], totals: NDArray[np.int64], cell: int
) -> None:
    for row, column in zip(*np.nonzero((shares >= 0.005) & (totals[:, None] > 0)), strict=True):
        text = f"{100 * shares[row, column]:.0f}"
        ink = (255, 255, 255) if shares[row, column] > 0.3 else _INK
        left = column * cell + (cell - _width(text, 0.44)) // 2
        _text(cells, text, (left, row * cell + cell // 2 + 5), 0.44, ink)


def _draw_scale(picture: Rgb, left: int, top: int, height: int) -> None:
    shares = np.linspace(1, 0, height)[:, None]
    picture[top : top + height, left : left + 16] = _ramp(shares)
    cv2.rectangle(picture, (left, top), (left + 16, top + height), _LINE, 1)
    for tick in _TICKS:
        at = top + round((1 - np.sqrt(tick / 100)) * height)
        cv2.line(picture, (left + 16, at), (left + 20, at), _PALE, 1)
        _text(picture, f"{tick} %", (left + 25, at + 4), 0.4, _PALE)


def _ramp(values: NDArray[np.float64]) -> Rgb:
    """0 … 1, of any shape, -> RGB with one more axis."""
    at = np.linspace(0, 1, len(_RAMP))
    channels = [np.interp(values, at, [colour[c] for colour in _RAMP]) for c in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def _short(text: str, longest: int = _LONGEST_NAME) -> str:
    plain = text.encode("ascii", "replace").decode()
    return plain if len(plain) <= longest else plain[: longest - 2] + ".."


def _width(text: str, scale: float) -> int:
    return int(cv2.getTextSize(text, _FONT, scale, 1)[0][0])


def _text(
    picture: Rgb, text: str, at: tuple[int, int], scale: float, ink: tuple[int, int, int]
) -> None:
    cv2.putText(picture, text, at, _FONT, scale, ink, 1, cv2.LINE_AA)


def _upright(
    picture: Rgb, text: str, at: tuple[int, int], scale: float, ink: tuple[int, int, int]
) -> None:
    """Text that reads upwards: it begins at ``at`` (x of its middle, y) on the white paper."""
    (width, height), below = cv2.getTextSize(text, _FONT, scale, 1)
    strip = np.full((height + below + 2, width + 2, 3), _PAPER, np.uint8)
    _text(strip, text, (1, height + 1), scale, ink)
    turned = np.ascontiguousarray(np.rot90(strip))
    top, left = at[1] - turned.shape[0], at[0] - (height + 2) // 2
    part = picture[top : top + turned.shape[0], left : left + turned.shape[1]]
    np.minimum(part, turned, out=part)
