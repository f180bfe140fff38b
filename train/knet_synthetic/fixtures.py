"""What stands along the kerb: lamp posts, traffic lights, signs, bollards, barriers, and trees.

Crowns of trees, bare branches and bushes are cut-outs with ragged edges, lit from the sun's side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from knet_runtime.labels import Colour
from knet_synthetic.canvas import (
    FENCE,
    NEAR,
    POLE,
    SIGN,
    TREE,
    Array,
    Camera,
    Canvas,
    fractal,
    upright,
)
from knet_synthetic.layout import Fixture
from knet_synthetic.sky import Climate

RED, BLUE = (196, 30, 34), (28, 70, 160)
WHITE, BLACK = (236, 236, 232), (30, 30, 30)
SIZE = 192  # texels of a crown, each way


# Where a fixture's foot is in the frame (column, row), sub-samples per metre there, and what makes
# its colours of an albedo and the light on it.
_Spot = tuple[float, float, float, Callable[[Colour, Array], Array]]


class Fixtures:
    """All fixtures of a street; trees are leafy in season 0, in autumn colours in 1, bare in 2."""

    def __init__(self, rng: np.random.Generator, climate: Climate, season: int) -> None:
        self.climate, self.bare = climate, season == 2
        self.crowns = [
            _draw_bare(rng, climate) if self.bare else _draw_crown(rng, climate, season, bush=False)
            for _ in range(3)
        ]
        self.bushes = [_draw_crown(rng, climate, 0, bush=True) for _ in range(2)]
        self.railing = _draw_railing(climate)
        self.metal = climate.shade((-0.4, 0.2, -0.8))
        self.face = climate.shade((0.0, 0.1, -1.0))

    def draw(self, canvas: Canvas, camera: Camera, item: Fixture, time: float) -> None:
        if item.kind == "barrier":
            self._barrier(canvas, camera, item)
            return
        u, v, scale = camera.point(item.x, item.s)
        if scale == 0.0 or not -14 * scale < u < canvas.width + 14 * scale:
            return
        fade = self.climate.fade(camera.focal / scale)

        def tone(colour: Colour, light: Array) -> Array:
            return self.climate.through_haze(np.array(colour) * light, fade)

        spot = (u, v, scale, tone)
        match item.kind:
            case "lamp":
                self._lamp(canvas, item, spot)
            case "sign":
                self._sign(canvas, item, spot)
            case "lights":
                self._lights(canvas, item, spot, time)
            case "bollard":
                self._post(canvas, spot, 1.0, 0.11, tone((62, 60, 58), self.metal))
            case "bush":
                wide = 1.3 * item.size * scale
                texture, alpha = self.bushes[item.variant % len(self.bushes)].at(2 * wide)
                box = (u - wide, v - 1.8 * wide, u + wide, v + 0.18 * wide)
                canvas.sprite(texture, alpha, box, TREE)
            case "tree":
                self._tree(canvas, item, spot)

    def _post(self, canvas: Canvas, spot: _Spot, height: float, width: float, tone: Array) -> None:
        u, v, scale, _ = spot
        half = max(0.5 * width * scale, 1.0)
        top = v - height * scale
        canvas.box(u - half, top, u + half, v, tone, POLE)
        if half > 2:  # the lit flank makes it round
            canvas.box(u - 0.5 * half, top, u + 0.1 * half, v, np.minimum(tone * 1.25, 255), POLE)

    def _lamp(self, canvas: Canvas, item: Fixture, spot: _Spot) -> None:
        u, v, scale, tone = spot
        height = 6.5 * item.size
        grey = ((120, 124, 124), (60, 66, 62), (150, 150, 146))[item.variant % 3]
        metal = tone(grey, self.metal)
        self._post(canvas, spot, 1.2, 0.2, metal)
        self._post(canvas, spot, height, 0.13, metal)
        reach = -item.side * 1.3 * scale
        top = v - height * scale
        end = np.array((u + reach, top - 0.25 * scale))
        canvas.line(np.array((u, top)), end, 0.09 * scale, metal, POLE)
        head = tone((255, 236, 190) if self.climate.lamps_lit else (150, 150, 146), self.metal)
        canvas.line(end, end + np.array((0.5 * reach, 0.0)), 0.17 * scale, head, POLE)

    def _sign(self, canvas: Canvas, item: Fixture, spot: _Spot) -> None:
        u, v, scale, tone = spot
        kind = item.variant % 6
        height = 2.7 if item.size <= 1 else 3.3
        self._post(canvas, spot, height, 0.08, tone((116, 118, 118), self.metal))
        radius = 0.36 * item.size * scale
        y = v - (height - 0.25) * scale

        def disc(size: float, sides: int, colour: Colour, start: float = 0.0) -> None:
            ring = _ring(u, y, size * radius, sides, start)
            canvas.polygon(ring, tone(colour, self.face), SIGN)

        def panel(left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
            face = tone(colour, self.face)
            canvas.box(u + left, y + top, u + right, y + bottom, face, SIGN)

        if kind in (0, 1):  # a prohibition, or a mandatory blue disc
            disc(1.0, 18, RED if kind == 0 else WHITE)
            disc(0.76, 18, WHITE if kind == 0 else BLUE)
            if kind == 0 and radius > 6:
                for x in (-0.28, 0.1):
                    right = (x + 0.22) * radius
                    panel(x * radius, -0.35 * radius, right, 0.35 * radius, BLACK)
        elif kind == 2:  # a warning triangle
            disc(1.15, 3, RED, -np.pi / 2)
            disc(0.72, 3, WHITE, -np.pi / 2)
            panel(-0.09 * radius, -0.35 * radius, 0.09 * radius, 0.25 * radius, BLACK)
        else:  # a panel: parking, direction, or information
            wide = radius * (1.0, 1.9, 1.1)[kind - 3]
            tall = radius * (1.25, 0.9, 1.6)[kind - 3]
            panel(-wide, -tall, wide, tall, WHITE)
            colour = (BLUE, (20, 90, 60), WHITE)[kind - 3]
            panel(-0.9 * wide, -0.9 * tall, 0.9 * wide, 0.9 * tall, colour)
            if radius > 5:
                mark = WHITE if kind != 5 else (40, 44, 60)
                for k in (-0.5, 0.0, 0.5):
                    right = (0.6 - 0.3 * (k > 0)) * wide
                    panel(-0.6 * wide, (k - 0.1) * tall, right, (k + 0.1) * tall, mark)

    def _lights(self, canvas: Canvas, item: Fixture, spot: _Spot, time: float) -> None:
        u, v, scale, tone = spot
        self._post(canvas, spot, 3.3, 0.12, tone((70, 72, 72), self.metal))
        half, top, bottom = 0.2 * scale, v - 3.5 * scale, v - 2.4 * scale
        canvas.box(u - 1.5 * half, top - 0.3 * half, u + 1.5 * half, bottom + 0.3 * half,
                   tone((24, 26, 26), self.face), SIGN)  # fmt: skip
        beat = (time / 7.0 + item.variant % 7 / 7) % 1.0
        lit = 0 if beat < 0.45 else 2 if beat < 0.9 else 1
        for k, colour in enumerate(((255, 50, 40), (255, 180, 40), (60, 255, 150))):
            y = top + (bottom - top) * (k + 0.5) / 3
            glow = np.array(colour, float) if k == lit else np.array(colour) * 0.2
            canvas.polygon(_ring(u, y, 0.7 * half, 10), glow, SIGN)

    def _barrier(self, canvas: Canvas, camera: Camera, item: Fixture) -> None:
        start, end = max(item.s, camera.s + 1.5 * NEAR), item.s + item.size
        if end - start < 0.2:
            return
        x, share = item.x, (start - item.s) / item.size
        rows, columns = self.railing.shape[:2]
        first = share * columns
        source = np.array([[first, 0], [columns, 0], [columns, rows], [first, rows]]) - 0.5
        screen = camera.project(upright(x, 1.05, start, end))
        canvas.quad(self.railing, screen, FENCE, source)

    def _tree(self, canvas: Canvas, item: Fixture, spot: _Spot) -> None:
        u, v, scale, tone = spot
        height, size = 6.2 * item.size, item.size * scale
        if self.bare:
            texture, alpha = self.crowns[item.variant % len(self.crowns)].at(height * scale)
            wide = 0.5 * height * scale
            canvas.sprite(texture, alpha, (u - wide, v - height * scale, u + wide, v), TREE)
            return
        bark = tone((86, 74, 62), self.metal)
        low, top = max(0.17 * size, 1.0), max(0.09 * size, 1.0)
        trunk = np.array(
            [[u - low, v], [u + low, v], [u + top, v - 3.2 * size], [u - top, v - 3.2 * size]]
        )
        canvas.polygon(trunk, bark * 0.8, TREE)
        if low > 3:
            canvas.polygon(trunk * (0.4, 1.0) + (0.6 * u - 0.2 * low, 0.0), bark * 1.1, TREE)
        wide = 2.7 * size
        texture, alpha = self.crowns[item.variant % len(self.crowns)].at(2 * wide)
        box = (u - wide, v - height * scale - 0.4 * size, u + wide, v - 1.5 * size)
        canvas.sprite(texture, alpha, box, TREE)


def _ring(u: float, v: float, radius: float, sides: int, start: float = 0.0) -> Array:
    angle = start + np.arange(sides) * (2 * np.pi / sides)
    return np.stack([u + radius * np.cos(angle), v + radius * np.sin(angle)], 1)


def _draw_railing(climate: Climate) -> Array:
    """A panel of upright bars, RGBA."""
    image: Array = np.zeros((32, 128, 4), np.uint8)
    image[..., :3] = np.clip(np.array((112, 116, 118)) * climate.shade((-0.6, 0.1, -0.7)), 0, 255)
    image[:, ::4, 3] = 255
    image[:, 1::4, 3] = 255
    image[:4, :, 3] = image[27:30, :, 3] = 255
    image[:, :5, 3] = 255
    return image


@dataclass(frozen=True)
class Cutout:
    """Albedo already lit, and alpha, at falling sizes: far trees need the small ones."""

    levels: tuple[tuple[Array, Array], ...]

    def at(self, height: float) -> tuple[Array, Array]:
        for texture, alpha in reversed(self.levels):
            if texture.shape[0] >= height:
                return texture, alpha
        return self.levels[0]


def _draw_crown(rng: np.random.Generator, climate: Climate, season: int, bush: bool) -> Cutout:
    """Overlapping lobes, lit as balls are, broken up by leaves; season 0 is leafy, 1 autumn."""
    greens = ((62, 84, 38), (78, 98, 44), (54, 76, 48), (92, 104, 52))
    autumn = ((122, 92, 46), (128, 104, 56), (104, 72, 44), (100, 98, 52))
    base = np.array((greens if season == 0 else autumn)[rng.integers(4)]) * rng.uniform(0.85, 1.2)
    count = 12
    lobes = rng.uniform((0.24, 0.20), (0.76, 0.76), (count, 2))
    radius = rng.uniform(0.12, 0.22, count)
    if bush:
        lobes = np.stack([rng.uniform(0.15, 0.85, count), rng.uniform(0.45, 0.9, count)], 1)
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / SIZE
    best = np.full((SIZE, SIZE), -9.0, np.float32)
    facing = np.zeros((SIZE, SIZE), np.float32)
    sun_x, sun_y, sun_s = climate.towards_sun
    for (centre_x, centre_y), reach in zip(lobes, radius, strict=True):
        dx, dy = (x - centre_x) / reach, (y - centre_y) / reach
        inside = 1 - dx * dx - dy * dy
        front = inside > best
        best[front] = inside[front]
        slope = dx * sun_x - dy * sun_y - np.sqrt(np.maximum(inside, 0)) * sun_s
        facing[front] = slope[front]
    leaf = fractal(rng, SIZE, SIZE, (60, 60), 2)
    clump = fractal(rng, SIZE, SIZE, (16, 16), 2)
    # The rim dissolves into leaves, and the sky shines through here and there.
    alpha = (best + 0.30 * leaf + 0.28 * clump > 0.22) & (leaf + clump < rng.uniform(2.2, 3.4))
    direct = np.clip(facing + 0.25 * clump, 0, 1)[..., None] * climate.sun * 0.8
    sky = np.clip(0.80 - 0.55 * (y - 0.4) + 0.25 * np.clip(best, -0.5, 0.6), 0.2, 1.2)
    light = climate.ambient * (sky * 0.85)[..., None] + direct
    tone = np.clip(1 + 0.30 * leaf + 0.22 * clump, 0.25, 1.9)[..., None]
    image = np.clip(base * tone * light * 1.3, 0, 255).astype(np.uint8)
    return _levels(image, alpha.astype(np.uint8) * 255)


def _draw_bare(rng: np.random.Generator, climate: Climate) -> Cutout:
    """A winter tree: trunk and branches to the third order."""
    size = 2 * SIZE
    bark = np.array((92, 80, 68)) * rng.uniform(0.6, 1.0) * climate.shade((0.0, 0.3, -0.9))
    image: Array = np.full((size, size, 3), np.clip(bark, 0, 255), np.uint8)
    alpha: Array = np.zeros((size, size), np.uint8)
    twigs = [(size / 2, size - 1.0, -np.pi / 2, size * 0.27, 10.0)]
    while twigs:
        x, y, heading, length, width = twigs.pop()
        x2, y2 = x + np.cos(heading) * length, y + np.sin(heading) * length
        cv2.line(alpha, (int(x), int(y)), (int(x2), int(y2)), (255,), max(2, round(width)))
        if width < 1.2:
            continue
        for _ in range(int(rng.integers(2, 4))):
            turn = heading + rng.normal(0, 0.5) - 0.1 * np.cos(heading)
            twigs.append((x2, y2, turn, length * rng.uniform(0.62, 0.86), width * 0.62))
    image = np.clip(image * (1 + 0.2 * fractal(rng, size, size, (40, 40), 1)[..., None]), 0, 255)
    # Twigs thinner than a texel would vanish from the small copies: fatten them there.
    return _levels(image.astype(np.uint8), cv2.GaussianBlur(alpha, (3, 3), 0), fatten=1.35)


def _levels(image: Array, alpha: Array, fatten: float = 1.0) -> Cutout:
    levels = [(image, alpha)]
    while len(image) > 20:
        small = (image.shape[1] // 2, image.shape[0] // 2)
        image = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
        alpha = cv2.resize(alpha, small, interpolation=cv2.INTER_AREA)
        alpha = cv2.convertScaleAbs(alpha, alpha=fatten)
        levels.append((image, alpha))
    return Cutout(tuple(levels))
