"""Cars, vans and buses: some thirty polygons each, lit by the way they face."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np

from knet_synthetic.canvas import CAR, NEAR, Array, Camera, Canvas, placed
from knet_synthetic.layout import Car
from knet_synthetic.sky import Climate, Vector

PAINTS = (
    (188, 190, 194), (150, 154, 160), (40, 42, 46), (26, 28, 32), (222, 222, 220), (96, 100, 106),
    (30, 48, 92), (58, 88, 132), (132, 26, 28), (166, 40, 34), (30, 70, 54), (176, 160, 128),
    (226, 190, 60), (110, 70, 52), (210, 212, 214),
)  # fmt: skip
TYRE, ARCH, GRILLE, RIM, HUB, GLASS = np.array(
    ((30.0, 30, 32), (24, 24, 26), (34, 34, 36), (150, 152, 156), (70, 72, 76), (52, 60, 68))
)
GROUND = 0.24  # metres under a car


@dataclass(frozen=True)
class Shape:
    """Metres. `hood` and `boot` are lengths at belt height before and behind the cabin."""

    length: float
    width: float
    height: float
    belt: float
    hood: float
    boot: float
    rake: float  # how far the windscreen's top lies behind its foot
    rear_rake: float  # the same of the rear window
    nose: float  # height of the bonnet's front edge
    wheel: float


SHAPES = (
    Shape(3.9, 1.68, 1.46, 0.90, 1.00, 0.10, 0.75, 0.35, 0.70, 0.31),  # hatchback
    Shape(4.2, 1.75, 1.47, 0.92, 1.10, 0.12, 0.80, 0.50, 0.72, 0.32),
    Shape(4.6, 1.78, 1.43, 0.92, 1.20, 0.85, 0.85, 0.70, 0.72, 0.32),  # saloon
    Shape(4.6, 1.80, 1.48, 0.93, 1.15, 0.08, 0.80, 0.35, 0.74, 0.32),  # estate
    Shape(4.5, 1.85, 1.72, 1.05, 1.05, 0.10, 0.65, 0.30, 0.88, 0.37),  # off-roader
    Shape(5.2, 1.95, 2.20, 1.20, 0.75, 0.05, 0.70, 0.05, 0.95, 0.35),  # van
    Shape(9.5, 2.45, 3.10, 1.35, 0.05, 0.05, 0.20, 0.05, 1.20, 0.46),  # bus
)


class _Face(NamedTuple):
    first: int
    last: int
    seen: str  # from where: left, right, front, rear, always, above
    colour: Array


class _Body:
    """The ``points`` [N, 3] and ``faces`` of a car; local axes are x right, y up, z forward."""

    def __init__(
        self, climate: Climate, shape: int, paint: int, quarter: int, fade: float, dim: float,
        fine: bool,
    ) -> None:  # fmt: skip
        self.climate, self.quarter, self.fade, self.dim = climate, quarter, fade, dim
        self.shape, self.paint, self.fine = SHAPES[shape], np.array(PAINTS[paint], float), fine
        self.bus, self.van = shape == 6, shape == 5
        self.half, self.end = self.shape.width / 2, self.shape.length / 2
        self.chamfer = 0.05 if self.bus else 0.16
        self.corners: list[Vector] = []
        self.faces: list[_Face] = []
        self._sides()
        self._ends()
        self._cabin()
        self.points = np.array(self.corners)

    def _face(self, seen: str, colour: Array, normal: Vector, *corners: Vector) -> None:
        x, y, z = normal
        for _ in range(self.quarter):
            x, z = z, -x
        self._glow(seen, colour * (self.climate.shade((x, y, z)) * self.dim), *corners)

    def _glow(self, seen: str, colour: Array, *corners: Vector) -> None:
        """A face that needs no light."""
        first = len(self.corners)
        self.corners.extend(corners)
        tone = self.climate.through_haze(colour, self.fade)
        self.faces.append(_Face(first, len(self.corners), seen, tone))

    def _plate(
        self, seen: str, colour: Array, way: float, z: float, left: float, right: float,
        low: float, high: float, glow: bool = False,
    ) -> None:  # fmt: skip
        corners = ((left, low, z), (right, low, z), (right, high, z), (left, high, z))
        if glow:
            self._glow(seen, colour, *corners)
        else:
            self._face(seen, colour, (0, 0.1, way), *corners)

    def _sides(self) -> None:
        """What is below the windows, and the wheels."""
        f, paint, half, end = self.shape, self.paint, self.half, self.end
        for name, way in (("rear", -1.0), ("front", 1.0)):
            # Under the bumper: darkness between the tyres.
            self._plate(name, TYRE * 0.5, way, way * (end - 0.25), -half * 0.9, half * 0.9, 0.02,
                        GROUND + 0.05, glow=True)  # fmt: skip
        low, high, long, hood = GROUND, f.belt, end - self.chamfer, end - f.hood
        nose = f.belt if self.bus or self.van else f.nose
        for name, way in (("left", -1.0), ("right", 1.0)):
            x = way * half
            self._face(name, paint, (way, 0.15, 0), (x, low, -long), (x, low, long),
                       (x, nose, long), (x, high, hood), (x, high, -long))  # fmt: skip
            self._face(name, paint * 0.72, (way, -0.2, 0), (x, low, -long), (x, low, long),
                       (x, low + 0.28, long), (x, low + 0.28, -long))  # fmt: skip
            if self.fine:
                self._face(name, np.minimum(paint * 1.12 + 12, 255), (way, 0.5, 0),
                           (x, high - 0.16, -long), (x, high - 0.16, hood),
                           (x, high - 0.06, hood), (x, high - 0.06, -long))  # fmt: skip
                for z in (0.05 * f.length, -0.17 * f.length):  # the doors' joints
                    self._face(name, paint * 0.5, (way, 0, 0), (x, 0.4, z), (x, 0.4, z + 0.025),
                               (x, high, z + 0.025), (x, high, z))  # fmt: skip
            for z in (end * 0.62, -end * 0.62):
                self._disc(name, ARCH, x, f.wheel + 0.03, z, f.wheel + 0.06, 12)
                self._disc(name, TYRE, x, f.wheel, z, f.wheel, 12)
                if self.fine:
                    self._disc(name, RIM, x, f.wheel, z, f.wheel * 0.62, 8)
                    self._disc(name, HUB, x, f.wheel, z, f.wheel * 0.22, 6)

    def _disc(
        self, seen: str, colour: Array, x: float, y: float, z: float, radius: float, sides: int
    ) -> None:
        angles = np.arange(sides) * (2 * np.pi / sides)
        ring = [
            (x, max(0.0, y + radius * float(np.sin(a))), z + radius * float(np.cos(a)))
            for a in angles
        ]
        self._face(seen, colour, (1.0 if x > 0 else -1.0, 0.2, 0), *ring)

    def _ends(self) -> None:
        """Front and rear below the windows, with lamps and number plates, and what leads up to the
        cabin."""
        f, half, end, chamfer = self.shape, self.half, self.end, self.chamfer
        boxy, lit = self.bus or self.van, self.climate.lamps_lit
        inner = half - chamfer
        bumper = GRILLE if self.paint.sum() < 200 else self.paint * 0.6
        # Where a lamp begins, its reach below and above its middle, and its colour.
        red = np.array((190.0, 24, 22)) if lit else np.array((150.0, 26, 26)) * 0.9
        white = np.array((255.0, 250, 225)) if lit else np.array((205.0, 210, 216))
        lamps = {"rear": (0.72, 0.14, 0.14, red), "front": (0.62, 0.05, 0.12, white)}
        for name, way in (("rear", -1.0), ("front", 1.0)):
            top = f.belt if way < 0 or boxy else f.nose
            z = way * end
            for edge in (-1.0, 1.0):
                back = z - way * chamfer
                self._face(name, self.paint, (edge * 0.7, 0.1, way * 0.7),
                           (edge * inner, GROUND, z), (edge * half, GROUND, back),
                           (edge * half, top, back), (edge * inner, top, z))  # fmt: skip
            self._plate(name, self.paint, way, z, -inner, inner, GROUND, top)
            self._plate(name, bumper, way, z, -inner, inner, GROUND, GROUND + 0.2)
            start, below, above, tone = lamps[name]
            middle = top - 0.2
            for edge in (-1, 1):
                left, right = sorted((edge * inner * start, edge * (half - 0.04)))
                self._plate(name, tone, way, z, left, right, middle - below, middle + above, lit)
            if self.fine:
                if way > 0:
                    self._plate(name, GRILLE, way, z, -0.42, 0.42, middle - 0.06, middle + 0.08)
                tag = np.array((214.0, 186, 60)) if way < 0 else np.array((224.0, 224, 220))
                self._plate(name, tag, way, z, -0.26, 0.26, GROUND + 0.24, GROUND + 0.35)
        if not boxy:
            slopes = ((1.0, f.nose, end - f.hood), (-1.0, f.belt, -end + f.boot + 0.1))
            for way, low, foot in slopes:
                z, corner = way * end, way * (end - chamfer)
                self._face("always", self.paint, (0, 1, 0.2 * way), (-half, low, corner),
                           (-inner, low, z), (inner, low, z), (half, low, corner),
                           (half, f.belt, foot), (-half, f.belt, foot))  # fmt: skip

    def _cabin(self) -> None:
        f, paint, half, bus, van = self.shape, self.paint, self.half, self.bus, self.van
        foot, rear = self.end - f.hood, -self.end + f.boot
        top_front, top_rear = foot - f.rake, rear + f.rear_rake
        lean = 0.05 if bus or van else 0.2
        roof = half - lean
        low, high = f.belt, f.height

        def pane(
            way: float, start: float, stop: float, under: float = 0.08, over: float = 0.86
        ) -> Iterator[Vector]:
            """A pane of the cabin's side, as shares of its length (from the front) and height."""
            a, b = way * half, way * roof
            for along, up in ((start, under), (stop, under), (stop, over), (start, over)):
                front, back = foot + (top_front - foot) * up, rear + (top_rear - rear) * up
                yield a + (b - a) * up, low + (high - low) * up, front + (back - front) * along

        panes = [(0.06, 0.49), (0.53, 0.95)]
        if bus:
            panes = [(0.03 + 0.16 * k, 0.17 + 0.16 * k) for k in range(6)]
        elif van:
            panes = [(0.06, 0.30)]
        if not self.fine:
            panes = [(panes[0][0], panes[-1][1])]
        for name, way in (("left", -1.0), ("right", 1.0)):
            a, b = way * half, way * roof
            self._face(name, paint, (way, 0.35, 0), (a, low, rear), (a, low, foot),
                       (b, high, top_front), (b, high, top_rear))  # fmt: skip
            for start, stop in panes:
                self._face(name, GLASS, (way, 0.6, 0), *pane(way, start, stop))
                if self.fine and not bus:
                    shine = pane(way, start + 0.03, stop - 0.03, 0.62)
                    self._face(name, GLASS * 1.9, (way, 0.6, 0), *shine)
        for name, bottom, top, way, slope in (
            ("rear", rear, top_rear, -1.0, 0.4), ("front", foot, top_front, 1.0, 0.7)
        ):  # fmt: skip
            self._face(name, paint, (0, slope, way), (-half, low, bottom), (half, low, bottom),
                       (roof, high, top), (-roof, high, top))  # fmt: skip
            if van and way < 0:
                continue
            for share, tone in ((0.0, GLASS), (0.55, GLASS * 1.7))[: 2 if self.fine else 1]:
                y0, y1 = low + (0.06 + 0.86 * share) * (high - low), low + 0.88 * (high - low)
                t0, t1 = (y0 - low) / (high - low), (y1 - low) / (high - low)
                w0, w1 = half - lean * t0 - 0.1, half - lean * t1 - 0.08
                z0, z1 = bottom + (top - bottom) * t0, bottom + (top - bottom) * t1
                self._face(name, tone, (0, slope, way), (-w0, y0, z0), (w0, y0, z0),
                           (w1, y1, z1), (-w1, y1, z1))  # fmt: skip
        self._face("above", paint, (0, 1, 0), (-roof, high, top_front), (roof, high, top_front),
                   (roof, high, top_rear), (-roof, high, top_rear))  # fmt: skip


