"""What one street is like, what stands along it block by block, and what moves along it.

A block is a pure function of the seed and its number. Movers are streams of like things, each an
endless lattice in its own moving frame: where they are is a pure function of the seed and the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from knet_synthetic.canvas import Curve, generator

BLOCK = 24.0  # metres
BAY = 2.1  # metres of road that a row of parked cars takes
STYLES = ("terrace", "high street", "office", "suburb")
CLOTHES = ((34, 36, 44), (52, 58, 84), (110, 40, 38), (170, 164, 150), (62, 82, 60), (196, 70, 50),
           (44, 90, 130), (90, 74, 60), (206, 206, 204), (28, 28, 30), (150, 120, 60))  # fmt: skip
SKIN = ((226, 184, 156), (198, 150, 120), (140, 96, 70), (92, 62, 46))


@dataclass(frozen=True)
class Layout:
    """Lateral places in metres from the line between the two lanes; `side` is where one drives:
    -1 left, +1 right. `parking` and `pavement` are (left, right)."""

    side: int
    lane: float
    parking: tuple[bool, bool]
    pavement: tuple[float, float]
    curve: Curve
    mix: tuple[float, ...]  # shares of STYLES
    parked: float
    trees: float
    people: float
    traffic: float
    cyclists: float
    signs: float
    season: int
    zebra: bool
    yellow: bool
    park_side: int
    focal: float
    horizon: float
    height: float
    speed: float

    @property
    def facades(self) -> tuple[int, ...]:
        """How many facades the street has of each of STYLES; they are kept one after another."""
        return tuple(1 + round(2.4 * share) for share in self.mix)

    def kerb(self, side: int) -> float:
        """Signed x of the kerb on a side (-1 left, +1 right)."""
        return side * (self.lane + BAY * self.parking[side > 0])

    def wall(self, side: int) -> float:
        """Signed x where the pavement ends."""
        return self.kerb(side) + side * self.pavement[side > 0]


def draw_layout(rng: np.random.Generator) -> Layout:
    lean = rng.dirichlet((0.8, 0.8, 0.35, 0.6))
    bendy = rng.random()
    return Layout(
        side=-1 if rng.random() < 0.6 else 1,
        lane=rng.uniform(2.8, 4.0),
        parking=(bool(rng.random() < 0.55), bool(rng.random() < 0.55)),
        pavement=(rng.uniform(1.6, 3.4), rng.uniform(1.6, 3.4)),
        curve=Curve(
            (bendy * rng.uniform(0.5, 7.0), bendy * rng.uniform(0.5, 9.0)),
            (rng.uniform(38, 60), rng.uniform(70, 120)),
            (rng.uniform(0, 6.28), rng.uniform(0, 6.28)),
        ),
        mix=tuple(lean.tolist()),
        parked=rng.uniform(0.25, 0.85),
        trees=rng.uniform(0.2, 1.2),
        people=rng.uniform(0.3, 1.3),
        traffic=rng.uniform(0.3, 1.2),
        cyclists=rng.uniform(0.4, 1.3),
        signs=rng.uniform(0.4, 1.2),
        season=int(rng.choice(3, p=[0.6, 0.18, 0.22])),
        zebra=bool(rng.random() < 0.5),
        yellow=bool(rng.random() < 0.5),
        park_side=int(rng.choice(3, p=[0.15, 0.7, 0.15])) - 1,
        focal=rng.uniform(0.82, 1.12),
        horizon=rng.uniform(0.42, 0.54),
        height=rng.uniform(1.25, 1.65),
        speed=rng.uniform(6.5, 9.5),
    )


@dataclass(frozen=True)
class Plot:
    """A stretch of one side: a building behind the pavement's end, or a gap with greenery."""

    side: int
    start: float
    end: float
    setback: float
    facade: int  # index into the street's facades; -1: nothing built
    scale: float  # of the facade's height
    flip: bool
    boundary: str  # what stands at the pavement's end: "", fence, railing, hedge


@dataclass(frozen=True)
class Fixture:
    """A thing on the pavement: lamp, sign, lights, tree, bollard, bush, crossing or barrier."""

    kind: str
    side: int
    x: float
    s: float
    variant: int
    size: float


Key = tuple[int, ...]


