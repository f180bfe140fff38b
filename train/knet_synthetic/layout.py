"""What one street is like throughout: widths, habits, densities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from knet_synthetic.camera import Curve

BAY = 2.1  # metres of road that a row of parked cars takes


@dataclass(frozen=True)
class Layout:
    """Lateral places in metres from the line between the two lanes; `side` is where one drives:
    -1 left, +1 right. `parking` and `pavement` are (left, right)."""

    side: int
    lane: float
    parking: tuple[bool, bool]
    pavement: tuple[float, float]
    curve: Curve
    mix: tuple[float, float, float, float]  # terrace, high street, office, suburb
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
        mix=(float(lean[0]), float(lean[1]), float(lean[2]), float(lean[3])),
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
