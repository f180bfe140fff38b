"""Privacy: pixels of chosen classes are taken out of the images before anything shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from knet_runtime.drawing import select
from knet_runtime.labels import LabelMap
from knet_runtime.segmentation import Segmentation
from knet_runtime.sinks import Sink
from knet_runtime.types import Frame, Rgb

_CELL = 8  # pixels of an image that become one of the small image that is blurred
# Widths (in cells) and weights of the blurs that are added up: each fills what the narrower leaves.
_BLURS = ((2.0, 1.0), (8.0, 1e-3), (32.0, 1e-6))


def conceal(image: Rgb, hidden: NDArray[np.uint8]) -> Rgb:
    """Fill what is ``hidden`` with a blur of what is around it; a new array.

    ``image`` is uint8 [H, W, 3] RGB, ``hidden`` uint8 [H, W] of 255 and 0. It is widened by
    ``margin`` first, because a class map's edges are rough. No hidden pixel's value has any part in
    the result, so nothing of it can be brought back; only the region's outline shows. Grey if all
    is hidden.
    """
    reach = margin(*image.shape[:2])
    box = np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)
    hidden = np.asarray(cv2.dilate(hidden, box), np.uint8)
    seen = np.asarray(cv2.bitwise_not(hidden), np.uint8)  # 255 where it may be looked at
    small = (-(-image.shape[1] // _CELL), -(-image.shape[0] // _CELL))
    visible = np.zeros_like(image)
    cv2.copyTo(image, seen, visible)
    colours = cv2.resize(visible, small, interpolation=cv2.INTER_AREA).astype(np.float32)
    weights = cv2.resize(seen, small, interpolation=cv2.INTER_AREA).astype(np.float32)
    weights *= np.float32(1 / 255)
    total = np.zeros_like(colours)
    share = np.full_like(weights, 1e-12)
    for width, part in _BLURS:
        total += part * _blur(colours, width)
        share += part * _blur(weights, width)
    total += 1e-12 * 128
    fill = np.clip(total / share[..., None], 0, 255).astype(np.uint8)
    result = np.asarray(cv2.resize(fill, (image.shape[1], image.shape[0])), np.uint8)
    cv2.copyTo(image, seen, result)
    return result


def margin(height: int, width: int) -> int:
    """By how many pixels a hidden region is widened: 1/40 of the shorter side, at least 6."""
    return max(6, min(height, width) // 40)


class Concealer:
    """Hides ``classes`` of ``labels``, by name, in frames; of no use for what the model misses.

    Of an instance result each object is hidden whole, also where another one's mask lies above.
    Raises ConfigError for a name that is no class.

        >>> from knet_deploy import Concealer, Segmenter, open_source
        >>> with open_source("street.png") as source, Segmenter() as segment:
        ...     frame = next(iter(source))
        ...     hide = Concealer(segment.labels, ["Road"])
        ...     hidden = hide(frame, segment(frame.image))
        >>> bool((hidden.image != frame.image).any())
        True
    """

    def __init__(self, labels: LabelMap, classes: Sequence[str]) -> None:
        self._table = np.zeros(max(256, labels.num_classes + 1), np.uint8)
        self._table[list(labels.indices(classes))] = 255
        self._last: tuple[Frame, Segmentation, Frame] | None = None

    def __call__(self, frame: Frame, result: Segmentation) -> Frame:
        """The frame with an image in which the classes of ``result`` are hidden."""
        last = self._last
        if last is not None and last[0] is frame and last[1] is result:
            return last[2]
        hidden = self._hidden(result)
        clean = replace(frame, image=conceal(frame.image, hidden)) if hidden.any() else frame
        self._last = (frame, result, clean)
        return clean

    def _hidden(self, result: Segmentation) -> NDArray[np.uint8]:
        if result.task != "instance":
            return select(result.class_map, self._table)
        hidden = np.zeros(result.size, np.uint8)
        for segment, mask in result.masks():
            if self._table[segment.class_id]:
                left, top, right, bottom = segment.box
                hidden[top:bottom, left:right][mask] = 255
        return hidden


class Concealed:
    """A sink that sees frames only after ``concealer`` has hidden what is private in them.

    One concealer may serve several sinks of one feed: the work is done once per frame.

        >>> from knet_deploy import Concealed, Concealer, OverlayImage, Segmenter, open_source
        >>> with open_source("street.png") as source, Segmenter() as segment:
        ...     hide = Concealer(segment.labels, ["Pedestrian", "Car"])
        ...     sink = Concealed(OverlayImage("private.png"), hide)
        ...     for frame in source:
        ...         sink.write(frame, segment(frame.image))
        ...     sink.close()
    """

    def __init__(self, sink: Sink, concealer: Concealer) -> None:
        self._sink = sink
        self.name = sink.name
        self._concealer = concealer

    @property
    def path(self) -> Path | None:
        """The sink's."""
        return self._sink.path

    def write(self, frame: Frame, result: Segmentation) -> None:
        """Hand the frame on. Raises what the sink raises."""
        clean = self._concealer(frame, result)
        if result.image is not None:  # in which nothing is hidden
            result = replace(result, image=clean.image)
        self._sink.write(clean, result)

    def close(self, *, complete: bool = True) -> None:
        """Close the sink."""
        self._sink.close(complete=complete)


def _blur(image: NDArray[np.float32], width: float) -> NDArray[np.float32]:
    blurred = cv2.GaussianBlur(image, (0, 0), width, borderType=cv2.BORDER_CONSTANT)
    return np.asarray(blurred, np.float32)