@dataclass(frozen=True)
class Car:
    """Parked or moving; ``heading`` in radians, 0 is along the street. It has the same ``key`` in
    every frame, and no other object has it."""

    x: float
    s: float
    heading: float
    shape: int
    paint: int
    key: Key = ()


def shape_of(number: int) -> int:
    """Vans and buses are rare among a hundred drawn numbers."""
    return 6 if number >= 97 else 5 if number >= 88 else number % 5


@dataclass(frozen=True)
class Person:
    height: float
    coat: int
    legs: int
    skin: int
    phase: float
    bag: bool


def draw_person(rng: np.random.Generator) -> Person:
    return Person(
        rng.uniform(1.5, 1.9), int(rng.integers(len(CLOTHES))), int(rng.integers(len(CLOTHES))),
        int(rng.integers(len(SKIN))), rng.uniform(0, 6.28), bool(rng.random() < 0.35),
    )  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A walker or cyclist; ``phase`` is that of the step, or of the pedals, in radians. ``key`` is
    as a car's."""

    x: float
    s: float
    heading: float
    person: Person
    cycling: bool = False
    phase: float = 0.0
    key: Key = ()


@dataclass
class Block:
    plots: list[Plot] = field(default_factory=list)
    fixtures: list[Fixture] = field(default_factory=list)
    parked: list[Car] = field(default_factory=list)
    junction: tuple[float, float, int] | None = None  # start, end, and side (0: both)
    crossing: float | None = None

    def mouth(self, side: int) -> tuple[float, float] | None:
        """Start and end of the road that begins on a side (-1 left, +1 right)."""
        return None if self.junction is None or self.junction[2] == -side else self.junction[:2]

    def in_mouth(self, side: int, start: float, end: float) -> bool:
        mouth = self.mouth(side)
        return mouth is not None and start < mouth[1] and end > mouth[0]


