"""A picture at its own ratio, in windows or at several scales, as mmsegmentation evaluates.

Everything that mmsegmentation does between a window's logits and the picture is linear and acts on
rows and columns apart: resizing to the window's size, the sum over windows and the division by
their counts, resizing to the picture's size, mirroring. So the logits of all windows are laid side
by side [N, h, w], one matrix R [H, h] and one matrix C [W, w] stand for all steps, and the
picture's logits are R L_n Cᵀ. They are computed a band of rows at a time: N×H×W numbers are never
held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knet_runtime.errors import CheckpointError
from knet_runtime.preprocess import keep_ratio
from knet_runtime.types import ClassMap
from knet_train.models.knet import KNet

RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of eval_scale, in multi-scale evaluation
_BAND = 2**24  # numbers of one band of all classes: 64 MiB


class View(NamedTuple):
    """The logits of one look at a picture, and how they are spread over its pixels."""

    logits: Tensor  # float32 [N, h, w]
    rows: Tensor  # float32 [H, h], each row sums to 1
    columns: Tensor  # float32 [W, w], likewise


@torch.no_grad()
def logits(model: KNet, pixels: Tensor) -> Tensor:
    """The last stage's logits float32 [N, H/s, W/s] (rounded up) of RGB pixels [H, W, 3] on the
    model's device. Raises CheckpointError when they hold NaN or infinity."""
    found: Tensor = model(pixels[None])[0].float()
    if not found.isfinite().all():
        raise CheckpointError(
            "the network gives NaN or infinity, so its weights are broken: "
            "use an earlier checkpoint, or train with a lower optim.lr"
        )
    return found


@torch.no_grad()
def look(
    model: KNet,
    image: NDArray[np.uint8],
    scale: tuple[int, int],
    crop: tuple[int, int] | None = None,
    *,
    mirrored: bool = False,
) -> View:
    """See uint8 [H, W, 3] RGB at ``keep_ratio_size(.., scale)``, whole, or in windows of ``crop``
    (height, width) whose overlapping logits are averaged (mmsegmentation's ``slide_inference``).

    The windows' stride is 2/3 of the crop, rounded down (341 for 512); the last one is moved back
    inside the picture, and along a side shorter than the crop there is one.
    """
    scaled = keep_ratio(image, scale)
    if mirrored:
        scaled = scaled[:, ::-1]
    pixels = torch.from_numpy(np.ascontiguousarray(scaled)).to(model.mean.device)
    starts, window = [], []
    for side, length in zip(scaled.shape[:2], crop or scaled.shape[:2], strict=True):
        window.append(min(side, length))
        starts.append(window_starts(side, length))
    lines = [
        torch.cat([logits(model, pixels[y:, x:][: window[0], : window[1]]) for x in starts[1]], 2)
        for y in starts[0]
    ]
    mosaic = torch.cat(lines, 1)
    rows, columns = (
        _spread(scaled.shape[axis], starts[axis], window[axis], mosaic.shape[1 + axis])
        for axis in (0, 1)
    )
    rows = bilinear(scaled.shape[0], image.shape[0]) @ rows
    columns = bilinear(scaled.shape[1], image.shape[1]) @ columns
    if mirrored:
        columns = columns.flip(0)
    return View(mosaic, rows.to(mosaic), columns.to(mosaic))


def window_starts(side: int, crop: int) -> list[int]:
    """Where the windows of ``crop`` begin along a side of the picture."""
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


@torch.no_grad()
def class_map(views: Sequence[View]) -> ClassMap:
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
