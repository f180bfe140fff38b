"""Counting: which objects come into zones, leave them, and cross lines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import msgspec

from knet_runtime.counts import Counts, Direction, How, LineCount, Totals, ZoneCount, ZoneEvent
from knet_runtime.errors import ConfigError
from knet_runtime.segmentation import Segment, Segmentation
from knet_runtime.tracking import PATIENCE
from knet_runtime.types import Frame
from knet_runtime.zones import Line, Point, Zone, Zones

_When = tuple[int, float | None, float | None]  # ZoneEvent's frame, pts and wall


@dataclass
class _Stay:
    """Whether an object is in a zone. It was seen on the other side for ``others`` frames, from
    ``since`` on; ``fresh`` until it is seen outside."""

    since: _When
    inside: bool = False
    others: int = 0
    fresh: bool = True


@dataclass
class _Way:
    """On which ``side`` of a line an object is, and where it was seen ``last`` there. It was seen
    on the other side for ``others`` frames, from ``since`` on; ``through`` if it met the line on
    its way to there."""

    side: str
    last: Point
    since: _When
    others: int = 0
    through: bool = False


@dataclass
class _Tracked:
    """An object that is followed: when it was ``seen`` last, and how many frames it has been
    ``missed`` for."""

    id: int
    label: str
    seen: _When
    missed: int = 0
    stays: dict[str, _Stay] = field(default_factory=dict)
    ways: dict[str, _Way] = field(default_factory=dict)


class ZoneCounter:
    """Counts the objects of one source in ``zones``; call it with each frame and its tracked
    result, in order.

    An object is where the middle of its box's lower edge is: where it stands on the ground. It
    counts as having entered or left a zone, or crossed a line, when it was on the other side for
    ``zones.frames`` frames running, so that one who lingers at a border is counted once; the
    event is of the first of these frames. Who is first seen inside a zone enters it, too, and
    who is not seen for more than ``patience`` frames, or was in another scene, leaves the zones
    that it was last seen in; the ``patience`` is to be the tracker's. A stale frame counts for
    nothing. What is kept grows with the objects that are followed at one time, not with the length
    of the video.

        >>> import numpy as np
        >>> from knet_deploy import Instance, LabelMap, Line, Segmentation, Tracker, ZoneCounter
        >>> from knet_deploy import Zones, open_source
        >>> labels = LabelMap(("car",), ((0, 0, 142),), ignore_index=255, things=(0,))
        >>> track = Tracker()
        >>> count = ZoneCounter(Zones(lines=(Line("gate", ((150, 0), (150, 360))),)))
        >>> with open_source("drive.mp4") as source:
        ...     for frame in source:
        ...         mask = np.ones((40, 60), np.bool_)
        ...         car = Instance(0, 0.9, left=110 + 5 * frame.index, top=200, mask=mask)
        ...         result = Segmentation.from_instances([car], (360, 480), labels)
        ...         result = count(frame, track(frame, result))
        >>> result.counts.totals.lines["gate"]["car"]
        LineCount(to_left=1, to_right=0)
    """

    def __init__(self, zones: Zones, patience: int = PATIENCE) -> None:
        self._given = zones
        self._patience = patience
        self._scene = 0
        self._zones: Zones | None = None  # in pixels of the newest frame
        self._classes: dict[str, tuple[int, ...]] = {}
        self._tracked: dict[int, _Tracked] = {}
        self._totals = Totals(
            {zone.name: {} for zone in zones.zones}, {line.name: {} for line in zones.lines}
        )

    def __call__(self, frame: Frame, result: Segmentation) -> Segmentation:
        """The result with ``counts``; ``result`` itself is not changed. Raises ConfigError for
        things without tracks, and at the first frame for zones that do not fit it, or the model.
        """
        height, width = result.size
        if self._zones is None:
            self._given.check(result.labels)
            for area in self._given.areas():
                named = result.labels.indices(area.classes)
                self._classes[area.name] = named or result.labels.things
        if self._zones is None or self._zones.size != (width, height):
            self._zones = (self._zones or self._given).on(result.size)
        events: tuple[ZoneEvent, ...] = ()
        if not frame.stale:
            events = tuple(self._advance(frame, result, self._zones))
            for event in events:
                self._add(event)
        return replace(result, counts=Counts(self._zones, self._totals, events))

    def _advance(self, frame: Frame, result: Segmentation, zones: Zones) -> Iterator[ZoneEvent]:
        now = frame.index, None if frame.pts is None else float(frame.pts), frame.wall
        if frame.scene != self._scene:
            self._scene = frame.scene
            yield from self._lose(list(self._tracked.values()))
        for tracked in self._tracked.values():
            tracked.missed += 1
        for segment in result.segments:
            if not segment.is_thing:
                continue
            if segment.track is None:
                raise ConfigError("counting needs tracks: let a Tracker see each result first")
            new = _Tracked(segment.track, segment.label, now)
            tracked = self._tracked.setdefault(segment.track, new)
            tracked.seen, tracked.missed = now, 0
            for zone in zones.zones:
                if segment.class_id in self._classes[zone.name]:
                    yield from self._stay(zone, tracked, _foot(segment))
            for line in zones.lines:
                if segment.class_id in self._classes[line.name]:
                    yield from self._cross(line, tracked, _foot(segment))
        gone = [one for one in self._tracked.values() if one.missed > self._patience]
        yield from self._lose(gone)

    def _lose(self, gone: list[_Tracked]) -> Iterator[ZoneEvent]:
        for tracked in gone:
            del self._tracked[tracked.id]
            for name, stay in tracked.stays.items():
                if stay.inside:
                    about = *tracked.seen, tracked.id, tracked.label
                    yield ZoneEvent("left", *about, zone=name, how="lost")

    def _stay(self, zone: Zone, tracked: _Tracked, point: Point) -> Iterator[ZoneEvent]:
        stay = tracked.stays.setdefault(zone.name, _Stay(tracked.seen))
        inside = zone.contains(point)
        if inside == stay.inside:
            stay.others = 0
            stay.fresh &= inside
            return
        if not stay.others:
            stay.since = tracked.seen
        stay.others += 1
        if stay.others == self._given.frames:
            about = *stay.since, tracked.id, tracked.label
            how: How = "appeared" if stay.fresh and inside else "border"
            yield ZoneEvent("entered" if inside else "left", *about, zone=zone.name, how=how)
            stay.inside, stay.others, stay.fresh = inside, 0, False

    def _cross(self, line: Line, tracked: _Tracked, point: Point) -> Iterator[ZoneEvent]:
        side = line.side(point)
        if side is None:
            return
        way = tracked.ways.setdefault(line.name, _Way(side, point, tracked.seen))
        if side == way.side:
            way.last, way.others = point, 0
            return
        if not way.others:
            way.since, way.through = tracked.seen, line.crossed(way.last, point)
        way.others += 1
        if way.others == self._given.frames:
            if way.through:
                about = *way.since, tracked.id, tracked.label
                direction: Direction = "to_right" if side == "right" else "to_left"
                yield ZoneEvent("crossed", *about, line=line.name, direction=direction)
            way.side, way.last, way.others = side, point, 0

    def _add(self, event: ZoneEvent) -> None:
        """Make new totals; those that results have already stay as they are."""
        zones, lines = self._totals.zones, self._totals.lines
        if isinstance(event.zone, str):
            count = zones[event.zone].get(event.label, ZoneCount())
            came = event.event == "entered"
            count = ZoneCount(
                present=count.present + (1 if came else -1),
                entered=count.entered + came,
                left=count.left + (not came),
                appeared=count.appeared + (event.how == "appeared"),
                lost=count.lost + (event.how == "lost"),
            )
            zones = {**zones, event.zone: {**zones[event.zone], event.label: count}}
        if isinstance(event.line, str) and isinstance(event.direction, str):
            before = lines[event.line].get(event.label, LineCount())
            one_more = {event.direction: getattr(before, event.direction) + 1}
            crossed = msgspec.structs.replace(before, **one_more)
            lines = {**lines, event.line: {**lines[event.line], event.label: crossed}}
        self._totals = Totals(zones, lines)


def _foot(segment: Segment) -> Point:
    """Where an object stands: the middle of the lower edge of its box."""
    left, _, right, bottom = segment.box
    return (left + right) / 2, float(bottom)
