"""A semantic network's output to the class map at the frame's own size."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from knet_runtime.postprocess.upsample import upsampled_argmax
from knet_runtime.preprocess import Geometry
from knet_runtime.types import ClassMap


def class_map(logits: NDArray[np.float32], geometry: Geometry) -> ClassMap:
    """The class map [H, W] at ``geometry.source_hw`` for the model's logits float32 [N, h, w], from
    which the window goes to the source's size in one step. Raises ValueError as ``cut_window``."""
    return upsampled_argmax(cut_window(logits, geometry), geometry.source_hw)


def cut_window(logits: NDArray[np.float32], geometry: Geometry) -> NDArray[np.float32]:
    """The part of float32 [N, h, w] logits that the image fills, a view. It is exact: the window
    lies on multiples of the logits' stride. Raises ValueError for logits that have no whole stride
    in ``geometry.model_hw``, or another one than the window lies on."""
    stride = geometry.model_hw[0] // logits.shape[1] if logits.ndim == 3 and logits.size else 0
    fits = stride and tuple(stride * side for side in logits.shape[1:]) == geometry.model_hw
    if not fits or any(side % stride for side in geometry.window):
        raise ValueError(
            f"logits {logits.shape} do not fit an input of {geometry.model_hw} with the image at "
            f"{geometry.window}"
        )
    top, left, height, width = (side // stride for side in geometry.window)
    return logits[:, top : top + height, left : left + width]


def restore_class_map(classes: NDArray[np.uint8], geometry: Geometry) -> NDArray[np.uint8]:
    """The class map [H, W] at ``geometry.source_hw`` for a graph's own class map uint8 [h, w] at
    the model's size: the window is cut out, and every pixel takes its nearest one's class.

    Raises ValueError when the map does not fit the geometry.
    """
    if classes.shape != geometry.model_hw:
        raise ValueError(f"the class map is {classes.shape}, expected {geometry.model_hw}")
    top, left, height, width = geometry.window
    window = np.ascontiguousarray(classes[top : top + height, left : left + width])
    if window.shape == geometry.source_hw:
        return window
    size = (geometry.source_hw[1], geometry.source_hw[0])
    resized = cv2.resize(window, size, interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(resized, np.uint8)
