"""From low-resolution logits to the class map at the frame's own size."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from knet_runtime.preprocess import Geometry

ClassMap = NDArray[np.uint8] | NDArray[np.uint16]


def class_map(logits: NDArray[np.float32], geometry: Geometry, stride: int) -> ClassMap:
    """The class map [H, W] at ``geometry.source_hw`` for the model's logits float32 [N, h, w].

    The window is cut out of the logits (exactly: it lies on multiples of ``stride``) and goes to
    the source's size in one step. Raises ValueError when the logits do not fit the geometry.
    """
    expected = (geometry.model_hw[0] // stride, geometry.model_hw[1] // stride)
    if logits.ndim != 3 or logits.shape[1:] != expected:
        raise ValueError(f"logits are {logits.shape}, expected [N, {expected[0]}, {expected[1]}]")
    top, left, height, width = (side // stride for side in geometry.window)
    window = logits[:, top : top + height, left : left + width]
    return upsampled_argmax(window, geometry.source_hw)


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


def upsampled_argmax(
    logits: NDArray[np.float32], size: tuple[int, int], via: tuple[int, int] | None = None
) -> ClassMap:
    """The class map [H, W] = ``size`` of float32 [N, h, w] logits: uint8, or uint16 when N > 256.

    It is the map that bilinear resizing (half-pixel centres, two taps per axis, no antialiasing:
    PyTorch's ``interpolate(mode="bilinear", align_corners=False)``) and then argmax gives, without
    ever holding N×H×W numbers. It equals the map computed in exact arithmetic wherever the two
    largest logits differ by more than float32 rounding (about 1e-6 of their size). PyTorch rounds
    its coordinates to float32, so at ratios that are no binary fraction about one pixel in a
    million differs from PyTorch's own map. The lowest class wins a tie.

    ``via`` (height, width) is a size that the logits are resized to first, at least their own:
    mmsegmentation goes to the network's input size and from there to the picture's.
    Raises ValueError when they are not float32 [N, h, w] or hold NaN, or when ``size`` is empty.
    """
    if logits.ndim != 3 or logits.dtype != np.float32 or logits.size == 0:
        raise ValueError(f"logits must be float32 [N, h, w], not {logits.dtype} {logits.shape}")
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"a class map of {height}×{width} holds no pixel")
    if via is not None and (via[0] < logits.shape[1] or via[1] < logits.shape[2]):
        raise ValueError(f"logits {logits.shape} can not go through a smaller size, {via}")
    logits = np.ascontiguousarray(logits)
    two_steps = via is not None and via not in (size, logits.shape[1:])
    first, *others = candidates(logits, reach=3 if two_steps else 2).tolist()
    winner: ClassMap = (
        np.full(size, first, np.uint8) if len(logits) <= 256 else np.full(size, first, np.uint16)
    )
    if not others:
        return winner
    # One plane at a time into a running best; ">" keeps the lower class on a tie.
    steps = [np.empty(step, np.float32) for step in ([via, size] if via and two_steps else [size])]
    best = _resize(logits[first], steps).copy()
    fill, better = np.empty_like(winner), np.empty(size, np.uint8)
    for index in others:
        plane = _resize(logits[index], steps)
        cv2.compare(plane, best, cv2.CMP_GT, dst=better)
        cv2.max(best, plane, dst=best)
        fill.fill(index)
        cv2.copyTo(fill, better, dst=winner)
    return winner


def _resize(plane: NDArray[np.float32], steps: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """``plane`` resized into each array of ``steps`` in turn; the last of them."""
    for step in steps:
        size = (step.shape[1], step.shape[0])
        cv2.resize(plane, size, dst=step, interpolation=cv2.INTER_LINEAR)
        plane = step
    return plane


def candidates(logits: NDArray[np.float32], reach: int = 2) -> NDArray[np.intp]:
    """Ascending indices of the classes of float32 [N, h, w] that can win anywhere after resizing.

    A resized pixel is a convex combination of the corners of one 2×2 cell (``reach`` 3, when it is
    resized twice: of one 3×3 block). So a class wins there only if its largest corner reaches the
    largest of all classes' smallest corners; a class that does so in no cell is left out. Never
    empty.
    """
    # Half a megabyte at a time stays in a core's cache: 3× faster at 150 classes.
    step = max(1, 2**17 // logits[0].size)
    chunks = [logits[start : start + step] for start in range(0, len(logits), step)]
    floor = _over_corners(np.minimum, chunks[0], reach).max(0)
    for chunk in chunks[1:]:
        np.maximum(floor, _over_corners(np.minimum, chunk, reach).max(0), out=floor)
    if np.isnan(floor).any():  # the minimum of anything and NaN is NaN: none can hide from this
        raise ValueError("logits hold NaN: the model or its engine is broken")
    reaches = [(_over_corners(np.maximum, chunk, reach) >= floor).any((1, 2)) for chunk in chunks]
    return np.flatnonzero(np.concatenate(reaches))


def _over_corners(pick: np.ufunc, planes: NDArray[np.float32], reach: int) -> NDArray[np.float32]:
    """``pick`` (minimum or maximum) over every ``reach`` × ``reach`` block of [N, h, w]."""
    for _ in range(reach - 1):
        if planes.shape[2] > 1:
            planes = pick(planes[:, :, :-1], planes[:, :, 1:])
        if planes.shape[1] > 1:
            planes = pick(planes[:, :-1], planes[:, 1:])
    return planes
