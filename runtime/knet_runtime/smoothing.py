"""Less flicker: results that follow the frame's motion and change their mind less often."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from knet_runtime.errors import ConfigError
from knet_runtime.segmentation import Instance, Segment, Segmentation
from knet_runtime.types import ClassMap, Frame, Rgb

MAX_STRENGTH = 16

_FLOW_PIXELS = 480 * 360  # motion is found at about this size: finer costs more than it brings
_TOLERANCE = 12  # grey levels by which a pixel may differ from where it came from
_CUT = 0.5  # share of pixels that came from nowhere, above which it is another scene
_LEAST_SIDE = 16  # smaller frames give it nothing to work on

Flow = NDArray[np.float32]
_Plane = TypeVar("_Plane", bound=NDArray[Any])
_VALUES = 65536  # of a map of segments
_OUTSIDE = 255  # a confidence that no pixel has: it says that a pixel comes from outside


class Smoother:
    """Smooths the results of one source; call it with each frame and its result, in order.

    The last result moves along with the frame (dense optical flow). Where the new one agrees,
    a pixel's class gains confidence, up to ``strength``; where it differs, it loses some, and only
    a class without confidence is replaced. So a class that has stood for ``strength`` frames is
    replaced when the new one has been seen in ``strength`` + 1. Pixels whose look does not fit
    where they came from (uncovered, or lit anew) take the new map at once, and so does everything
    after a cut, in another scene or after a change of size. A stale frame gets the last result
    again. The same frames give the same results.

    Of instance and panoptic results each object counts as a class of its own, so they need a
    ``Tracker`` before: one that is not found in a frame stays for that long, with its last score,
    while at least half of it does. Objects of an instance result overlap no more: each pixel is of
    the better one.

    Raises ConfigError for a strength outside 1 … 16.

        >>> from knet_deploy import Segmenter, Smoother, open_source
        >>> smooth = Smoother(strength=2)
        >>> with open_source("drive.mp4") as source, Segmenter() as segment:
        ...     steady = [smooth(frame, segment(frame.image)) for frame in source]
        >>> len(steady)
        8
    """

    def __init__(self, strength: int) -> None:
        if not 1 <= strength <= MAX_STRENGTH:
            raise ConfigError(f"smooth is {strength}; give frames, from 1 to {MAX_STRENGTH}")
        self._strength = strength
        self._flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
        self._grid: Flow = np.empty((0, 0, 2), np.float32)
        self._grey: NDArray[np.uint8] | None = None
        self._classes: ClassMap | None = None
        self._confidence: NDArray[np.uint8] = np.empty((0, 0), np.uint8)
        self._scene = 0
        self._shown: dict[int, Segment] = {}  # what the values of a map of segments mean

    def __call__(self, frame: Frame, result: Segmentation) -> Segmentation:
        """The smoothed result; ``result`` itself is not changed. Raises ConfigError for objects
        without tracks."""
        semantic = result.task == "semantic"
        known = {} if semantic else _identities(result)
        new = result.class_map if semantic else _identity_map(result, known)
        same_size = self._classes is not None and self._classes.shape == new.shape
        goes_on = same_size and frame.scene == self._scene
        self._scene = frame.scene
        if not (frame.stale and goes_on):
            self._advance(frame.image, new, goes_on)
            self._shown = {**self._shown, **known}
            if not semantic:
                self._drop_remains(new, known)
        assert self._classes is not None
        if semantic:
            return replace(result, class_map=self._classes)
        smoothed = _described(result, self._classes, self._shown)
        return replace(smoothed, uncertainty=result.uncertainty, image=result.image)

    def _drop_remains(self, new: ClassMap, known: Mapping[int, Segment]) -> None:
        """Let go what the frame itself does not have and little is left of."""
        assert self._classes is not None
        left = np.bincount(self._classes.ravel(), minlength=_VALUES)
        for value in self._shown.keys() - known.keys():
            if 2 * left[value] < self._shown[value].area:
                gone = self._classes == value
                self._classes = np.where(gone, new, self._classes)
                self._confidence[gone] = 0
        left = np.bincount(self._classes.ravel(), minlength=_VALUES)
        self._shown = {value: one for value, one in self._shown.items() if left[value]}

    def _advance(self, image: Rgb, new: ClassMap, goes_on: bool) -> None:
        grey = _small(image)
        before, self._grey = self._grey, grey
        moved = None
        if goes_on and before is not None and min(grey.shape) >= _LEAST_SIDE:
            moved = self._move(before, grey, new.shape)
        if moved is None:
            self._classes, self._confidence = new, np.zeros(new.shape, np.uint8)
            return
        classes, confidence, fresh = moved
        differs = classes != new
        taken = differs & (fresh | (confidence == 0))
        # Up by one where they agree, down by one where the old class stays all the same.
        confidence += (~differs).astype(np.uint8)
        confidence -= (differs & ~taken).astype(np.uint8)
        np.minimum(confidence, np.uint8(self._strength), out=confidence)
        confidence[taken] = 0
        self._classes = np.where(taken, new, classes)
        self._confidence = confidence

    def _move(
        self, before: NDArray[np.uint8], grey: NDArray[np.uint8], shape: tuple[int, ...]
    ) -> tuple[ClassMap, NDArray[np.uint8], NDArray[np.bool_]] | None:
        """Last classes and confidences where they are now, and where the frame does not fit them;
        None after a cut."""
        assert self._classes is not None
        height, width = shape
        if self._grid.shape[:2] != (height, width):
            self._grid = _grid(height, width)
        low = grey.shape
        flow = np.asarray(self._flow.calc(grey, before, np.zeros((*low, 2), np.float32)))
        came = _pull(before, flow + _grid(*low), cv2.INTER_LINEAR, cv2.BORDER_REPLICATE)
        misfit = np.asarray(cv2.blur(cv2.absdiff(came, grey), (3, 3)) > _TOLERANCE)
        if misfit.mean() > _CUT:
            return None
        source: Flow = np.asarray(cv2.resize(flow, (width, height)), np.float32)
        source *= np.array((width / low[1], height / low[0]), np.float32)
        source += self._grid
        classes = _pull(self._classes, source, cv2.INTER_NEAREST, cv2.BORDER_CONSTANT)
        confidence = _pull(self._confidence, source, cv2.INTER_NEAREST, cv2.BORDER_CONSTANT)
        fresh = cv2.resize(misfit.view(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
        outside = confidence == _OUTSIDE
        confidence[outside] = 0
        return classes, confidence, np.asarray(fresh, np.bool_) | outside


def _identities(result: Segmentation) -> dict[int, Segment]:
    """Each segment by a value of its own that lasts: class index + 1 of stuff, and above these the
    track of a thing. Raises ConfigError for a thing without one."""
    first = result.labels.num_classes + 1
    known = {}
    for segment in result.segments:
        value = segment.class_id + 1
        if segment.is_thing:
            if segment.track is None:
                raise ConfigError("smoothing needs tracks: let a Tracker see each result first")
            value = first + (segment.track - 1) % (_VALUES - first)
        known[value] = segment
    return known


def _identity_map(result: Segmentation, known: Mapping[int, Segment]) -> ClassMap:
    """The values of ``_identities`` as uint16 [H, W], 0 where no segment is."""
    table = np.zeros(1 + max((one.id for one in known.values()), default=0), np.uint16)
    for value, segment in known.items():
        table[segment.id] = value
    return table[result.segment_map]


def _described(
    result: Segmentation, values: ClassMap, shown: Mapping[int, Segment]
) -> Segmentation:
    """``result`` with the segments of a map of values."""
    if result.task == "panoptic":
        table = np.zeros(_VALUES, np.uint16)
        table[list(shown)] = np.arange(1, len(shown) + 1)
        return Segmentation.from_panoptic(
            table[values],
            [one.class_id for one in shown.values()],
            [one.score or 0.0 for one in shown.values()],
            result.labels,
            result.timings,
            [one.track for one in shown.values()],
        )
    objects = []
    for value, one in shown.items():
        mask = values == value
        left, top, width, height = cv2.boundingRect(mask.view(np.uint8))
        own = mask[top : top + height, left : left + width].copy()
        objects.append(Instance(one.class_id, one.score or 0.0, left, top, own, one.track))
    return Segmentation.from_instances(objects, result.size, result.labels, result.timings)


def _pull(plane: _Plane, source: Flow, method: int, border: int) -> _Plane:
    """``plane`` at the places (x, y) in ``source``; what comes from outside is 255."""
    remap: Callable[..., Any] = cv2.remap  # its type hints know no single map of two channels
    pulled = remap(plane, source, None, method, borderMode=border, borderValue=_OUTSIDE)
    return cast(_Plane, pulled)


def _small(image: Rgb) -> NDArray[np.uint8]:
    """The frame in grey, at about ``_FLOW_PIXELS``."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    scale = (_FLOW_PIXELS / grey.size) ** 0.5
    if scale < 1:
        size = max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale))
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    return np.asarray(grey, np.uint8)


def _grid(height: int, width: int) -> Flow:
    """Each pixel's own (x, y) as float32 [H, W, 2]."""
    rows, columns = np.indices((height, width), np.float32)
    return np.stack([columns, rows], axis=-1)
