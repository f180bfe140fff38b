"""What was counted in zones and at lines up to a frame, and how it is drawn."""

from __future__ import annotations

from math import hypot
from typing import Literal

import cv2
import msgspec
import numpy as np
from msgspec import UNSET, UnsetType

from knet_runtime.drawing import line_width, text_scale, text_size, write
from knet_runtime.types import Rgb
from knet_runtime.zones import Point, Zones

Direction = Literal["to_left", "to_right"]
"""To which side of a line, seen from its first point towards its second."""

How = Literal["border", "appeared", "lost"]
"""How an object came into a zone or out of it: over its border, or first or last seen inside."""

_ALONG = 0.15  # where on a line its counts stand, so that they do not hide what is on it

_INK, _EDGE = (255, 255, 255), (0, 0, 0)
_SIDES = ((-1, 0), (1, 0), (0, -1), (0, 1))


class ZoneCount(msgspec.Struct, frozen=True):
    """Objects of one class in a zone: ``present`` now, which is ``entered`` less ``left``. Of those
    that entered, ``appeared`` were first seen inside; of those that left, ``lost`` were last seen
    inside."""

    present: int = 0
    entered: int = 0
    left: int = 0
    appeared: int = 0
    lost: int = 0


class LineCount(msgspec.Struct, frozen=True):
    """How often objects of one class crossed a line."""

    to_left: int = 0
    to_right: int = 0


class Totals(msgspec.Struct, frozen=True):
    """All counts, by the name of the zone or line and by class; a class that was never counted
    there is left out."""

    zones: dict[str, dict[str, ZoneCount]]
    lines: dict[str, dict[str, LineCount]]


class ZoneEvent(msgspec.Struct, frozen=True, rename={"label": "class"}):
    """An object ``entered`` or ``left`` a ``zone``, or ``crossed`` a ``line`` in ``direction``.

    ``frame``, ``pts`` (seconds) and ``wall`` (of live sources, seconds since the epoch) are those
    of the first frame in which it was on the other side, or, where ``how`` is "lost", of the last
    one in which it was seen. ``label`` is its class, and the key "class" in JSON; ``track`` its id.
    """

    event: Literal["entered", "left", "crossed"]
    frame: int
    pts: float | None
    wall: float | None
    track: int
    label: str
    zone: str | UnsetType = UNSET
    how: How | UnsetType = UNSET
    line: str | UnsetType = UNSET
    direction: Direction | UnsetType = UNSET


class Counts(msgspec.Struct, frozen=True):
    """What was counted up to a frame: the ``zones`` in its pixels, ``totals``, and the ``events``
    that became certain with it."""

    zones: Zones
    totals: Totals
    events: tuple[ZoneEvent, ...]


class Mark(msgspec.Struct, frozen=True):
    """A zone or line as it is drawn: its points, whether the last one joins the first, and its
    texts, each with the place (x, y) of its middle."""

    points: tuple[Point, ...]
    closed: bool
    texts: tuple[tuple[Point, str], ...]


def marks(counts: Counts, scale: float = 1.0) -> list[Mark]:
    """What is drawn of these counts, in pixels of a drawing ``scale`` times as large as the frame:
    at the lower end of a zone how many objects are present, came in and went out; on each side of a
    line, near its first point, how many crossed it to there."""
    drawn = []
    away = 0.05 * min(side * scale for side in counts.zones.size or (0, 0))
    for zone in counts.zones.zones:
        of = counts.totals.zones[zone.name].values()
        present, entered = sum(one.present for one in of), sum(one.entered for one in of)
        text = f"{zone.name}: {present} · in {entered} · out {sum(one.left for one in of)}"
        points = _scaled(zone.polygon, scale)
        xs, ys = zip(*points, strict=True)
        drawn.append(Mark(points, True, (((sum(xs) / len(xs), max(ys) - away), text),)))
    for line in counts.zones.lines:
        ways = counts.totals.lines[line.name].values()
        points = _scaled(line.line, scale)
        (ax, ay), (bx, by) = points
        length = hypot(bx - ax, by - ay)
        dx, dy = away * (ay - by) / length, away * (bx - ax) / length  # to its right
        x, y = ax + _ALONG * (bx - ax), ay + _ALONG * (by - ay)
        right = f"{line.name}: {sum(one.to_right for one in ways)}"
        left = f"{line.name}: {sum(one.to_left for one in ways)}"
        drawn.append(Mark(points, False, (((x + dx, y + dy), right), ((x - dx, y - dy), left))))
    return drawn


def draw_counts(image: Rgb, counts: Counts, scale: float = 1.0) -> None:
    """Draw ``marks`` into ``image`` uint8 [H, W, 3] RGB, which has ``scale`` times the frame's
    size: white, edged with black."""
    height, width = image.shape[:2]
    wide, size = line_width((height, width)), text_scale((height, width))
    shown = marks(counts, scale)
    for ink, thick in ((_EDGE, wide + 2), (_INK, wide)):
        for mark in shown:
            points = np.rint(np.array(mark.points)).astype(np.int32)
            cv2.polylines(image, [points], mark.closed, ink, thick, cv2.LINE_AA)
    for mark in shown:
        for (x, y), words in mark.texts:
            long, tall, _ = text_size(words, size)
            left = round(min(max(x - long / 2, 2), max(2, width - long - 2)))
            below = round(min(max(y + tall / 2, tall + 2), height - 3))
            # Thicker letters are wider ones, so the edge is the same text beside itself.
            for dx, dy, ink in (*((*side, _EDGE) for side in _SIDES), (0, 0, _INK)):
                write(image, words, (left + wide * dx, below + wide * dy), size, ink)


def _scaled(points: tuple[Point, ...], scale: float) -> tuple[Point, ...]:
    return tuple((x * scale, y * scale) for x, y in points)
