"""Cars, vans and buses: some thirty polygons each, lit by the way they face."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from knet_synthetic.canvas import CAR, NEAR, Array, Camera, Canvas, placed
from knet_synthetic.sky import Climate, Vector

PAINTS = (
    (188, 190, 194), (150, 154, 160), (40, 42, 46), (26, 28, 32), (222, 222, 220), (96, 100, 106),
    (30, 48, 92), (58, 88, 132), (132, 26, 28), (166, 40, 34), (30, 70, 54), (176, 160, 128),
    (226, 190, 60), (110, 70, 52), (210, 212, 214),
)  # fmt: skip


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


def shape_of(number: int) -> int:
    """Vans and buses are rare among a hundred drawn numbers."""
    return 6 if number >= 97 else 5 if number >= 88 else number % 5


@dataclass(frozen=True)
class Face:
    first: int
    last: int
    seen: str  # from where: left, right, front, rear, always, above
    colour: Array


@dataclass(frozen=True)
class Model:
    points: Array
    faces: tuple[Face, ...]


class BodyBuilder:
    """Local axes: x right, y up, z forward."""

    def __init__(
        self, climate: Climate, body: Shape, paint: tuple[int, int, int], quarter: int,
        fade: float, dim: float,
    ) -> None:  # fmt: skip
        self.climate, self.body, self.paint = climate, body, np.array(paint, float)
        self.quarter, self.fade, self.dim = quarter, fade, dim
        self.points: list[Vector] = []
        self.faces: list[Face] = []

    def face(self, seen: str, colour: Array, normal: Vector, *points: Vector) -> None:
        x, y, z = normal
        for _ in range(self.quarter):
            x, z = z, -x
        light = self.climate.shade((x, y, z)) * self.dim
        self.glow(seen, colour * light, *points)

    def glow(self, seen: str, colour: Array, *points: Vector) -> None:
        """A face that needs no light."""
        tone = self.climate.through_haze(colour, self.fade)
        first = len(self.points)
        self.points.extend(points)
        self.faces.append(Face(first, len(self.points), seen, tone))

    def build(self, fine: bool, bus: bool, van: bool) -> Model:
        f = self.body
        half, end, ground = f.width / 2, f.length / 2, 0.24
        dark, glass = np.array((30.0, 30, 32)), np.array((52.0, 60, 68))
        shut = np.array((24.0, 24, 26))
        axle = end * 0.62
        for name, way in (("rear", -1.0), ("front", 1.0)):
            # Under the bumper: darkness between the tyres.
            z = way * (end - 0.25)
            self.glow(name, dark * 0.5, (-half * 0.9, 0.02, z), (half * 0.9, 0.02, z),
                      (half * 0.9, ground + 0.05, z), (-half * 0.9, ground + 0.05, z))  # fmt: skip
        chamfer = 0.16 if not bus else 0.05
        for name, way in (("left", -1.0), ("right", 1.0)):
            x = way * half
            low, high, long = ground, f.belt, end - chamfer
            front_top = f.nose if not (bus or van) else f.belt
            self.face(name, self.paint, (way, 0.15, 0), (x, low, -long), (x, low, long),
                      (x, front_top, long), (x, high, end - f.hood), (x, high, -long))  # fmt: skip
            self.face(name, self.paint * 0.72, (way, -0.2, 0), (x, low, -long), (x, low, long),
                      (x, low + 0.28, long), (x, low + 0.28, -long))  # fmt: skip
            if fine:
                self.face(name, np.minimum(self.paint * 1.12 + 12, 255), (way, 0.5, 0),
                          (x, high - 0.16, -long), (x, high - 0.16, end - f.hood),
                          (x, high - 0.06, end - f.hood), (x, high - 0.06, -long))  # fmt: skip
                for z in (0.05 * f.length, -0.17 * f.length):  # the doors' joints
                    self.face(name, self.paint * 0.5, (way, 0, 0), (x, 0.4, z), (x, 0.4, z + 0.025),
                              (x, high, z + 0.025), (x, high, z))  # fmt: skip
            for z in (axle, -axle):
                self._disc(name, shut, x, f.wheel + 0.03, z, f.wheel + 0.06, 12)
                self._disc(name, dark, x, f.wheel, z, f.wheel, 12)
                if fine:
                    self._disc(name, np.array((150.0, 152, 156)), x, f.wheel, z, f.wheel * 0.62, 8)
                    self._disc(name, np.array((70.0, 72, 76)), x, f.wheel, z, f.wheel * 0.22, 6)
        self._ends(fine, bus, van, half, end, ground, chamfer)
        self._cabin(fine, bus, van, half, end, glass)
        return Model(np.array(self.points), tuple(self.faces))

    def _disc(
        self, seen: str, colour: Array, x: float, y: float, z: float, radius: float, sides: int
    ) -> None:
        angles = np.arange(sides) * (2 * np.pi / sides)
        ring = [
            (x, max(0.0, y + radius * float(np.sin(a))), z + radius * float(np.cos(a)))
            for a in angles
        ]
        self.face(seen, colour, (1.0 if x > 0 else -1.0, 0.2, 0), *ring)

    def _ends(
        self, fine: bool, bus: bool, van: bool, half: float, end: float, ground: float,
        chamfer: float,
    ) -> None:  # fmt: skip
        f = self.body
        inner = half - chamfer
        dark = np.array((34.0, 34, 36))
        for name, way in (("rear", -1.0), ("front", 1.0)):
            top = f.belt if way < 0 or bus or van else f.nose
            z = way * end
            for edge in (-1.0, 1.0):
                back = z - way * chamfer
                self.face(name, self.paint, (edge * 0.7, 0.1, way * 0.7),
                          (edge * inner, ground, z), (edge * half, ground, back),
                          (edge * half, top, back), (edge * inner, top, z))  # fmt: skip
            self._plate(name, self.paint, way, z, -inner, inner, ground, top)
            self._plate(name, dark if self.paint.sum() < 200 else self.paint * 0.6, way, z,
                        -inner, inner, ground, ground + 0.2)  # fmt: skip
            lamp = top - 0.2
            lit = self.climate.lamps_lit
            if way < 0:
                red = np.array((190.0, 24, 22)) if lit else np.array((150.0, 26, 26)) * 0.9
                for edge in (-1, 1):
                    span = sorted((edge * inner * 0.72, edge * (half - 0.04)))
                    self._plate(name, red, way, z, span[0], span[1], lamp - 0.14, lamp + 0.14,
                                glow=lit)  # fmt: skip
            else:
                white = np.array((255.0, 250, 225)) if lit else np.array((205.0, 210, 216))
                for edge in (-1, 1):
                    span = sorted((edge * inner * 0.62, edge * (half - 0.04)))
                    self._plate(name, white, way, z, span[0], span[1], lamp - 0.05, lamp + 0.12,
                                glow=lit)  # fmt: skip
                if fine:
                    self._plate(name, dark, way, z, -0.42, 0.42, lamp - 0.06, lamp + 0.08)
            if fine:
                tag = np.array((214.0, 186, 60)) if way < 0 else np.array((224.0, 224, 220))
                self._plate(name, tag, way, z, -0.26, 0.26, ground + 0.24, ground + 0.35)
        if not (bus or van):
            for way, low, foot in (
                (1.0, f.nose, end - f.hood),
                (-1.0, f.belt, -end + f.boot + 0.1),
            ):
                z, corner = way * end, way * (end - chamfer)
                self.face("always", self.paint, (0, 1, 0.2 * way), (-half, low, corner),
                          (-inner, low, z), (inner, low, z), (half, low, corner),
                          (half, f.belt, foot), (-half, f.belt, foot))  # fmt: skip

    def _plate(
        self, seen: str, colour: Array, way: float, z: float, left: float, right: float,
        low: float, high: float, glow: bool = False,
    ) -> None:  # fmt: skip
        corners = ((left, low, z), (right, low, z), (right, high, z), (left, high, z))
        if glow:
            self.glow(seen, colour, *corners)
        else:
            self.face(seen, colour, (0, 0.1, way), *corners)

    def _cabin(
        self, fine: bool, bus: bool, van: bool, half: float, end: float, glass: Array
    ) -> None:
        f = self.body
        foot, rear = end - f.hood, -end + f.boot
        top_front, top_rear = foot - f.rake, rear + f.rear_rake
        lean = 0.05 if bus or van else 0.2
        roof = half - lean
        low, high = f.belt, f.height
        for name, way in (("left", -1.0), ("right", 1.0)):
            a, b = way * half, way * roof
            self.face(name, self.paint, (way, 0.35, 0), (a, low, rear), (a, low, foot),
                      (b, high, top_front), (b, high, top_rear))  # fmt: skip
            panes = [(0.06, 0.49), (0.53, 0.95)]
            if bus:
                panes = [(0.03 + 0.16 * k, 0.17 + 0.16 * k) for k in range(6)]
            elif van:
                panes = [(0.06, 0.30)]
            for start, stop in panes if fine else [(panes[0][0], panes[-1][1])]:
                pane = self._pane(a, b, low, high, foot, rear, top_front, top_rear, start, stop)
                self.face(name, glass, (way, 0.6, 0), *pane)
                if fine and not bus:
                    self.face(name, glass * 1.9, (way, 0.6, 0),
                              *self._pane(a, b, low, high, foot, rear, top_front, top_rear,
                                          start + 0.03, stop - 0.03, 0.62, 0.86))  # fmt: skip
        for name, bottom, top, way, slope in (
            ("rear", rear, top_rear, -1.0, 0.4), ("front", foot, top_front, 1.0, 0.7)
        ):  # fmt: skip
            self.face(name, self.paint, (0, slope, way), (-half, low, bottom), (half, low, bottom),
                      (roof, high, top), (-roof, high, top))  # fmt: skip
            if van and way < 0:
                continue
            for share, tone in ((0.0, glass), (0.55, glass * 1.7))[: 2 if fine else 1]:
                y0, y1 = low + (0.06 + 0.86 * share) * (high - low), low + 0.88 * (high - low)
                t0, t1 = (y0 - low) / (high - low), (y1 - low) / (high - low)
                w0, w1 = half - lean * t0 - 0.1, half - lean * t1 - 0.08
                z0, z1 = bottom + (top - bottom) * t0, bottom + (top - bottom) * t1
                self.face(name, tone, (0, slope, way), (-w0, y0, z0), (w0, y0, z0),
                          (w1, y1, z1), (-w1, y1, z1))  # fmt: skip
        self.face("above", self.paint, (0, 1, 0), (-roof, high, top_front), (roof, high, top_front),
                  (roof, high, top_rear), (-roof, high, top_rear))  # fmt: skip

    @staticmethod
    def _pane(
        a: float, b: float, low: float, high: float, foot: float, rear: float, top_front: float,
        top_rear: float, start: float, stop: float, under: float = 0.08, over: float = 0.86,
    ) -> tuple[Vector, ...]:  # fmt: skip
        """A pane of the cabin's side, as shares of its length (from the front) and height."""

        def at(along: float, up: float) -> Vector:
            front = foot + (top_front - foot) * up
            back = rear + (top_rear - rear) * up
            return a + (b - a) * up, low + (high - low) * up, front + (back - front) * along

        return at(start, under), at(stop, under), at(stop, over), at(start, over)


