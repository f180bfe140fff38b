"""Ids that last: the objects of a video, followed from frame to frame."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from knet_runtime.errors import ConfigError
from knet_runtime.segmentation import Box, Segment, Segmentation
from knet_runtime.types import Frame, Size

PATIENCE = 15
"""Frames for which an object may be out of sight before its track ends."""

_LEAST_IOU = 0.2
_DOUBT = 0.05  # what the IoU of one that was not wholly seen in the last frame counts less
_INSIDE = 0.5  # share of a segment that lies where a partly hidden object is expected
_WHOLE = 0.9  # an object that covers less than this share of its area is partly hidden
_FADE = 0.97  # what is left of that area after a frame, if the object grows no more
_HOLDS = 0.1  # change of a side's length at which a step still tells the velocity
_REACH = 1.5  # side lengths that an object may be from where it is expected, if nothing overlaps
_LARGER = 2.0  # times that its area may have grown or shrunk then
_NEWEST = 0.25  # weight of the newest step in a track's velocity

_Mask = NDArray[np.bool_]


@dataclass
class _Track:
    """An object as it was ``missed`` frames ago; ``step`` is its (x, y) per frame. What hides a
    part of it changes neither ``box`` nor ``mask``, for as long as it lasts: ``hidden`` frames."""

    id: int
    class_id: int
    box: Box
    mask: _Mask
    area: float
    step: NDArray[np.float64] | None = None
    missed: int = 0
    hidden: int = 0

    def expected(self) -> Box:
        """Its box in the frame that comes next, at constant velocity."""
        if self.step is None:
            return self.box
        x, y = (int(way) for way in np.rint(self.step * (self.missed + 1)))
        left, top, right, bottom = self.box
        return left + x, top + y, right + x, bottom + y

    def follow(self, segment: Segment, mask: _Mask, patience: int) -> None:
        """It is this segment now."""
        if segment.area < _WHOLE * self.area and self.hidden < patience:
            self.box = self.expected()
            self.hidden += 1
        else:
            if _same_size(self.box, segment.box) or self.step is None:
                way = (_centre(segment.box) - _centre(self.box)) / (self.missed + 1)
                known = way if self.step is None else self.step
                self.step = _NEWEST * way + (1 - _NEWEST) * known
            self.box, self.mask = segment.box, mask
            self.area = max(segment.area, _FADE * self.area if not self.hidden else 0)
            self.hidden = 0
        self.missed = 0


class Tracker:
    """Gives the things of one source's frames tracks; call it with each frame and its result, in
    order.

    A track moves on at constant velocity. It takes the segment of its class that overlaps most with
    where it is expected (IoU of the masks, at least 0.2), each segment going to one track, the
    largest overlaps first. What is left goes to a track in whose expected mask it mostly lies, as
    of an object that is partly hidden; then to the nearest one within one and a half times its own
    size, if it is not more than twice as large or small; or it begins a new one. A track that finds
    no segment is kept for ``patience`` frames, unless it has left the image. Ids count from 1 and
    are never given again. A stale frame gets the last result again; after a change of size all
    tracks are new.

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
        if last is not None and last.size != result.size:
            self._tracks, last = [], None
        if last is None or not frame.stale:
            self._last = last = result.with_tracks(self._advance(result))
        return last

    def _advance(self, result: Segmentation) -> dict[int, int]:
        """The track of each thing, by segment."""
        found = [(segment, mask) for segment, mask in result.masks() if segment.is_thing]
        old, new = set(range(len(self._tracks))), set(range(len(found)))
        ids = {}
        for pairs in (_overlapping, _inside, _near):
            scored = sorted(pairs(self._tracks, old, found, new), key=lambda pair: -pair[0])
            for _, track, place in scored:
                if track in old and place in new:
                    old.remove(track)
                    new.remove(place)
                    self._tracks[track].follow(*found[place], self._patience)
                    ids[found[place][0].id] = self._tracks[track].id
        for track in old:
            self._tracks[track].missed += 1
        self._tracks = [track for track in self._tracks if self._is_kept(track, result.size)]
        for place in sorted(new):
            segment, mask = found[place]
            self._given += 1
            ids[segment.id] = self._given
            about = segment.class_id, segment.box, mask, segment.area
            self._tracks.append(_Track(self._given, *about))
        return ids

    def _is_kept(self, track: _Track, size: Size) -> bool:
        left, top, right, bottom = track.expected()
        inside = right > 0 and bottom > 0 and left < size[1] and top < size[0]
        return not track.missed or (inside and track.missed <= self._patience)


_Found = list[tuple[Segment, _Mask]]
_Pairs = Iterator[tuple[float, int, int]]


def _pairs(
    tracks: list[_Track], old: Iterable[int], found: _Found, new: Iterable[int]
) -> Iterator[tuple[int, int]]:
    return (
        (index, place)
        for index in old
        for place in new
        if tracks[index].class_id == found[place][0].class_id
    )


def _overlapping(tracks: list[_Track], old: set[int], found: _Found, new: set[int]) -> _Pairs:
    """IoU, track and place of those whose masks overlap enough."""
    for index, place in _pairs(tracks, old, found, new):
        both, one, other = _common(tracks[index], *found[place])
        if both and (iou := both / (one + other - both)) >= _LEAST_IOU:
            unseen = tracks[index].missed or tracks[index].hidden
            yield iou - (_DOUBT if unseen else 0), index, place


def _inside(tracks: list[_Track], old: set[int], found: _Found, new: set[int]) -> _Pairs:
    """Share inside, track and place of those that lie in what is expected."""
    for index, place in _pairs(tracks, old, found, new):
        both, _, other = _common(tracks[index], *found[place])
        if both and both / other >= _INSIDE:
            yield both / other, index, place


def _near(tracks: list[_Track], old: set[int], found: _Found, new: set[int]) -> _Pairs:
    """Minus the distance (in its side lengths), track and place of those that are near."""
    for index, place in _pairs(tracks, old, found, new):
        track, segment = tracks[index], found[place][0]
        away = _centre(segment.box) - _centre(track.expected())
        distance = float(np.hypot(*away)) / max(track.area, segment.area) ** 0.5
        ratio = max(track.area, segment.area) / max(1, min(track.area, segment.area))
        if distance <= _REACH and ratio <= _LARGER:
            yield -distance, index, place


def _common(track: _Track, segment: Segment, mask: _Mask) -> tuple[int, int, int]:
    """Pixels of a track's expected mask and of a segment in common, and of each: all 0 where the
    boxes do not overlap, which costs nothing more."""
    one, other = track.expected(), segment.box
    left, top = max(one[0], other[0]), max(one[1], other[1])
    right, bottom = min(one[2], other[2]), min(one[3], other[3])
    if left >= right or top >= bottom:
        return 0, 0, 0
    a = track.mask[top - one[1] : bottom - one[1], left - one[0] : right - one[0]]
    b = mask[top - other[1] : bottom - other[1], left - other[0] : right - other[0]]
    return int(np.count_nonzero(a & b)), int(np.count_nonzero(track.mask)), segment.area


def _same_size(one: Box, other: Box) -> bool:
    """Whether a segment still shows as much of an object, so that its centre is the object's."""
    return all(
        abs((other[end] - other[end - 2]) - side) <= max(1, _HOLDS * side)
        for end in (2, 3)
        for side in (one[end] - one[end - 2],)
    )


def _centre(box: Box) -> NDArray[np.float64]:
    left, top, right, bottom = box
    return np.array(((left + right) / 2, (top + bottom) / 2))