def build_block(seed: int, layout: Layout, number: int) -> Block:
    rng = generator(seed, 101, number)
    zone = generator(seed, 102, number // 5)
    weights = np.array(layout.mix) * zone.uniform(0.2, 1.8, 4)
    style = int(zone.choice(4, p=weights / weights.sum()))
    block, base = Block(), number * BLOCK
    if number % 4 == 2 and rng.random() < 0.75:
        middle, half = base + rng.uniform(9, 14), rng.uniform(3.2, 4.5)
        block.junction = (middle - half, middle + half, int(rng.integers(-1, 2)))
    elif number % 3 == 1 and rng.random() < 0.5:
        block.crossing = base + rng.uniform(6, 18)
    for side in (-1, 1):
        _fill_side(block, rng, base, side, layout, style)
        _furnish(block, rng, base, side, layout, style)
    return block


def _fill_side(
    block: Block, rng: np.random.Generator, base: float, side: int, layout: Layout, style: int
) -> None:
    facades = layout.facades
    park, mouth = layout.park_side == side, block.mouth(side)
    setback = 0.0 if style in (0, 1) and rng.random() < 0.75 else rng.uniform(1.5, 5.0)
    s = base
    while s < base + BLOCK - 0.5:
        length = float(rng.uniform(6.0, 12.0)) + (4.0 if style == 2 else 0.0)
        end = min(s + length, base + BLOCK)
        if base + BLOCK - end < 4.0:
            end = base + BLOCK
        stretches = [(s, end)]
        if mouth is not None:
            stretches = [(s, min(end, mouth[0] - 1.5)), (max(s, mouth[1] + 1.5), end)]
        for start, stop in stretches:
            if stop - start < 1.5:
                continue
            empty = rng.random() < (0.8 if park else 0.08 + 0.12 * (style == 3))
            kind = style if rng.random() < 0.85 else int(rng.integers(4))
            number = sum(facades[:kind]) + int(rng.integers(facades[kind]))
            boundary = ""
            if empty or setback > 1.0:
                kinds = ("fence", "railing", "hedge", "")
                boundary = str(rng.choice(kinds, p=[0.3, 0.3, 0.3, 0.1]))
            block.plots.append(
                Plot(
                    side, start, stop, setback, -1 if empty else number,
                    float(rng.uniform(0.85, 1.15)), bool(rng.random() < 0.5), boundary,
                )
            )  # fmt: skip
            if empty or (setback > 1.0 and rng.random() < 0.7 * layout.trees):
                for _ in range(1 + 2 * empty):
                    x = layout.wall(side) + side * rng.uniform(0.8, 2.0 + 6.0 * empty)
                    place = float(rng.uniform(start + 0.5, stop - 0.5))
                    kind_name = "tree" if rng.random() < 0.75 else "bush"
                    variant, size = int(rng.integers(8)), rng.uniform(0.8, 1.5)
                    block.fixtures.append(Fixture(kind_name, side, x, place, variant, size))
        s = end


def _furnish(
    block: Block, rng: np.random.Generator, base: float, side: int, layout: Layout, style: int
) -> None:
    kerb = layout.kerb(side)
    edge = kerb + side * 0.45

    def put(kind: str, s: float, x: float = edge, size: float = 1.0) -> None:
        if not block.in_mouth(side, s - 1.0, s + 1.0):
            block.fixtures.append(Fixture(kind, side, x, s, int(rng.integers(1 << 16)), size))

    if rng.random() < 0.75:
        place = base + (4.0 if side < 0 else 16.0) + rng.uniform(-1, 1)
        put("lamp", place, size=rng.uniform(0.85, 1.1))
    if rng.random() < 0.75 * layout.signs:
        put("sign", base + rng.uniform(1, 23))
    if rng.random() < 0.3 * layout.signs:
        put("sign", base + rng.uniform(1, 23), layout.wall(side) - side * 0.4, 1.2)
    for s in np.arange(base + 2.0, base + BLOCK, 8.0):
        if rng.random() < 0.55 * layout.trees * (0.4 if style == 1 else 1.0):
            put("tree", float(s + rng.uniform(0, 5)), kerb + side * 0.8, rng.uniform(0.7, 1.2))
    if rng.random() < 0.25:
        start = base + rng.uniform(0, 12)
        for k in range(int(rng.integers(3, 7))):
            put("bollard", start + 1.6 * k)
    if rng.random() < 0.18:
        put("barrier", base + rng.uniform(4, 14), edge, rng.uniform(4, 9))
    if block.junction is not None:
        put("lights", block.junction[0] - 1.6)
        put("sign", block.junction[1] + 1.4, edge, 1.2)
    if block.crossing is not None and int(block.crossing) % 3 == 0:
        put("lights", block.crossing - 0.6)
    if layout.parking[side > 0]:
        s = base + 1.0
        while s < base + BLOCK - 4.0:
            near = block.crossing is not None and abs(s + 2.3 - block.crossing) < 6.5
            blocked = near or block.in_mouth(side, s - 3.0, s + 7.0)
            if not blocked and rng.random() < layout.parked:
                x = kerb - side * rng.uniform(0.95, 1.2)
                heading = 0.0 if side == layout.side or rng.random() < 0.3 else np.pi
                look, paint = int(rng.integers(100)), int(rng.integers(100))
                heading += rng.normal(0, 0.02)
                key = (0, round(base / BLOCK), len(block.parked))
                block.parked.append(Car(x, s + 2.3, heading, shape_of(look), paint, key))
            s += rng.uniform(5.0, 6.2)
    mouth = block.mouth(side)
    if mouth is not None and rng.random() < 0.6:
        lane = 0.5 * (mouth[0] + mouth[1]) + layout.side * side * 1.6
        x = layout.wall(side) + side * rng.uniform(2.0, 4.0)
        look, paint = int(rng.integers(80)), int(rng.integers(100))
        key = (0, round(base / BLOCK), len(block.parked))
        block.parked.append(Car(x, lane, -side * np.pi / 2, shape_of(look), paint, key))


@dataclass(frozen=True)
class _Stream:
    number: int
    speed: float  # along s, signed
    spacing: float
    x: tuple[float, float]
    kind: str  # car, walker, cyclist


@dataclass(frozen=True)
class _Member:
    present: float
    jitter: float
    lateral: float
    shape: int
    paint: int
    person: Person


class Traffic:
    def __init__(self, seed: int, layout: Layout, reach: float) -> None:
        self._seed, self._layout, self._reach = seed, layout, reach
        self._member = lru_cache(maxsize=1024)(self._draw_member)
        side, lane = layout.side, layout.lane
        rng = generator(seed, 200)
        other = -side * lane * 0.52
        edge, slack = lane - 0.45, lane - 0.75
        streams = [
            _Stream(0, -layout.speed * rng.uniform(0.8, 1.1), 26.0 / layout.traffic,
                    (other - 0.15, other + 0.15), "car"),
            _Stream(1, 4.6, 55.0 / layout.cyclists, (side * edge, side * slack), "cyclist"),
            _Stream(2, -4.9, 80.0 / layout.cyclists, (-side * edge, -side * slack), "cyclist"),
        ]  # fmt: skip
        for k, way in enumerate((-1, 1)):
            low, high = layout.kerb(way) + way * 0.9, layout.wall(way) - way * 0.35
            for j, speed in enumerate((1.35, -1.25)):
                spacing = 13.0 / layout.people
                streams.append(_Stream(10 + 2 * k + j, speed, spacing, (low, high), "walker"))
        self._streams = streams
        self._leads = [
            (gap * rng.uniform(0.8, 1.3), rng.uniform(0, 6.28), int(rng.integers(100)),
             int(rng.integers(100)))
            for gap in (13.0, 30.0, 55.0)
            if rng.random() < 0.5 * layout.traffic
        ]  # fmt: skip

    def around(self, s: float, time: float) -> list[Car | Figure]:
        return [*self._lead_cars(s, time), *self._streaming(s, time), *self._crossing(s, time)]

    def _lead_cars(self, s: float, time: float) -> Iterator[Car]:
        x = self._layout.side * self._layout.lane * 0.5
        for k, (gap, phase, shape, paint) in enumerate(self._leads):
            ahead = gap * (1.0 + 0.25 * np.sin(0.21 * time / (k + 1) + phase)) + 4.0
            yield Car(x, s + float(ahead), 0.0, shape_of(shape), paint, (1, k))

    def _streaming(self, s: float, time: float) -> Iterator[Car | Figure]:
        for stream in self._streams:
            drift = stream.speed * time
            first = int(np.floor((s - 4.0 - drift) / stream.spacing)) - 1
            last = int(np.ceil((s + self._reach - drift) / stream.spacing)) + 1
            for k in range(first, last):
                member = self._member(stream.number, k)
                if member.present < 0.3:
                    continue
                place = (k + 0.6 * member.jitter) * stream.spacing + drift
                x = stream.x[0] + (stream.x[1] - stream.x[0]) * member.lateral
                heading = 0.0 if stream.speed > 0 else np.pi
                key = (2, stream.number, k)
                if stream.kind == "car":
                    yield Car(x, place, heading, member.shape, member.paint, key)
                else:
                    cycling = stream.kind == "cyclist"
                    # Two steps, or one turn of the pedals, for each stretch of way.
                    phase = abs(drift) * (1.1 if cycling else 4.2) % (2 * np.pi)
                    yield Figure(x, place, heading, member.person, cycling, float(phase), key)

    def _crossing(self, s: float, time: float) -> Iterator[Figure]:
        """People who cross the road well ahead, from kerb to kerb and back again."""
        left, right = self._layout.wall(-1) + 0.5, self._layout.wall(1) - 0.5
        spacing = 70.0 / self._layout.people
        for k in range(int(s // spacing), int((s + self._reach) // spacing) + 1):
            member = self._member(90, k)
            place = (k + 0.6 * member.jitter) * spacing
            # They are over by the time the camera comes: the way left to it sets their place.
            left_over = (place - s - 6.0) / 45.0 + 0.5 * member.lateral - 0.25
            share = float(np.clip(1.0 - left_over, 0.0, 1.0))
            share = share if member.present < 0.65 else 1.0 - share
            moving = 0.0 < share < 1.0
            heading = np.pi / 2 if member.present < 0.65 else -np.pi / 2
            phase = share * (right - left) * 4.2 if moving else 0.0
            x = left + (right - left) * share
            yield Figure(x, place, heading, member.person, phase=phase, key=(3, k))

    def _draw_member(self, stream: int, k: int) -> _Member:
        rng = generator(self._seed, 201, stream, k)
        return _Member(
            rng.random(), rng.random(), rng.random(), shape_of(int(rng.integers(100))),
            int(rng.integers(100)), draw_person(rng),
        )  # fmt: skip
