"""Areas and lines of an image in which objects are counted, and how they are read from JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from math import isfinite
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from knet_runtime.errors import ConfigError
from knet_runtime.labels import LabelMap
from knet_runtime.types import Size, as_utf8

CONFIRM = 3
"""Frames that an object has to be on the other side of a border before that counts."""

EXAMPLE = """{"zones": [{"name": "yard", "polygon": [[0.1, 0.5], [0.9, 0.5], [0.9, 1]]}],
 "lines": [{"name": "gate", "line": [[0, 0.8], [1, 0.8]], "classes": ["Car"]}],
 "size": [1, 1]}"""

Point = tuple[float, float]
"""(x, y); pixel (0, 0) of an image covers 0 … 1 in both."""


class Zone(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An area: a ``polygon`` of at least three (x, y), whose edges do not cross. Objects of
    ``classes`` are counted in it, or of all things (none named).

    >>> from knet_deploy import Zone
    >>> yard = Zone("yard", ((10, 10), (90, 10), (90, 60), (10, 60)), ("Car",))
    >>> yard.contains((90, 30)), yard.contains((91, 30))
    (True, False)
    """

    name: str
    polygon: tuple[Point, ...]
    classes: tuple[str, ...] = ()

    @property
    def points(self) -> tuple[Point, ...]:
        return self.polygon

    def contains(self, point: Point) -> bool:
        """Whether a point lies in it, or on its border."""
        x, y = point
        inside = False
        for a, b in _edges(self.polygon):
            if _side(a, b, point) == 0 and _within(a, b, point):
                return True
            # The edge is passed by a ray to the right.
            if (a[1] > y) != (b[1] > y):
                inside ^= x < a[0] + (y - a[1]) / (b[1] - a[1]) * (b[0] - a[0])
        return inside


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A ``line`` from one (x, y) to another; who crosses it goes to its left or right side, as seen
    from the first point towards the second. ``classes`` as in ``Zone``.

        >>> from knet_deploy import Line
        >>> gate = Line("gate", ((0, 50), (100, 50)))
        >>> gate.side((30, 70)), gate.side((30, 20)), gate.crossed((30, 20), (40, 70))
        ('right', 'left', True)
    """

    name: str
    line: tuple[Point, ...]
    classes: tuple[str, ...] = ()

    @property
    def points(self) -> tuple[Point, ...]:
        return self.line

    def side(self, point: Point) -> Literal["left", "right"] | None:
        """On which side of the line, made endless, a point lies; None on it."""
        turn = _side(self.line[0], self.line[1], point)
        return None if turn == 0 else "right" if turn > 0 else "left"

    def crossed(self, before: Point, after: Point) -> bool:
        """Whether the straight way between two points on different sides meets the line."""
        ends = [_side(before, after, end) for end in self.line]
        return ends[0] * ends[1] <= 0


_Area = TypeVar("_Area", Zone, Line)


class Zones(msgspec.Struct, frozen=True):
    """What is counted in one source: ``zones`` and ``lines``, whose names all differ.

    Points are in pixels of an image of ``size`` (width, height), on which they were drawn, and are
    scaled to the frames'. ``size`` (1, 1) makes them fractions; without it they are pixels of the
    source's first frame. An object counts as on the other side of a border when it was there for
    ``frames`` frames running. Raises ConfigError that names the zone and what is wrong with it.

        >>> from knet_deploy import Zone, Zones
        >>> zones = Zones((Zone("yard", ((0.1, 0.5), (0.9, 0.5), (0.9, 1))),), size=(1, 1))
        >>> zones.on((100, 200)).zones[0].polygon
        ((20.0, 50.0), (180.0, 50.0), (180.0, 100.0))
    """

    zones: tuple[Zone, ...] = ()
    lines: tuple[Line, ...] = ()
    size: tuple[float, float] | None = None
    frames: int = CONFIRM

    def __post_init__(self) -> None:
        if not self.zones and not self.lines:
            raise ConfigError("there is neither a zone nor a line to count in")
        if self.frames < 1:
            raise ConfigError(f"frames is {self.frames}; give 1 or more")
        if self.size is not None and not all(isfinite(side) and side > 0 for side in self.size):
            raise ConfigError(f"size is {list(self.size)}; give the width and height of the image")
        names = set()
        for kind, one in self._all():
            if not one.name.strip() or one.name != as_utf8(one.name):
                raise ConfigError(f"a {kind} has no name that can be shown ({one.name!a})")
            if one.name in names:
                raise ConfigError(f"two have the name {one.name!r}; let each have one of its own")
            names.add(one.name)
            if reason := _fault(one):
                raise ConfigError(f"{kind} {one.name!r}: {reason}")
            if self.size is not None:
                _check_inside(kind, one, self.size)

    def areas(self) -> tuple[Zone | Line, ...]:
        """All of them: zones, then lines."""
        return (*self.zones, *self.lines)

    def _all(self) -> Iterator[tuple[str, Zone | Line]]:
        yield from (("zone", zone) for zone in self.zones)
        yield from (("line", line) for line in self.lines)

    def check(self, labels: LabelMap) -> None:
        """ConfigError for classes that a model does not have, or does not find objects of."""
        for kind, one in self._all():
            try:
                wanted = labels.indices(one.classes)
            except ConfigError as error:
                raise ConfigError(f"{kind} {one.name!r}: {error}") from error
            for index in wanted:
                if index not in labels.things:
                    things = ", ".join(labels.names[thing] for thing in labels.things)
                    raise ConfigError(
                        f"{kind} {one.name!r}: {labels.names[index]} is no class of objects; what "
                        f"can be counted is {things or 'nothing'}"
                    )

    def on(self, hw: Size) -> Zones:
        """The same in pixels of a frame of (height, width). Raises ConfigError for points outside
        of it, where no ``size`` says what they are."""
        height, width = hw
        if self.size is None:
            for kind, one in self._all():
                _check_inside(kind, one, (width, height))
        wide, tall = self.size or (width, height)
        scale = width / wide, height / tall
        return Zones(
            tuple(_scaled(zone, "polygon", scale) for zone in self.zones),
            tuple(_scaled(line, "line", scale) for line in self.lines),
            (width, height),
            self.frames,
        )


def read_zones(path: str | Path) -> Zones:
    """The zones of a JSON file; see ``Zones``. Raises ConfigError, naming the file, the zone and
    what is wrong.

        >>> from knet_deploy import read_zones
        >>> with open("zones.json", "w") as file:
        ...     count = file.write('{"lines": [{"name": "gate", "line": [[0, 90]]}]}')
        >>> read_zones("zones.json")
        Traceback (most recent call last):
        knet_runtime.errors.ConfigError: zones.json: line 'gate': 1 point; a line has two
    """
    try:
        data = msgspec.json.decode(Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf"))
        return _zones(data)
    except OSError as error:
        text = f"{path}: {error.strerror}; check the name and its permissions"
        raise ConfigError(text) from error
    except (msgspec.DecodeError, UnicodeError) as error:
        refused = ConfigError(f"{path}: is no JSON of zones and lines: {error}")
    except ConfigError as error:
        refused = ConfigError(f"{path}: {error}")
    refused.example = EXAMPLE
    raise refused


def _zones(data: Any) -> Zones:
    if not isinstance(data, dict):
        raise ConfigError('begin with {"zones": […]}')
    if unknown := [key for key in data if key not in Zones.__struct_fields__]:
        raise ConfigError(f"{unknown[0]!r} is none of zones, lines, size and frames")
    zones, lines = _list(data.pop("zones", []), Zone), _list(data.pop("lines", []), Line)
    try:
        return Zones(zones, lines, **msgspec.convert(data, _Rest).given())
    except msgspec.ValidationError as error:
        raise ConfigError(str(error)) from error


class _Rest(msgspec.Struct, frozen=True):
    size: tuple[float, float] | UnsetType = UNSET
    frames: int | UnsetType = UNSET

    def given(self) -> dict[str, Any]:
        both = {"size": self.size, "frames": self.frames}
        return {key: value for key, value in both.items() if value is not UNSET}


def _list(entries: Any, kind: type[_Area]) -> tuple[_Area, ...]:
    if not isinstance(entries, list):
        raise ConfigError(f"{kind.__name__.lower()}s are not a list: write them in [ ]")
    return tuple(_one(entry, kind, number) for number, entry in enumerate(entries, 1))


def _one(entry: Any, kind: type[_Area], number: int) -> _Area:
    try:
        return msgspec.convert(entry, kind)
    except msgspec.ValidationError as error:
        name = entry.get("name") if isinstance(entry, dict) else None
        shown = repr(name) if isinstance(name, str) else f"number {number}"
        raise ConfigError(f"{kind.__name__.lower()} {shown}: {error}") from error


def _fault(one: Zone | Line) -> str | None:
    """What is wrong with the points themselves."""
    count = len(one.points)
    if not all(isfinite(value) for point in one.points for value in point):
        return "a point is not finite"
    if isinstance(one, Line):
        if count != 2:
            return f"{count} point{'s' * (count != 1)}; a line has two"
        return "both points are the same; a line needs two" if len(set(one.points)) < 2 else None
    if len(set(one.polygon)) < 3:
        return f"{len(set(one.polygon))} points; a polygon has three or more"
    edges = list(_edges(one.polygon))
    if any(a == b for a, b in edges):
        return "a point stands there twice running; name each corner once"
    for (i, (a, b)), (j, (c, d)) in combinations(enumerate(edges), 2):
        if j - i in (1, count - 1):
            shared, before, after = (b, a, d) if j - i == 1 else (a, b, c)
            turn = _side(before, shared, after)
            ahead = sum((p - q) * (r - q) for p, q, r in zip(before, shared, after, strict=True))
            cross = turn == 0 and ahead > 0
        else:
            cross = _meet(a, b, c, d)
        if cross:
            return (
                f"the edge from {_text(a)} to {_text(b)} meets that from {_text(c)} to {_text(d)}; "
                "name the corners in their order around the area"
            )
    return None


def _check_inside(kind: str, one: Zone | Line, size: tuple[float, float]) -> None:
    for x, y in one.points:
        if not (0 <= x <= size[0] and 0 <= y <= size[1]):
            raise ConfigError(
                f"{kind} {one.name!r}: {_text((x, y))} lies outside of the image, which is "
                f"{size[0]:g} wide and {size[1]:g} high"
            )


def _scaled(one: _Area, field: str, scale: Point) -> _Area:
    points = tuple((x * scale[0], y * scale[1]) for x, y in one.points)
    return msgspec.structs.replace(one, **{field: points})


def _text(point: Point) -> str:
    return f"[{point[0]:g}, {point[1]:g}]"


def _edges(points: Sequence[Point]) -> Iterator[tuple[Point, Point]]:
    return zip(points, (*points[1:], points[0]), strict=True)


def _side(a: Point, b: Point, point: Point) -> float:
    """Above 0 where a point lies to the right of the way from ``a`` to ``b``, as y points down."""
    return (b[0] - a[0]) * (point[1] - a[1]) - (b[1] - a[1]) * (point[0] - a[0])


def _within(a: Point, b: Point, point: Point) -> bool:
    """Whether a point of the endless line through ``a`` and ``b`` lies between them."""
    return all(min(p, q) <= value <= max(p, q) for p, q, value in zip(a, b, point, strict=True))


def _meet(a: Point, b: Point, c: Point, d: Point) -> bool:
    """Whether two edges have a point in common."""
    c_side, d_side = _side(a, b, c), _side(a, b, d)
    a_side, b_side = _side(c, d, a), _side(c, d, b)
    if ((c_side > 0) != (d_side > 0) and (a_side > 0) != (b_side > 0)) and all(
        (c_side, d_side, a_side, b_side)
    ):
        return True
    ends = ((c_side, a, b, c), (d_side, a, b, d), (a_side, c, d, a), (b_side, c, d, b))
    return any(side == 0 and _within(p, q, end) for side, p, q, end in ends)
