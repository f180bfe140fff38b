"""All that moves: streams of like things, each an endless lattice in its own moving frame."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from knet_synthetic.cars import shape_of
from knet_synthetic.layout import Layout
from knet_synthetic.noise import generator
from knet_synthetic.people import Person, draw_person


@dataclass(frozen=True)
class Mover:
    x: float
    s: float
    heading: float
    person: Person | None  # None: a car
    cycling: bool = False
    phase: float = 0.0
    shape: int = 0
    paint: int = 0


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
                streams.append(
                    _Stream(10 + 2 * k + j, speed, 13.0 / layout.people, (low, high), "walker")
                )
        self._streams = streams
        self._leads = [
            (gap * rng.uniform(0.8, 1.3), rng.uniform(0, 6.28), int(rng.integers(100)),
             int(rng.integers(100)))
            for gap in (13.0, 30.0, 55.0)
            if rng.random() < 0.5 * layout.traffic
        ]  # fmt: skip

    def around(self, s: float, time: float) -> list[Mover]:
        return [*self._lead_cars(s, time), *self._streaming(s, time), *self._crossing(s, time)]

    def _lead_cars(self, s: float, time: float) -> Iterator[Mover]:
        x = self._layout.side * self._layout.lane * 0.5
        for k, (gap, phase, shape, paint) in enumerate(self._leads):
            ahead = gap * (1.0 + 0.25 * np.sin(0.21 * time / (k + 1) + phase)) + 4.0
            yield Mover(x, s + float(ahead), 0.0, None, shape=shape_of(shape), paint=paint)

    def _streaming(self, s: float, time: float) -> Iterator[Mover]:
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
                if stream.kind == "car":
                    yield Mover(x, place, heading, None, shape=member.shape, paint=member.paint)
                else:
                    cycling = stream.kind == "cyclist"
                    # Two steps, or one turn of the pedals, for each stretch of way.
                    phase = abs(drift) * (1.1 if cycling else 4.2) % (2 * np.pi)
                    yield Mover(x, place, heading, member.person, cycling, float(phase))

    def _crossing(self, s: float, time: float) -> Iterator[Mover]:
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
            yield Mover(left + (right - left) * share, place, heading, member.person, False, phase)

    def _draw_member(self, stream: int, k: int) -> _Member:
        rng = generator(self._seed, 201, stream, k)
        return _Member(
            rng.random(), rng.random(), rng.random(), shape_of(int(rng.integers(100))),
            int(rng.integers(100)), draw_person(rng),
        )  # fmt: skip
