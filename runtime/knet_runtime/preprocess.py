"""Fit an image of any size to the model's input, and remember the way back.

Training evaluation, export verification and the device all call ``fit_to_input``: the network sees
the very same pixels in the three of them. Nothing is normalised here; mean and standard deviation
are part of the graph.
"""

from __future__ import annotations

from typing import Any

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_runtime.bundle.manifest import InputSpec
from knet_runtime.errors import SourceError

PAD_GREY = 114  # the usual letterbox grey: near the mean of natural images in each channel


class Geometry(msgspec.Struct, frozen=True):
    """How an image was laid into the model's input.

    ``source_hw`` and ``model_hw`` are (height, width) in pixels. ``window`` is (top, left, height,
    width): where the whole source lies in the model's input, in model pixels. All four are
    multiples of ``InputSpec.multiple``, so the low-resolution logits can be cropped exactly.
    """

    source_hw: tuple[int, int]
    model_hw: tuple[int, int]
    window: tuple[int, int, int, int]


def fit_to_input(image: NDArray[np.uint8], spec: InputSpec) -> tuple[NDArray[np.uint8], Geometry]:
    """Fit a uint8 [H, W, 3] RGB image to uint8 [spec.height, spec.width, 3], C-contiguous.

    An image that already has the right size is returned as it is (not copied). "letterbox" keeps
    the aspect ratio up to the snapping of the window to ``spec.multiple`` pixels.
    Raises SourceError when the image has another type or shape.
    """
    check_image(image)
    model_hw = spec.size
    source_hw = image.shape[:2]
    match spec.resize:
        case "stretch":
            geometry = Geometry(source_hw, model_hw, (0, 0, *model_hw))
            return resize(image, model_hw), geometry
        case "letterbox":
            top, left, height, width = window = _letterbox(source_hw, model_hw, spec.multiple)
            fitted = resize(image, (height, width))
            if (height, width) != model_hw:
                padded = np.full((*model_hw, 3), PAD_GREY, np.uint8)
                padded[top : top + height, left : left + width] = fitted
                fitted = padded
            return fitted, Geometry(source_hw, model_hw, window)


def check_image(image: Any) -> None:
    """Raise SourceError, with what to do, unless ``image`` is uint8 [H, W, 3] and not empty."""
    if not isinstance(image, np.ndarray):
        raise SourceError(
            f"a frame must be a NumPy array, not {type(image).__name__}: pass np.asarray(frame)"
        )
    shape = "×".join(map(str, image.shape))
    match image.shape:
        case (_, _, 3):
            problem = None
        case (_, _) | (_, _, 1):
            problem = f"is grey ({shape}): convert it with cv2.cvtColor(frame, cv2.COLOR_GRAY2RGB)"
        case (_, _, 4):
            problem = f"has an alpha channel ({shape}): pass frame[..., :3]"
        case (3, _, _):
            problem = f"looks like 3×H×W ({shape}): pass frame.transpose(1, 2, 0)"
        case _:
            problem = f"is {shape}: pass one frame at a time"
    if problem is not None:
        raise SourceError(f"a frame must be H×W×3 RGB, this one {problem}")
    if image.dtype != np.uint8:
        raise SourceError(
            f"a frame must be uint8 of 0 … 255, this one is {image.dtype}: "
            "scale it to 0 … 255 and pass frame.astype(np.uint8)"
        )
    if image.size == 0:
        raise SourceError(f"a frame must hold at least one pixel, this one is {shape}: skip it")


def resize(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize uint8 [H, W, 3] to ``size`` (height, width), C-contiguous.

    Linear up to a shrink of 2: its two taps per axis still read every source pixel. Beyond that
    they would skip pixels, and thin things (poles) would come and go from frame to frame, so what
    shrinks more is averaged by area. An axis that grows is always linear.
    """
    height, width = image.shape[:2]
    image = np.ascontiguousarray(image)
    if (height, width) == size:
        return image
    if max(height / size[0], width / size[1]) > 2:
        # OpenCV averages only if neither axis grows; one that does waits for the second step.
        shrunk = (min(height, size[0]), min(width, size[1]))
        image = _cv_resize(image, shrunk, cv2.INTER_AREA)
        if shrunk == size:
            return image
    return _cv_resize(image, size, cv2.INTER_LINEAR)


def keep_ratio(image: NDArray[np.uint8], scale: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize uint8 [H, W, 3] to ``keep_ratio_size``, C-contiguous: as mmsegmentation evaluates
    (``mmcv.imrescale``), always linear, also where that skips pixels."""
    check_image(image)
    image = np.ascontiguousarray(image)
    size = keep_ratio_size(image.shape[:2], scale)
    return image if image.shape[:2] == size else _cv_resize(image, size, cv2.INTER_LINEAR)


def keep_ratio_size(source_hw: tuple[int, int], scale: tuple[int, int]) -> tuple[int, int]:
    """The largest (height, width) of the source's ratio whose longest side is at most ``scale[0]``
    and whose shortest side at most ``scale[1]``, rounded as mmcv's ``rescale_size`` does."""
    factor = min(scale[0] / max(source_hw), scale[1] / min(source_hw))
    height, width = (max(1, int(side * factor + 0.5)) for side in source_hw)
    return height, width


def _cv_resize(image: NDArray[np.uint8], size: tuple[int, int], method: int) -> NDArray[np.uint8]:
    resized = cv2.resize(image, (size[1], size[0]), interpolation=method)
    return np.asarray(resized, np.uint8)


def _letterbox(
    source_hw: tuple[int, int], model_hw: tuple[int, int], step: int
) -> tuple[int, int, int, int]:
    """The centred window (top, left, height, width), every number a multiple of ``step``.

    The side that limits the scale fills the model's input; the other is rounded to the nearest
    multiple of ``step`` and is never empty.
    """
    scale = min(model_hw[0] / source_hw[0], model_hw[1] / source_hw[1])
    starts, sides = [], []
    for source, model in zip(source_hw, model_hw, strict=True):
        side = min(max(step * round(source * scale / step), step), model)
        starts.append(step * ((model - side) // (2 * step)))
        sides.append(side)
    return starts[0], starts[1], sides[0], sides[1]
