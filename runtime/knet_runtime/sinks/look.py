"""How overlays look: what may be asked for, and what draws it for every sink that shows frames."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from fractions import Fraction
from time import monotonic

import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_runtime.drawing import (
    OPACITY,
    LegendGrid,
    legend_classes,
    legend_strip,
    letterbox,
    mark_stale,
    text_scale,
)
from knet_runtime.errors import ConfigError
from knet_runtime.painting import NamePlaces
from knet_runtime.segmentation import Segmentation
from knet_runtime.types import Frame, Rgb, Size

_RECENT = 2  # seconds over which a video's legend takes the mean
_PRESENT = 0.0005  # of an image: less of a class is not in its legend


class Look(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an overlay is drawn; all sinks that show frames take one. Raises ConfigError for an
    ``alpha`` that cannot be.

    ``alpha`` is the colours' opacity (0 … 1). ``legend`` adds a strip below the frame with colours,
    names and shares of the classes that cover at least 1/2000 of it; a video's has the mean of the
    last two seconds. ``names`` writes classes into their large regions. ``side_by_side`` puts the
    frame without colours to the left. ``classes`` names those that are drawn (none: all).

        >>> from knet_deploy import Look, OverlayImage, Segmenter, open_source
        >>> look = Look(legend=True, names=True, classes=("Road", "Car"))
        >>> with open_source("street.png") as source, Segmenter() as segment:
        ...     sink = OverlayImage("overlay.png", look)
        ...     for frame in source:
        ...         sink.write(frame, segment(frame.image))
        ...     sink.close()
    """

    alpha: float = OPACITY
    legend: bool = False
    names: bool = False
    side_by_side: bool = False
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha is {self.alpha}; the overlay's opacity lies between 0 and 1")


class OverlayPainter:
    """Draws frames under their colours.

    ``steady`` drawings are a video's: all have the size of the first one, into which frames of
    another size are letterboxed, names keep their places, and the legend tells of the last two
    seconds. Else each has its frame's size, and names and legend are its own.
    """

    def __init__(self, look: Look, *, steady: bool) -> None:
        self._look = look
        self._steady = steady
        self._hw: Size | None = None
        self._places = NamePlaces()
        self._then: Fraction | None = None
        self._scene = 0
        self._legend = _RecentLegend() if look.legend and steady else None
        self._fresh = monotonic()

    def size(self, hw: Size) -> Size:
        """(height, width) of the drawing of a frame of this size, without the legend."""
        return hw[0], hw[1] * (1 + self._look.side_by_side)

    def paint(self, frame: Frame, result: Segmentation) -> Rgb:
        """The drawing of one frame, uint8 [H, W, 3] RGB. Raises ConfigError for classes that
        ``result`` does not have."""
        look = self._look
        classes = result.labels.indices(look.classes) if look.classes else None
        image = result.overlay(frame.image, look.alpha, classes, names=self._names(frame))
        if self._hw is None or not self._steady:
            self._hw = image.shape[:2]
        image = letterbox(image, self._hw)
        if look.side_by_side:
            image = np.concatenate([letterbox(frame.image, self._hw), image], axis=1)
        if frame.stale:
            image = mark_stale(image, monotonic() - self._fresh)
        else:
            self._fresh = monotonic()
        width, scale = image.shape[1], text_scale(self._hw)
        if self._legend is not None:
            strip = self._legend.strip(frame, result, classes, width, scale)
            image = np.concatenate([image, strip])
        elif look.legend:
            shares = result.shares()
            shown = _present(result, np.array(list(shares.values())), classes)
            strip = legend_strip(result.labels, width, shares, shown, scale)
            image = np.concatenate([image, strip])
        return image

    def _names(self, frame: Frame) -> bool | NamePlaces:
        """Of a video the places of the frame before, where one was just before."""
        if not self._look.names or not self._steady:
            return self._look.names
        if frame.scene != self._scene or not _is_recent(self._then, frame.pts):
            self._places = NamePlaces()
        self._then, self._scene = frame.pts, frame.scene
        return self._places


class _RecentLegend:
    """The legend of a video: the classes of the last two seconds and their mean shares, so that
    nothing flickers; of frames without a time, each one's own. A class keeps its place while it is
    shown, and the strip its size."""

    def __init__(self) -> None:
        self._recent: deque[tuple[Fraction | None, NDArray[np.float64]]] = deque()
        self._places: dict[int, int] = {}
        self._grid: LegendGrid | None = None

    def strip(
        self,
        frame: Frame,
        result: Segmentation,
        classes: Collection[int] | None,
        width: int,
        scale: float,
    ) -> Rgb:
        """uint8 [h, ``width``, 3] RGB, for a frame that comes after those before."""
        labels = result.labels
        shares = self._mean(frame, result)
        by_name = dict(zip(labels.names, shares.tolist(), strict=True))
        possible = range(labels.num_classes) if classes is None else classes
        room = len(legend_classes(labels, by_name, possible))
        shown = legend_classes(labels, by_name, _present(result, shares, classes))
        self._places = {one: place for one, place in self._places.items() if one in shown}
        free = iter(sorted(set(range(room)) - set(self._places.values())))
        self._places |= {one: next(free) for one in shown if one not in self._places}
        if self._grid is None:
            self._grid = LegendGrid(labels, possible, width, scale)
        return self._grid.draw(self._places, room, by_name)

    def _mean(self, frame: Frame, result: Segmentation) -> NDArray[np.float64]:
        recent, now = self._recent, frame.pts
        while recent and not _is_recent(recent[0][0], now):
            recent.popleft()
        if not recent:
            self._places = {}
        if not frame.stale or not recent:
            recent.append((now, np.array(list(result.shares().values()))))
        return np.asarray(np.mean([shares for _, shares in recent], 0), np.float64)


def _is_recent(then: Fraction | None, now: Fraction | None) -> bool:
    return then is not None and now is not None and 0 <= now - then < _RECENT


def _present(
    result: Segmentation, shares: NDArray[np.float64], classes: Collection[int] | None
) -> list[int]:
    """Of ``classes`` (None: all) those that a legend has."""
    possible = range(result.labels.num_classes) if classes is None else classes
    return [index for index in possible if shares[index] >= _PRESENT]