class Cars:
    """All bodies of one street; one is made for each shape, paint and heading once."""

    def __init__(self, climate: Climate) -> None:
        self._climate = climate
        self._body = lru_cache(maxsize=256)(partial(_Body, climate))

    def draw(self, canvas: Canvas, camera: Camera, car: Car, dim: float) -> None:
        """``dim`` is 1 in the open and less in a cast shadow."""
        kind, x, s, heading = SHAPES[car.shape], car.x, car.s, car.heading
        _, _, scale = camera.point(x, max(s, camera.s + 1.5 * NEAR))
        quarter = round(heading / (np.pi / 2)) % 4
        fade = round(self._climate.fade(camera.focal / scale) * 16) / 16
        fine = scale * kind.height > 26
        body = self._body(car.shape, car.paint % len(PAINTS), quarter, fade, dim, fine)
        points = placed(body.points, x, s, heading)
        view = camera.view(points)
        passing = float(view[:, 2].min()) < NEAR
        if passing:
            view[:, 2] = np.maximum(view[:, 2], NEAR)  # only faces that are cut need more care
        fixed = np.rint(camera.screen(view) * 16).astype(np.int32)
        if fixed[:, 0].max() < 0 or fixed[:, 0].min() > canvas.width * 16:
            return
        dx, ds = camera.x - x - camera.bend_at(s - camera.s), camera.s - s
        sin, cos = np.sin(heading), np.cos(heading)
        right, ahead = dx * cos - ds * sin, dx * sin + ds * cos
        seen = {"always"}
        if abs(right) > kind.width / 2:
            seen.add("right" if right > 0 else "left")
        if abs(ahead) > kind.length / 2 - 0.3:
            seen.add("front" if ahead > 0 else "rear")
        if camera.height > kind.height:
            seen.add("above")
        for face in body.faces:
            if face.seen not in seen:
                continue
            if passing:
                canvas.polygon(camera.polygon(points[face.first : face.last]), face.colour, CAR)
            else:
                canvas.fill(fixed[face.first : face.last], face.colour, CAR)
