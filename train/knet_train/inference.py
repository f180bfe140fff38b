"""From an image to PyTorch's answer: logits, and class maps seen as the configuration says.

An image is evaluated at one fixed size or at its own ratio; the latter also in windows, or at
several scales, as mmsegmentation does. All that mmsegmentation does between a window's logits and
the image is linear and acts on rows and columns apart: resizing to the window's size, the sum over
windows and the division by their counts, resizing to the image's size, mirroring. So the logits of
all windows are laid side by side [N, h, w], one matrix R [H, h] and one matrix C [W, w] stand for
all steps, and the image's logits are R L_n Cᵀ. They are computed a band of rows at a time: N×H×W
numbers are never held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from knet_runtime.bundle.manifest import InputSpec, SegmentRules
from knet_runtime.errors import CheckpointError, ConfigError
from knet_runtime.labels import LabelMap
from knet_runtime.postprocess import class_map, find_segments, upsampled_argmax
from knet_runtime.preprocess import Geometry, fit_to_input, keep_ratio
from knet_runtime.segmentation import Segmentation
from knet_runtime.types import ClassMap
from knet_train.config import Config
from knet_train.models.knet import KNet
from knet_train.models.segments import MULTIPLE, SegmentKNet

RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of eval_scale, in multi-scale evaluation
_NOT_FINITE = (
    "the network gives NaN or infinity, so its weights are broken: "
    "use an earlier checkpoint, or train with a lower optim.lr"
)
_BAND = 2**24  # numbers of one band of all classes: 64 MiB


@torch.no_grad()
def predict_logits(model: nn.Module, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """PyTorch's own answer: RGB images uint8 [B, H, W, 3] -> the last stage's logits float32
    [B, N, H/s, W/s] (rounded up). ``model`` is in evaluation mode, on any device.

    Raises CheckpointError when they hold NaN or infinity.
    """
    assert not model.training, "dropout and BatchNorm would take part"
    device = next(model.parameters()).device
    logits: Tensor = model(torch.from_numpy(images).to(device)).float()
    if not logits.isfinite().all():
        raise CheckpointError(_NOT_FINITE)
    return np.asarray(logits.cpu().numpy(), np.float32)


@torch.no_grad()
def predict_segment_logits(
    model: SegmentKNet, images: NDArray[np.uint8]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The same of a network for segments: class logits float32 [B, N, K] and mask logits float32
    [B, N, H/4, W/4]. Raises CheckpointError when they hold NaN or infinity."""
    device = next(model.parameters()).device
    classes, masks = (logits.float() for logits in model(torch.from_numpy(images).to(device)))
    if not (classes.isfinite().all() and masks.isfinite().all()):
        raise CheckpointError(_NOT_FINITE)
    return classes.cpu().numpy(), masks.cpu().numpy()


