"""Segments, and how they are drawn: things in a shade of their own, with an outline and a label."""

from __future__ import annotations

import colorsys
from collections.abc import Collection, Sequence

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_runtime.drawing import drawable, lay, look_up
from knet_runtime.labels import Colour, LabelMap
from knet_runtime.types import ClassMap, Rgb

Box = tuple[int, int, int, int]

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_PAD = 2  # pixels around the text of a label
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
) -> Rgb:
    """``image`` uint8 [H, W, 3] RGB under the colours of ``segments``; a new array.

    ``segment_map`` [H, W] holds their ids; their boxes times ``scale`` are in its pixels.
    ``classes`` are those drawn (None: all). Fills are blended by ``alpha`` as ``drawing.lay`` does
    it. Stuff has the classes' colours. A thing has a ``shade`` of its class's colour, which follows
    its track or else its id, a bright outline inside its pixels, and a label such as "Car 3 · 0.91"
    where there is room: large ones first, none over another. With alpha 0 nothing is drawn.
    """
    shown = [segment for segment in segments if classes is None or segment.class_id in classes]
    if len(segments) < 255:  # a look-up in bytes is several times faster
        segment_map = segment_map.astype(np.uint8)
    colours = {segment.id: colour_of(segment, labels) for segment in shown}
    painted = lay(image, segment_map, colours, alpha)
    things = [segment for segment in shown if segment.is_thing]
    if things and alpha and segment_map.size:
        _outline(painted, segment_map, {one.id: _bright(colours[one.id]) for one in things})
        _write_labels(painted, things, colours, scale)
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


def _outline(image: Rgb, ids: ClassMap, colours: dict[int, Colour]) -> None:
    """Draw the edges of these ids, inside of them."""
    wide = 2 * max(1, round(min(ids.shape) / 400)) + 1
    table = np.zeros(max(256, int(ids.max()) + 1, max(colours) + 1), np.uint8)
    table[list(colours)] = 255
    edges = cv2.morphologyEx(ids, cv2.MORPH_GRADIENT, np.ones((wide, wide), np.uint8))
    drawn = np.where(edges > 0, table[ids], np.uint8(0))
    cv2.copyTo(look_up(ids, colours), drawn, image)


def _write_labels(
    image: Rgb, things: Sequence[Segment], colours: dict[int, Colour], scale: float
) -> None:
    """Write a label at the top of each thing's box, or below it, where it covers no other label."""
    height, width = image.shape[:2]
    size = min(0.8, max(0.35, min(height, width) / 1500))
    taken: NDArray[np.int64] = np.empty((0, 4), np.int64)
    for thing in sorted(things, key=lambda one: -one.area):
        left, top, right, bottom = (round(edge * scale) for edge in thing.box)
        score = "" if thing.score is None else f" · {thing.score:.2f}"
        text = drawable(f"{thing.label} {_number(thing)}{score}")
        (long, tall), below = cv2.getTextSize(text, _FONT, size, 1)
        wide, high = long + 2 * _PAD, tall + below + 2 * _PAD
        if max(right - left, bottom - top) < high or wide > width:
            continue
        x = min(max(0, left), width - wide)
        for y in (top - high, top, bottom):
            box = np.array((x, y, x + wide, y + high))
            inside = y >= 0 and y + high <= height
            if inside and not ((taken[:, :2] < box[2:]) & (taken[:, 2:] > box[:2])).all(1).any():
                taken = np.vstack([taken, box])
                colour = colours[thing.id]
                cv2.rectangle(image, (x, y), (x + wide - 1, y + high - 1), colour, cv2.FILLED)
                ink = (0, 0, 0) if np.dot(colour, (0.299, 0.587, 0.114)) > 128 else (255,) * 3
                at = (x + _PAD, y + _PAD + tall)
                cv2.putText(image, text, at, _FONT, size, ink, 1, cv2.LINE_AA)
                break
