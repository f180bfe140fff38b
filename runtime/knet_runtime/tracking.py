"""Ids that last: the objects of a video, followed from frame to frame."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import hypot, sqrt

import numpy as np
from numpy.typing import NDArray

from knet_runtime.errors import ConfigError
from knet_runtime.segmentation import Box, Segment, Segmentation
from knet_runtime.types import Frame, Size

PATIENCE = 15
"""Frames for which an object may be out of sight before its track ends."""

_LEAST = 0.2  # fit below which a segment is not an object's
_WITHIN = 0.3  # what the share of one mask that lies in the other counts, against their IoU
_PART, _WHOLE = 0.2, 0.5  # what the share inside the expected box counts, and the IoU with it
_INSIDE = 0.5  # least share inside it
_SLACK = 0.15  # of a side, by which the expected box is wider
_UNSURE = 0.1  # how much more slack for each frame out of sight
_REACH = 1.5  # side lengths that an object may be from where it is expected, if nothing fits
_LARGER = 4.0  # times that its area may have grown or shrunk then
_STEADY = 0.1  # change of a side's length up to which nothing hides an end of it
_FADE = 0.03  # of a side that each end may come in by in a frame, if more than that is hidden
_NEWEST = 0.3  # weight of the newest step in a track's velocity

_Mask = NDArray[np.bool_]
_Span = tuple[float, float]
_Whole = tuple[float, float, float, float]


@dataclass
class _Track:
    """An object as it was ``missed`` frames ago: ``seen`` and ``mask`` are what showed of it,
    ``whole`` is the box of all of it, hidden parts too; ``step`` its (x, y) per frame."""

    id: int
    class_id: int
    seen: Box
    mask: _Mask
    area: int
    whole: _Whole
    step: tuple[float, float] | None = None
    missed: int = 0

    @property
    def way(self) -> tuple[float, float]:
        """How far it has moved in the frame that comes next, at constant velocity."""
        x, y = self.step or (0.0, 0.0)
        return x * (self.missed + 1), y * (self.missed + 1)

    def expected(self) -> _Whole:
        """The box of all of it in the frame that comes next; it may leave the image."""
        (x, y), (left, top, right, bottom) = self.way, self.whole
        return left + x, top + y, right + x, bottom + y

    def follow(self, segment: Segment, mask: _Mask, size: Size) -> None:
        """It is this segment now, in an image of this size."""
        old, new = self.expected(), segment.box
        spans, steps = [], []
        for axis, length in ((0, size[1]), (1, size[0])):
            was, now = (old[axis], old[axis + 2]), (new[axis], new[axis + 2])
            span, moved = _moved(was, now, length)
            spans.append(span)
            weight, known = (1.0, 0.0) if self.step is None else (_NEWEST, self.step[axis])
            steps.append(known + weight * moved / (self.missed + 1))
        (left, right), (top, bottom) = spans
        self.whole, self.step = (left, top, right, bottom), (steps[0], steps[1])
        self.seen, self.mask, self.area, self.missed = segment.box, mask, segment.area, 0


class Tracker:
    """Gives the things of one source's frames tracks; call it with each frame and its result, in
    order.

    A track moves on at constant velocity. Of what is hidden of an object it keeps the box: neither
    what comes before an object nor the image's border makes it smaller or passes for a movement. A
    segment fits a track of its class as far as it overlaps with what showed of the track last (IoU
    of the masks), or lies in the box in which all of it is expected. Each segment goes to one
    track, the best fits first. What is left goes to the nearest track within one and a half times
    its own size, if it is not more than four times as large or small; or it begins a new one. A
    track that finds no segment is kept for ``patience`` frames, unless it has left the image. Ids
    count from 1 and are never given again. A stale frame gets the last result again; in another
    scene, and after a change of size, all tracks are new.

    Raises ConfigError for a negative patience.

        >>> import numpy as np
        >>> from knet_deploy import Instance, LabelMap, Segmentation, Tracker, open_source
        >>> labels = LabelMap(("car",), ((0, 0, 142),), ignore_index=255, things=(0,))
        >>> track = Tracker()
        >>> with open_source("drive.mp4") as source:
        ...     for frame in source:
        ...         mask = np.ones((40, 60), np.bool_)
        ...         car = Instance(0, 0.9, left=100 + 5 * frame.index, top=200, mask=mask)
        ...         result = track(frame, Segmentation.from_instances([car], (360, 480), labels))
        >>> result.segments[0].box[0], result.segments[0].track
        (135, 1)
    """

    def __init__(self, patience: int = PATIENCE) -> None:
        if patience < 0:
            raise ConfigError(f"a track's patience is {patience} frames; give 0 or more")
        self._patience = patience
        self._tracks: list[_Track] = []
        self._given = 0
        self._scene = 0
        self._last: Segmentation | None = None

    def __call__(self, frame: Frame, result: Segmentation) -> Segmentation:
        """The result with tracks; ``result`` itself is not changed. Raises ConfigError for a
        semantic result."""
        if result.task == "semantic":
            raise ConfigError(
                "tracking follows objects, and this is a result of semantic segmentation: leave "
                "--track out"
            )
        last = self._last
        resized = last is not None and last.size != result.size
        if resized or frame.scene != self._scene:
            self._tracks, last, self._scene = [], None, frame.scene
        if last is None or not frame.stale:
            self._last = last = result.with_tracks(self._advance(result))
        return last

    def _advance(self, result: Segmentation) -> dict[int, int]:
        """The track of each thing, by segment."""
        found = [(segment, mask) for segment, mask in result.masks() if segment.is_thing]
        old, new = set(range(len(self._tracks))), set(range(len(found)))
        ids = {}
        for pairs in (_fitting, _near):
            fits = pairs(self._tracks, old, found, new, result.size)
            scored = sorted(fits, key=lambda pair: -pair[0])
            for _, track, place in scored:
                if track in old and place in new:
                    old.remove(track)
                    new.remove(place)
                    self._tracks[track].follow(*found[place], result.size)
                    ids[found[place][0].id] = self._tracks[track].id
        for track in old:
            self._tracks[track].missed += 1
        self._tracks = [track for track in self._tracks if self._is_kept(track, result.size)]
        for place in sorted(new):
            segment, mask = found[place]
            self._given += 1
            ids[segment.id] = self._given
            about = segment.class_id, segment.box, mask, segment.area, segment.box
            self._tracks.append(_Track(self._given, *about))
        return ids

    def _is_kept(self, track: _Track, size: Size) -> bool:
        left, top, right, bottom = track.expected()
        inside = right > 0 and bottom > 0 and left < size[1] and top < size[0]
        return not track.missed or (inside and track.missed <= self._patience)


_Found = list[tuple[Segment, _Mask]]
_Pairs = Iterator[tuple[float, int, int]]


def _moved(was: _Span, now: _Span, length: int) -> tuple[_Span, float]:
    """Along one axis of an image of this length: where the whole object is that was expected at
    ``was`` and shows at ``now``, and how far it has moved from where it was expected.

    What covers an end of it, or no longer does, is not to pass for a movement: the smallest one
    that explains what shows is taken, and that of the other end where one is at the border."""
    low, high = now[0] - was[0], now[1] - was[1]
    if now[0] <= 0 and now[1] >= length:
        return (min(was[0], now[0]), max(was[1], now[1])), 0.0
    if now[0] <= 0:
        return (min(now[0], was[0] + high), now[1]), high
    if now[1] >= length:
        return (now[0], max(now[1], was[1] + low)), low
    moved = min(max(0.0, min(low, high)), max(low, high))
    start, end = was[0] + moved, was[1] + moved
    if low - high > max(1.0, _STEADY * (end - start)):
        nearer, farther = start + _FADE * (end - start), end - _FADE * (end - start)
    else:
        nearer, farther = (start + now[0]) / 2, (end + now[1]) / 2
    return (min(nearer, now[0]), max(farther, now[1])), moved


def _fitting(
    tracks: list[_Track], old: set[int], found: _Found, new: set[int], size: Size
) -> _Pairs:
    """Fit, track and place of those that fit well enough."""
    for index in old:
        expected = tracks[index].expected()
        for place in new:
            if tracks[index].class_id == found[place][0].class_id:
                fit = max(
                    _fit_of_masks(tracks[index], *found[place]),
                    _fit_of_boxes(tracks[index], expected, found[place][0].box, size),
                )
                if fit >= _LEAST:
                    yield fit, index, place


def _fit_of_masks(track: _Track, segment: Segment, mask: _Mask) -> float:
    """IoU of a segment with what showed of a track last, where that has moved to."""
    x, y = (round(way) for way in track.way)
    one = track.seen[0] + x, track.seen[1] + y, track.seen[2] + x, track.seen[3] + y
    other = segment.box
    left, top = max(one[0], other[0]), max(one[1], other[1])
    right, bottom = min(one[2], other[2]), min(one[3], other[3])
    if left >= right or top >= bottom:
        return 0.0
    a = track.mask[top - one[1] : bottom - one[1], left - one[0] : right - one[0]]
    b = mask[top - other[1] : bottom - other[1], left - other[0] : right - other[0]]
    both = int(np.count_nonzero(a & b))
    iou = both / (track.area + segment.area - both)
    return iou if track.missed else max(iou, _WITHIN * both / min(track.area, segment.area))


def _fit_of_boxes(track: _Track, expected: _Whole, seen: Box, size: Size) -> float:
    """Share of a segment's box that lies where all of a track is expected, and IoU of the two."""
    left, top, right, bottom = expected
    wide = _SLACK * sqrt((right - left) * (bottom - top))
    slack = max(1.0, wide) * (1 + _UNSURE * track.missed) / 2
    left, top = max(left, 0.0), max(top, 0.0)
    right, bottom = min(right, size[1]), min(bottom, size[0])
    width = min(right + slack, seen[2]) - max(left - slack, seen[0])
    height = min(bottom + slack, seen[3]) - max(top - slack, seen[1])
    both, own = width * height, (seen[2] - seen[0]) * (seen[3] - seen[1])
    if width <= 0 or height <= 0 or both < _INSIDE * own:
        return 0.0
    whole = max(1.0, (right - left) * (bottom - top))
    return _PART * both / own + _WHOLE * both / (whole + own - both)


def _near(tracks: list[_Track], old: set[int], found: _Found, new: set[int], _: Size) -> _Pairs:
    """Minus the distance (in side lengths), track and place of those that are near."""
    for index in old:
        track, (x, y) = tracks[index], _centre(tracks[index].expected())
        for place in new:
            segment = found[place][0]
            if track.class_id == segment.class_id:
                small, large = sorted((track.area, segment.area))
                here_x, here_y = _centre(segment.box)
                distance = hypot(here_x - x, here_y - y) / sqrt(large)
                if distance <= _REACH and large <= _LARGER * small:
                    yield -distance, index, place


def _centre(box: _Whole) -> tuple[float, float]:
    left, top, right, bottom = box
    return (left + right) / 2, (top + bottom) / 2
