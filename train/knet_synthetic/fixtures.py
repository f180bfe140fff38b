"""Lamp posts, traffic lights, signs, bollards, barriers, and trees along the kerb."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from knet_synthetic.blocks import Fixture
from knet_synthetic.camera import NEAR, Camera
from knet_synthetic.canvas import Canvas
from knet_synthetic.climate import Climate
from knet_synthetic.foliage import Cutout
from knet_synthetic.noise import Array

POLE, TREE, SIGN, FENCE = 2, 5, 6, 7
RED, BLUE, WHITE, AMBER = (196, 30, 34), (28, 70, 160), (236, 236, 232), (230, 170, 40)


@dataclass(frozen=True)
class _Spot:
    """Where a fixture's foot is in the picture, its scale, and the haze before it."""

    u: float
    v: float
    scale: float
    clear: float
    mist: Array

    def tone(self, colour: tuple[int, int, int], light: Array) -> Array:
        return np.asarray(np.clip(np.array(colour) * light, 0, 255) * self.clear + self.mist)


class Fixtures:
    def __init__(
        self, climate: Climate, crowns: tuple[Cutout, ...], bushes: tuple[Cutout, ...],
        bare: bool, railing: Array,
    ) -> None:  # fmt: skip
        self.climate, self.crowns, self.bushes, self.bare = climate, crowns, bushes, bare
        self.railing = railing
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
        spot = _Spot(u, v, scale, 1.0 - fade, self.climate.horizon * fade)
        match item.kind:
            case "lamp":
                self._lamp(canvas, item, spot)
            case "sign":
                self._sign(canvas, item, spot)
            case "lights":
                self._lights(canvas, item, spot, time)
            case "bollard":
                self._post(canvas, u, v, scale, 1.0, 0.11, spot.tone((62, 60, 58), self.metal))
            case "bush":
                wide = 1.3 * item.size * scale
                texture, alpha = self.bushes[item.variant % len(self.bushes)].at(2 * wide)
                box = (u - wide, v - 1.8 * wide, u + wide, v + 0.18 * wide)
                canvas.sprite(texture, alpha, box, TREE)
            case "tree":
                self._tree(canvas, item, spot)

    def _post(
        self, canvas: Canvas, u: float, v: float, scale: float, height: float, width: float,
        tone: Array,
    ) -> None:  # fmt: skip
        half = max(0.5 * width * scale, 1.0)
        top = v - height * scale
        canvas.box(u - half, top, u + half, v, tone, POLE)
        if half > 2:  # the lit flank makes it round
            canvas.box(u - 0.5 * half, top, u + 0.1 * half, v, np.minimum(tone * 1.25, 255), POLE)

    def _lamp(self, canvas: Canvas, item: Fixture, spot: _Spot) -> None:
        u, v, scale, tone = spot.u, spot.v, spot.scale, spot.tone
        height = 6.5 * item.size
        grey = ((120, 124, 124), (60, 66, 62), (150, 150, 146))[item.variant % 3]
        metal = tone(grey, self.metal)
        self._post(canvas, u, v, scale, 1.2, 0.2, metal)
        self._post(canvas, u, v, scale, height, 0.13, metal)
        reach = -item.side * 1.3 * scale
        top = v - height * scale
        end = np.array((u + reach, top - 0.25 * scale))
        canvas.line(np.array((u, top)), end, 0.09 * scale, metal, POLE)
        head = tone((255, 236, 190) if self.climate.lamps_lit else (150, 150, 146), self.metal)
        canvas.line(end, end + np.array((0.5 * reach, 0.0)), 0.17 * scale, head, POLE)

    def _sign(self, canvas: Canvas, item: Fixture, spot: _Spot) -> None:
        u, v, scale, tone = spot.u, spot.v, spot.scale, spot.tone
        kind = item.variant % 6
        height = 2.7 if item.size <= 1 else 3.3
        self._post(canvas, u, v, scale, height, 0.08, tone((116, 118, 118), self.metal))
        radius = 0.36 * item.size * scale
        y = v - (height - 0.25) * scale
        if kind in (0, 1):  # a prohibition, or a mandatory blue disc
            rim, field = (RED, WHITE) if kind == 0 else (WHITE, BLUE)
            canvas.polygon(_ring(u, y, radius, 18), tone(rim, self.face), SIGN)
            canvas.polygon(_ring(u, y, 0.76 * radius, 18), tone(field, self.face), SIGN)
            if kind == 0 and radius > 6:
                for x in (-0.28, 0.1):
                    canvas.box(u + x * radius, y - 0.35 * radius, u + (x + 0.22) * radius,
                               y + 0.35 * radius, tone((30, 30, 30), self.face), SIGN)  # fmt: skip
        elif kind == 2:  # a warning triangle
            for size, colour in ((1.15, RED), (0.72, WHITE)):
                canvas.polygon(
                    _ring(u, y, size * radius, 3, -np.pi / 2), tone(colour, self.face), SIGN
                )
            canvas.box(u - 0.09 * radius, y - 0.35 * radius, u + 0.09 * radius, y + 0.25 * radius,
                       tone((30, 30, 30), self.face), SIGN)  # fmt: skip
        else:  # a panel: parking, direction, or information
            wide = radius * (1.0, 1.9, 1.1)[kind - 3]
            tall = radius * (1.25, 0.9, 1.6)[kind - 3]
            colour = (BLUE, (20, 90, 60), WHITE)[kind - 3]
            mark = WHITE if kind != 5 else (40, 44, 60)
            canvas.box(u - wide, y - tall, u + wide, y + tall, tone(WHITE, self.face), SIGN)
            canvas.box(u - 0.9 * wide, y - 0.9 * tall, u + 0.9 * wide, y + 0.9 * tall,
                       tone(colour, self.face), SIGN)  # fmt: skip
            if radius > 5:
                for k in (-0.5, 0.0, 0.5):
                    right = u + (0.6 - 0.3 * (k > 0)) * wide
                    canvas.box(u - 0.6 * wide, y + (k - 0.1) * tall, right, y + (k + 0.1) * tall,
                               tone(mark, self.face), SIGN)  # fmt: skip

    def _lights(self, canvas: Canvas, item: Fixture, spot: _Spot, time: float) -> None:
        u, v, scale, tone = spot.u, spot.v, spot.scale, spot.tone
        self._post(canvas, u, v, scale, 3.3, 0.12, tone((70, 72, 72), self.metal))
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
        corners = np.array([[x, 1.05, start], [x, 1.05, end], [x, 0.0, end], [x, 0.0, start]])
        rows, columns = self.railing.shape[:2]
        first = share * columns
        source = np.array([[first, 0], [columns, 0], [columns, rows], [first, rows]]) - 0.5
        canvas.quad(self.railing, camera.screen(camera.view(corners)), FENCE, source)

    def _tree(self, canvas: Canvas, item: Fixture, spot: _Spot) -> None:
        u, v, scale, tone = spot.u, spot.v, spot.scale, spot.tone
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
        canvas.sprite(
            texture,
            alpha,
            (u - wide, v - height * scale - 0.4 * size, u + wide, v - 1.5 * size),
            TREE,
        )


def _ring(u: float, v: float, radius: float, sides: int, start: float = 0.0) -> Array:
    angle = start + np.arange(sides) * (2 * np.pi / sides)
    return np.stack([u + radius * np.cos(angle), v + radius * np.sin(angle)], 1)


def draw_railing(climate: Climate) -> Array:
    """A panel of upright bars, RGBA."""
    image: Array = np.zeros((32, 128, 4), np.uint8)
    image[..., :3] = np.clip(np.array((112, 116, 118)) * climate.shade((-0.6, 0.1, -0.7)), 0, 255)
    image[:, ::4, 3] = 255
    image[:, 1::4, 3] = 255
    image[:4, :, 3] = image[27:30, :, 3] = 255
    image[:, :5, 3] = 255
    return image
