"""Segments, and how they are drawn: things in a shade of their own, with an outline and a label."""

from __future__ import annotations

import colorsys
from collections.abc import Collection, Iterable, Mapping, Sequence

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_runtime.drawing import lay, text_scale, text_size, write
from knet_runtime.labels import Colour, LabelMap
from knet_runtime.types import ClassMap, Rgb, Size

Box = tuple[int, int, int, int]

_LARGE = 0.015  # of an image: a region that is given its name
_COARSE = 256  # pixels of the longer side at which places for names are looked for
# Multiples of these, less their whole part, lie far from one another and fill 0 … 1 evenly.
_HUE_STEP, _LIGHT_STEP = 0.6180339887, 0.7548776662
_HUE_RANGE, _LIGHT_RANGE = 0.07, 0.3


class Segment(msgspec.Struct, frozen=True):
    """One segment of an image: all pixels of a class (semantic, stuff), or one object (a thing).

    ``id`` is its value in ``Segmentation.segment_map``, from 1 on. ``class_id`` is the class's
    index and ``label`` its name; ``score`` is 0 … 1, None in a semantic result. ``area`` counts its
    pixels. ``box`` is (left, top, right, bottom) in pixels, right and bottom just outside.
    ``track`` is the id that a tracker gave it.

        >>> from knet_deploy import Segmenter, open_source
        >>> with open_source("street.png") as source, Segmenter() as segment:
        ...     result = segment(next(iter(source)).image)
        >>> road = next(found for found in result.segments if found.label == "Road")
        >>> road.area > 10_000, road.is_thing, road.score
        (True, False, None)
    """

    id: int
    class_id: int
    label: str
    score: float | None
    area: int
    box: Box
    is_thing: bool
    track: int | None = None


def paint(
    image: Rgb,
    segment_map: ClassMap,
    segments: Sequence[Segment],
    labels: LabelMap,
    alpha: float,
    classes: Collection[int] | None = None,
    scale: float = 1.0,
    *,
    names: NamePlaces | None = None,
) -> Rgb:
    """``image`` uint8 [H, W, 3] RGB under the colours of ``segments``; a new array.

    ``segment_map`` [H, W] holds their ids; their boxes times ``scale`` are in its pixels.
    ``classes`` are those drawn (None: all). Fills are blended, and borders drawn, as by
    ``drawing.lay``. Stuff has the classes' colours. A thing has a ``shade`` of its class's colour,
    which follows its track or else its id, a bright outline inside its pixels, and a label such as
    "Car 3 · 0.91" where there is room: large ones first, none over another. ``names`` writes the
    class of stuff into its large regions. With alpha 0 nothing is drawn.
    """
    shown = [segment for segment in segments if classes is None or segment.class_id in classes]
    if len(segments) < 255:  # a look-up in bytes is several times faster
        segment_map = segment_map.astype(np.uint8)
    colours = {segment.id: colour_of(segment, labels) for segment in shown}
    things = [segment for segment in shown if segment.is_thing]
    lines = colours | {thing.id: _bright(colours[thing.id]) for thing in things}
    painted = lay(image, segment_map, colours, alpha, lines)
    if not alpha or not segment_map.size:
        return painted
    tags = _Tags(painted)
    for thing in sorted(things, key=lambda one: -one.area):
        left, top, right, bottom = (round(edge * scale) for edge in thing.box)
        score = "" if thing.score is None else f" · {thing.score:.2f}"
        text = f"{thing.label} {_number(thing)}{score}"
        high = tags.height(text)
        if max(right - left, bottom - top) >= high:
            places = ((left, y) for y in (top - high, top, bottom))
            tags.put(text, colours[thing.id], places)
    if names is not None:
        stuff = {one.id: one.label for one in shown if not one.is_thing}
        names.write(tags, segment_map, stuff, colours)
    return painted


def paint_classes(
    image: Rgb,
    class_map: ClassMap,
    labels: LabelMap,
    alpha: float,
    classes: Collection[int] | None = None,
    *,
    names: NamePlaces | None = None,
) -> Rgb:
    """``image`` uint8 [H, W, 3] RGB under the colours of ``class_map`` [H, W], with borders, as
    ``paint`` does it for stuff; a new array."""
    shown = range(labels.num_classes) if classes is None else classes
    colours = {index: labels.palette[index] for index in shown}
    painted = lay(image, class_map, colours, alpha, lines=colours)
    if names is not None and alpha and class_map.size:
        named = {index: labels.names[index] for index in colours}
        names.write(_Tags(painted), class_map, named, colours)
    return painted


def shade(colour: Colour, number: int) -> Colour:
    """A colour close enough to ``colour`` that a legend still reads, and different for each
    ``number`` of a few dozen."""
    hue, light, strength = colorsys.rgb_to_hls(*(value / 255 for value in colour))
    hue += _HUE_RANGE * (number * _HUE_STEP % 1 - 0.5)
    low = min(max(light - _LIGHT_RANGE / 2, 0.2), 0.8 - _LIGHT_RANGE)
    light = low + _LIGHT_RANGE * (number * _LIGHT_STEP % 1)
    red, green, blue = colorsys.hls_to_rgb(hue % 1, light, strength)
    return round(255 * red), round(255 * green), round(255 * blue)


