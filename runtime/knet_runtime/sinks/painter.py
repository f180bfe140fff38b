"""How the overlay sinks draw a frame: colours, legend, mark of a stale one, one size for all."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic

import numpy as np

from knet_runtime.drawing import legend_strip, letterbox, mark_stale
from knet_runtime.errors import ConfigError
from knet_runtime.labels import LabelMap
from knet_runtime.segmentation import Segmentation
from knet_runtime.types import Frame, Rgb, Size


class OverlayPainter:
    """Draws frames under their colours, all at the size of the first one.

    ``alpha`` is the colours' opacity (0 … 1); ``legend`` adds a strip of class names and shares
    below the image; ``classes`` are the names of those that are drawn and listed, all when there
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
        self._hw: Size | None = None
        self._fresh = monotonic()

    def paint(self, frame: Frame, result: Segmentation) -> Rgb:
        """The drawing of one frame, uint8 [H, W, 3] RGB. Raises ConfigError for classes that
        ``result`` does not have."""
        if self._labels is not result.labels:
            self._labels = result.labels
            self._classes = result.labels.indices(self._names) if self._names else None
        image = result.overlay(frame.image, self._alpha, self._classes)
        if self._hw is None:
            self._hw = (image.shape[0], image.shape[1])
        image = letterbox(image, self._hw)
        if frame.stale:
            image = mark_stale(image, monotonic() - self._fresh)
        else:
            self._fresh = monotonic()
        if self._legend:
            strip = legend_strip(result.labels, self._hw[1], result.shares(), self._classes)
            image = np.concatenate([image, strip])
        return image
