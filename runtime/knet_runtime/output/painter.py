"""How the overlay sinks draw a frame: colours, legend, mark of a stale one, one size for all."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING

import cv2
import numpy as np

from knet_runtime.errors import ConfigError
from knet_runtime.frames import Frame
from knet_runtime.labels import LabelMap
from knet_runtime.overlay import Rgb, blend, legend_strip, mark_stale

if TYPE_CHECKING:
    from knet_runtime.segmenter import Mask


class Painter:
    """Draws frames under their colours, all at the size of the first one.

    ``alpha`` is the colours' opacity (0 … 1); ``legend`` adds a strip of class names and shares
    below the picture; ``classes`` are the names of those that are drawn and listed, all when there
    are none. Frames of another size than the first are letterboxed into it. Raises ConfigError for
    a wrong alpha.
    """

    def __init__(
        self, *, alpha: float = 0.5, legend: bool = False, classes: Sequence[str] = ()
    ) -> None:
        if not 0 <= alpha <= 1:
            raise ConfigError(f"alpha is {alpha}; the overlay's opacity lies between 0 and 1")
        self._alpha = alpha
        self._legend = legend
        self._names = tuple(classes)
        self._labels: LabelMap | None = None
        self._classes: tuple[int, ...] | None = None
        self._hw: tuple[int, int] | None = None
        self._fresh = monotonic()

    def paint(self, frame: Frame, mask: Mask) -> Rgb:
        """The picture of one frame, uint8 [H, W, 3] RGB; ConfigError for classes that ``mask`` does
        not have."""
        if self._labels is not mask.labels:
            self._labels = mask.labels
            self._classes = mask.labels.indices(self._names) if self._names else None
        picture = blend(frame.image, mask.class_map, mask.labels, self._alpha, self._classes)
        if self._hw is None:
            self._hw = (picture.shape[0], picture.shape[1])
        picture = letterbox(picture, self._hw)
        if frame.stale:
            picture = mark_stale(picture, monotonic() - self._fresh)
        else:
            self._fresh = monotonic()
        if self._legend:
            strip = legend_strip(mask.labels, self._hw[1], mask.shares(), self._classes)
            picture = np.concatenate([picture, strip])
        return picture


def letterbox(picture: Rgb, hw: tuple[int, int]) -> Rgb:
    """Scale uint8 [h, w, 3] to fit (height, width), centred on black; the same array if it fits."""
    height, width = picture.shape[:2]
    if (height, width) == hw:
        return picture
    scale = min(hw[0] / height, hw[1] / width)
    inner = max(1, min(hw[0], round(height * scale))), max(1, min(hw[1], round(width * scale)))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    canvas = np.zeros((*hw, 3), np.uint8)
    top, left = (hw[0] - inner[0]) // 2, (hw[1] - inner[1]) // 2
    canvas[top : top + inner[0], left : left + inner[1]] = cv2.resize(
        picture, (inner[1], inner[0]), interpolation=method
    )
    return canvas