class Cars:
    """All models of one street; a model is made for each shape, paint and heading once."""

    def __init__(self, climate: Climate) -> None:
        self._climate = climate
        self._model = lru_cache(maxsize=256)(self._build)

    def draw(
        self, canvas: Canvas, camera: Camera, x: float, s: float, heading: float,
        shape: int, paint: int, dim: float,
    ) -> None:  # fmt: skip
        """`heading` 0 is along the street; `dim` is 1 in the open and less in a cast shadow."""
        body = SHAPES[shape]
        _, _, scale = camera.point(x, max(s, camera.s + 1.5 * NEAR))
        quarter = round(heading / (np.pi / 2)) % 4
        fade = round(self._climate.fade(camera.focal / scale) * 16) / 16
        fine = scale * body.height > 26
        model = self._model(shape, paint % len(PAINTS), quarter, fade, dim, fine)
        points = placed(model.points, x, s, heading)
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
        if abs(right) > body.width / 2:
            seen.add("right" if right > 0 else "left")
        if abs(ahead) > body.length / 2 - 0.3:
            seen.add("front" if ahead > 0 else "rear")
        if camera.height > body.height:
            seen.add("above")
        for face in model.faces:
            if face.seen not in seen:
                continue
            if passing:
                canvas.polygon(camera.polygon(points[face.first : face.last]), face.colour, CAR)
            else:
                canvas.fill(fixed[face.first : face.last], face.colour, CAR)

    def _build(
        self, shape: int, paint: int, quarter: int, fade: float, dim: float, fine: bool
    ) -> Model:
        return BodyBuilder(self._climate, SHAPES[shape], PAINTS[paint], quarter, fade, dim).build(
            fine, bus=shape == 6, van=shape == 5
        )