@torch.no_grad()
def predict_stage_masks(model: SegmentKNet, image: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    """Of one image [H, W, 3] the mask logits float32 [N, H/8, W/8] of the first kernels and of
    every update stage."""
    device = next(model.parameters()).device
    outputs = model.training_outputs(torch.from_numpy(image[None]).to(device))
    return [stage.masks[0].float().cpu().numpy() for stage in outputs.stages]


def input_spec(config: Config) -> InputSpec:
    """The network's input as export fixes it, and as images of ``eval_mode`` "fixed" see it."""
    height, width = config.data.eval_size
    return InputSpec(
        name="image",
        height=height,
        width=width,
        resize=config.data.eval_resize,
        max_batch=16,
        multiple=config.model.stride if config.model.task == "semantic" else MULTIPLE,
    )


def check_mode(config: Config, *, slide: bool, ms_flip: bool) -> None:
    """ConfigError where windows or scales are asked for of a network for segments, or where images
    have one fixed size."""
    if config.model.task != "semantic" and (slide or ms_flip):
        raise ConfigError(
            f"{'--slide' if slide else '--ms-flip'} is for semantic networks, and this is for "
            f"{config.model.task} segmentation: leave it out"
        )
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


def predict(
    model: KNet,
    image: NDArray[np.uint8],
    config: Config,
    *,
    slide: bool = False,
    ms_flip: bool = False,
) -> ClassMap:
    """An image uint8 [H, W, 3] RGB of any size -> its class map [H, W], seen as
    ``config.data.eval_mode`` says.

    With ``slide`` it is seen inside ``eval_scale`` in windows of ``crop``; with ``ms_flip`` at
    ``RATIOS`` of that scale, plain and mirrored, whose softmax is averaged. Raises CheckpointError
    as ``predict_logits`` does.
    """
    if slide or ms_flip:
        crop = config.data.crop if slide else None
        looks = [(ratio, mirrored) for ratio in RATIOS for mirrored in (False, True)]
        views = []
        for ratio, mirrored in looks if ms_flip else [(1.0, False)]:
            longest, shortest = (int(side * ratio) for side in config.data.eval_scale)
            views.append(look(model, image, (longest, shortest), crop, mirrored=mirrored))
        return best_classes(views)
    match config.data.eval_mode:
        case "fixed":
            fitted, geometry = fit_to_input(image, input_spec(config))
            logits = predict_logits(model, fitted[None])[0]
            return class_map(logits, geometry)
        case "keep_ratio":
            scaled = keep_ratio(image, config.data.eval_scale)
            return upsampled_argmax(
                predict_logits(model, scaled[None])[0],
                (image.shape[0], image.shape[1]),
                via=(scaled.shape[0], scaled.shape[1]),
            )


def segment_rules(config: Config) -> SegmentRules:
    """How a network's masks become segments: the published numbers, and the configuration's."""
    return SegmentRules(nms=config.model.nms)


@torch.no_grad()
def predict_segments(
    model: SegmentKNet,
    image: NDArray[np.uint8],
    config: Config,
    labels: LabelMap,
    rules: SegmentRules,
) -> Segmentation:
    """An image uint8 [H, W, 3] RGB of any size -> its objects or segments by the runtime's rules,
    seen as ``config.data.eval_mode`` says. Raises CheckpointError for NaN."""
    assert not model.training, "dropout and BatchNorm would take part"
    if config.data.eval_mode == "fixed":
        fitted, geometry = fit_to_input(image, input_spec(config))
        window = geometry.window
    else:
        fitted = keep_ratio(image, config.data.eval_scale)
        window = (0, 0, fitted.shape[0], fitted.shape[1])
    classes, masks = (found[0] for found in predict_segment_logits(model, fitted[None]))
    padded = (4 * masks.shape[-2], 4 * masks.shape[-1])  # the network pads to a multiple of 32
    geometry = Geometry((image.shape[0], image.shape[1]), padded, window)
    return find_segments(config.model.task, classes, masks, geometry, labels, rules)


class View(NamedTuple):
    """The logits of one look at an image, and how they are spread over its pixels."""

    logits: Tensor  # float32 [N, h, w]
    rows: Tensor  # float32 [H, h], each row sums to 1
    columns: Tensor  # float32 [W, w], likewise


def look(
    model: nn.Module,
    image: NDArray[np.uint8],
    scale: tuple[int, int],
    crop: tuple[int, int] | None = None,
    *,
    mirrored: bool = False,
) -> View:
    """See uint8 [H, W, 3] RGB at ``keep_ratio_size(.., scale)``, whole, or in windows of ``crop``
    (height, width) whose overlapping logits are averaged (mmsegmentation's ``slide_inference``).

    The windows' stride is 2/3 of the crop, rounded down (341 for 512); the last one is moved back
    inside the image, and along a side shorter than the crop there is one.
    """
    scaled = keep_ratio(image, scale)
    if mirrored:
        scaled = np.ascontiguousarray(scaled[:, ::-1])
    starts, window = [], []
    for side, length in zip(scaled.shape[:2], crop or scaled.shape[:2], strict=True):
        window.append(min(side, length))
        starts.append(window_starts(side, length))
    tiles = [
        [
            predict_logits(model, scaled[None, y : y + window[0], x : x + window[1]])[0]
            for x in starts[1]
        ]
        for y in starts[0]
    ]
    mosaic = torch.from_numpy(np.block(tiles)).to(next(model.parameters()).device)
    rows, columns = (
        bilinear(scaled.shape[axis], image.shape[axis])
        @ _spread(scaled.shape[axis], starts[axis], window[axis], mosaic.shape[1 + axis])
        for axis in (0, 1)
    )
    if mirrored:
        columns = columns.flip(0)
    return View(mosaic, rows.to(mosaic), columns.to(mosaic))


def window_starts(side: int, crop: int) -> list[int]:
    """Where the windows of ``crop`` begin along a side of the image."""
    stride = max(1, 2 * crop // 3)
    last = max(side - crop, 0)
    return [min(index * stride, last) for index in range(-(-last // stride) + 1)]


def bilinear(source: int, target: int) -> Tensor:
    """The matrix float64 [target, source] of a bilinear resize along one axis, as PyTorch's
    ``interpolate(mode="bilinear", align_corners=False)`` does it."""
    places = (torch.arange(target, dtype=torch.float64) + 0.5) * source / target - 0.5
    places = places.clamp(min=0)
    low = places.long().clamp(max=source - 1)
    high = (low + 1).clamp(max=source - 1)
    matrix = torch.zeros(target, source, dtype=torch.float64)
    lines, share = torch.arange(target), places - low
    matrix[lines, low] += 1 - share
    matrix[lines, high] += share
    return matrix


def best_classes(views: Sequence[View]) -> ClassMap:
    """The class map [H, W] of the largest logits of one view, or of the largest mean of several
    views' softmax; uint8, or uint16 of more than 256 classes."""
    height, width = len(views[0].rows), len(views[0].columns)
    classes = len(views[0].logits)
    result = torch.empty(height, width, dtype=torch.int64)
    step = max(1, _BAND // (classes * width))
    for top in range(0, height, step):
        total = torch.zeros(())
        for view in views:
            rows = view.rows[top : top + step]
            used = rows.any(0)  # a band needs few rows of logits: a third of the work
            scores = rows[:, used] @ (view.logits[:, used] @ view.columns.T)
            total = scores if len(views) == 1 else scores.softmax(0) + total.to(scores)
        result[top : top + step] = total.argmax(0).cpu()
    found = result.numpy()
    return found.astype(np.uint8) if classes <= 256 else found.astype(np.uint16)


def _spread(side: int, starts: list[int], window: int, low: int) -> Tensor:
    """The matrix float64 [side, low] from the windows' logits, one after the other along an axis,
    to the mean of the windows that cover a pixel."""
    each = low // len(starts)
    resize = bilinear(each, window)
    matrix = torch.zeros(side, low, dtype=torch.float64)
    for index, start in enumerate(starts):
        matrix[start : start + window, index * each : (index + 1) * each] = resize
    return matrix / matrix.sum(1, keepdim=True)