def colour_of(segment: Segment, labels: LabelMap) -> Colour:
    """What a segment is filled with."""
    colour = labels.palette[segment.class_id]
    return shade(colour, _number(segment)) if segment.is_thing else colour


def _number(segment: Segment) -> int:
    return segment.id if segment.track is None else segment.track


def _bright(colour: Colour) -> Colour:
    red, green, blue = ((value + 2 * 255) // 3 for value in colour)
    return red, green, blue


class _Tags:
    """Texts on filled boxes in ``image`` uint8 [H, W, 3] RGB, none over another."""

    def __init__(self, image: Rgb) -> None:
        self.size = image.shape[:2]
        self._image = image
        self._scale = text_scale(self.size)
        self._pad = max(2, round(4 * self._scale))
        self._taken: NDArray[np.int64] = np.empty((0, 4), np.int64)

    def height(self, text: str) -> int:
        """Pixels that the box of this text is high."""
        return self._extent(text)[1]

    def put(
        self, text: str, colour: Colour, places: Iterable[tuple[int, int]], *, centred: bool = False
    ) -> None:
        """Write into a box whose left upper corner, or middle, is the first of ``places`` (x, y)
        where it covers no other; nowhere if there is none. It is moved sideways into the image."""
        height, width = self.size
        wide, high, below = self._extent(text)
        if wide > width:
            return
        for x, y in places:
            left, top = (x - wide // 2, y - high // 2) if centred else (x, y)
            left = min(max(0, left), width - wide)
            box = np.array((left, top, left + wide, top + high))
            covers = ((self._taken[:, :2] < box[2:]) & (self._taken[:, 2:] > box[:2])).all(1).any()
            if top < 0 or top + high > height or covers:
                continue
            self._taken = np.vstack([self._taken, box])
            corner = (left + wide - 1, top + high - 1)
            cv2.rectangle(self._image, (left, top), corner, colour, cv2.FILLED)
            ink = (0, 0, 0) if np.dot(colour, (0.299, 0.587, 0.114)) > 128 else (255, 255, 255)
            at = (left + self._pad, top + high - self._pad - below)
            write(self._image, text, at, self._scale, ink)
            break

    def _extent(self, text: str) -> tuple[int, int, int]:
        long, tall, below = text_size(text, self._scale)
        return long + 2 * self._pad, tall + below + 2 * self._pad, below


class NamePlaces:
    """Where the names of large regions stand in a video: for each video one, which is told of its
    frames in order.

    A name stays where it is while that place lies well inside its region, so that it does not
    tremble; a region that has its name keeps it until it is half as large as one that is given one.
    """

    def __init__(self) -> None:
        self._size: Size | None = None
        self._last: dict[str, list[tuple[float, float]]] = {}

    def write(
        self, tags: _Tags, ids: ClassMap, names: Mapping[int, str], colours: Mapping[int, Colour]
    ) -> None:
        """Write the ``names`` of these ids into their large regions that have room for them."""
        height, width = ids.shape
        factor = max(1.0, max(height, width) / _COARSE)
        size = max(1, round(height / factor)), max(1, round(width / factor))
        coarse = cv2.resize(ids, size[::-1], interpolation=cv2.INTER_NEAREST)
        before = self._last if size == self._size else {}
        self._size, self._last = size, {name: [] for name in names.values()}
        for id_, name in names.items():
            # The image's edge counts as the end of a region.
            mask = cv2.copyMakeBorder(
                (coarse == id_).view(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT
            )
            count, regions, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
            depth = cv2.distanceTransform(mask, cv2.DIST_L2, 3)
            tall = tags.height(name) / factor
            for number in range(1, count):
                kept = [
                    (depth[round(y), round(x)], (x, y))
                    for x, y in before.get(name, ())
                    if regions[round(y), round(x)] == number
                ]
                least = _LARGE / 2 if kept else _LARGE
                if stats[number, cv2.CC_STAT_AREA] < least * coarse.size:
                    continue
                deep, place = max(kept, default=(0, (0, 0)))
                if deep < tall / 4:
                    inside = np.where(regions == number, depth, 0)
                    if 2 * inside.max() <= tall:
                        continue
                    place = _middle(inside)
                self._last[name].append(place)
                x, y = (round((one - 0.5) * factor) for one in place)
                tags.put(name, colours[id_], ((x, y),), centred=True)


def _middle(depth: NDArray[np.floating]) -> tuple[float, float]:
    """A place (x, y) deep inside a region; ``depth`` [H, W] is the way to its border, 0 outside.

    The mean of its deep pixels moves little from frame to frame; where that is not deep itself, as
    in a ring, the deepest pixel.
    """
    weight = depth.astype(np.float64) ** 4
    across, down = weight.sum(0), weight.sum(1)
    x = float(across @ np.arange(len(across)) / across.sum())
    y = float(down @ np.arange(len(down)) / down.sum())
    if depth[round(y), round(x)] < depth.max() / 2:
        row, column = np.unravel_index(int(depth.argmax()), depth.shape)
        return float(column), float(row)
    return x, y
