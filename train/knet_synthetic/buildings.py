"""The sides of the street: fronts, side walls and roofs, and what bounds their gardens."""

from __future__ import annotations

import math
from functools import lru_cache

import cv2
import numpy as np

from knet_synthetic.blocks import Plot
from knet_synthetic.camera import NEAR, Camera
from knet_synthetic.canvas import Canvas
from knet_synthetic.climate import Climate
from knet_synthetic.facades import Facade
from knet_synthetic.layout import Layout
from knet_synthetic.noise import Array, fractal

BUILDING, TREE, FENCE = 1, 5, 7
DEPTH = 9.0  # metres from front to back
SLIVER = 7  # sub-samples of width below which a front is drawn in one colour


class Buildings:
    def __init__(
        self, rng: np.random.Generator, facades: list[Facade], layout: Layout, climate: Climate
    ) -> None:
        self._facades, self._layout, self._climate = facades, layout, climate
        self._boundaries = {"fence": _planks(rng), "hedge": _hedge(rng), "railing": _bars()}
        self._lit = lru_cache(maxsize=384)(self._light)
        self._mean = lru_cache(maxsize=1024)(self._mean_light)
        self._bound = lru_cache(maxsize=128)(self._light_boundary)

    def height(self, plot: Plot) -> float:
        return self._facades[plot.facade].height * plot.scale if plot.facade >= 0 else 0.0

    def draw(self, canvas: Canvas, camera: Camera, plot: Plot, before: Plot | None) -> None:
        """`before` is the next plot towards the camera on the same side."""
        start = max(plot.start, camera.s + 1.5 * NEAR)
        if plot.end - start < 0.2:
            return
        x = self._layout.wall(plot.side) + plot.side * plot.setback
        if plot.facade >= 0:
            self._building(canvas, camera, plot, before, x, start)
        if plot.boundary:
            self._boundary(canvas, camera, plot, start)

    def _building(
        self, canvas: Canvas, camera: Camera, plot: Plot, before: Plot | None, x: float,
        start: float,
    ) -> None:  # fmt: skip
        facade, height = self._facades[plot.facade], self.height(plot)
        back = x + plot.side * DEPTH
        ridge = x + plot.side * DEPTH / 2
        rise = 2.6 if facade.pitched else 0.0
        fade = self._climate.fade(0.5 * (start + plot.end) - camera.s)
        hidden = self._hidden(plot, before)
        if plot.start > camera.s + 2 * NEAR and hidden < height + rise:
            self._side_wall(canvas, camera, plot, x, back, height, rise, fade, hidden)
        if facade.pitched:
            slope = self._climate.shade((-plot.side * 0.5, 0.87, 0.0)) * (1 - fade)
            tone = np.clip(np.array(facade.roof) * slope, 0, 255) + self._climate.horizon * fade
            eaves = x - plot.side * 0.25
            low, high = height - 0.1, height + rise
            corners = np.array([[eaves, low, start], [eaves, low, plot.end],
                                [ridge, high, plot.end], [ridge, high, start]])  # fmt: skip
            canvas.polygon(camera.polygon(corners), np.clip(tone, 0, 255), BUILDING)
            self._chimney(canvas, camera, plot, ridge, height + rise, fade)
        corners = np.array(
            [[x, height, start], [x, height, plot.end], [x, 0, plot.end], [x, 0, start]]
        )
        screen = camera.screen(camera.view(corners))
        if abs(screen[0, 0] - screen[1, 0]) < 0.5 or not _inside(screen, canvas):
            return
        normal = -plot.side
        if abs(screen[0, 0] - screen[1, 0]) < SLIVER:
            canvas.polygon(screen, self._mean(plot.facade, normal, round(fade * 20)), BUILDING)
            return
        texture = self._fit(plot.facade, normal, fade, screen)
        columns, rows = texture.shape[1], texture.shape[0]
        # The part that the near plane cut off is not squeezed into what is left.
        first = (start - plot.start) / (plot.end - plot.start) * columns
        source = np.array([[first, 0], [columns, 0], [columns, rows], [first, rows]]) - 0.5
        if plot.flip:
            source[:, 0] = columns - 1 - source[:, 0]
        canvas.quad(texture, screen, BUILDING, source)

    def _side_wall(
        self, canvas: Canvas, camera: Camera, plot: Plot, x: float, back: float, height: float,
        rise: float, fade: float, hidden: float,
    ) -> None:  # fmt: skip
        low = min(hidden, height - 0.1)
        corners = np.array([[x, height, plot.start], [back, height, plot.start],
                            [back, low, plot.start], [x, low, plot.start]])  # fmt: skip
        screen = camera.screen(camera.view(corners))
        if not _inside(screen, canvas):
            return
        tone = self._mean(-1 - plot.facade, 0, round(fade * 20))
        if rise:
            middle = np.array([[0.5 * (x + back), height + rise, plot.start]])
            apex = camera.screen(camera.view(middle))
            canvas.polygon(np.stack([screen[0], screen[1], apex[0]]), tone, BUILDING)
        if abs(screen[0, 0] - screen[1, 0]) < 4 * SLIVER:
            canvas.polygon(screen, tone, BUILDING)
            return
        texture = self._fit(-1 - plot.facade, 0, fade, screen)
        columns, rows = texture.shape[1], texture.shape[0] * (1 - low / height)
        source = np.array([[0, 0], [columns, 0], [columns, rows], [0, rows]]) - 0.5
        canvas.quad(texture, screen, BUILDING, source)

    def _hidden(self, plot: Plot, before: Plot | None) -> float:
        """Up to which height the building before this one covers its side wall."""
        if before is None or before.facade < 0 or plot.start - before.end > 0.1:
            return 0.0
        return self.height(before) if before.setback <= plot.setback + 0.1 else 0.0

    def _chimney(
        self, canvas: Canvas, camera: Camera, plot: Plot, ridge: float, top: float, fade: float
    ) -> None:
        if not 4.0 < plot.start - camera.s < 80.0:
            return
        s = plot.start + 0.4
        tone = self._climate.shade((0, 0, -1)) * np.array((140, 92, 74))
        tone = np.clip(tone, 0, 255) * (1 - fade) + self._climate.horizon * fade
        for half, low, high, factor in ((0.5, -0.8, 1.1, 1.0), (0.3, 1.1, 1.5, 1.15)):
            left, right, foot, head = ridge - half, ridge + half, top + low, top + high
            box = np.array([[left, foot, s], [right, foot, s], [right, head, s], [left, head, s]])
            canvas.polygon(camera.polygon(box), np.clip(tone * factor, 0, 255), BUILDING)

    def _boundary(self, canvas: Canvas, camera: Camera, plot: Plot, start: float) -> None:
        x = self._layout.wall(plot.side) + plot.side * 0.1
        height = {"fence": 1.7, "railing": 1.2, "hedge": 1.4}[plot.boundary] * plot.scale
        label = TREE if plot.boundary == "hedge" else FENCE
        corners = np.array(
            [[x, height, start], [x, height, plot.end], [x, 0, plot.end], [x, 0, start]]
        )
        screen = camera.screen(camera.view(corners))
        if not _inside(screen, canvas):
            return
        fade = self._climate.fade(0.5 * (start + plot.end) - camera.s)
        full = self._boundaries[plot.boundary]
        columns = max(8, min(full.shape[1], round(full.shape[1] * (plot.end - start) / 12.0)))
        down_y = _halvings(full.shape[0], abs(screen[0, 1] - screen[3, 1]))
        down_x = _halvings(columns, 2 * abs(screen[0, 0] - screen[1, 0]))
        lit = self._bound(plot.boundary, plot.side, round(fade * 20), down_y, down_x)
        canvas.quad(lit[:, : max(4, columns >> down_x)], screen, label)

    def _light_boundary(self, name: str, side: int, fade: int, down_y: int, down_x: int) -> Array:
        full, share = self._boundaries[name], fade / 20
        size = (full.shape[1] >> down_x, full.shape[0] >> down_y)
        lit = cv2.resize(full, size, interpolation=cv2.INTER_AREA).astype(np.float32)
        light = self._climate.shade((-float(side), 0.2, 0.0)) * (1 - share)
        lit[..., :3] = lit[..., :3] * light + self._climate.horizon * share
        return np.clip(lit, 0, 255).astype(np.uint8)

    def _fit(self, number: int, normal: int, fade: float, screen: Array) -> Array:
        """The texture in its light and haze, no finer than it will be seen."""
        full = self._facades[number].front if number >= 0 else self._facades[-1 - number].side
        tall = max(abs(screen[0, 1] - screen[3, 1]), abs(screen[1, 1] - screen[2, 1]))
        wide = abs(screen[0, 0] - screen[1, 0]) * 1.6
        down_y, down_x = _halvings(full.shape[0], tall), _halvings(full.shape[1], wide)
        return self._lit(number, normal, round(fade * 20), down_y, down_x)

    def _mean_light(self, number: int, normal: int, fade: int) -> Array:
        """What a wall is as a whole, for those seen too narrow to show a window."""
        return np.asarray(self._lit(number, normal, fade, 4, 4).mean((0, 1)))

    def _light(self, number: int, normal: int, fade: int, down_y: int, down_x: int) -> Array:
        full = self._facades[number].front if number >= 0 else self._facades[-1 - number].side
        size = (max(1, full.shape[1] >> down_x), max(1, full.shape[0] >> down_y))
        small = cv2.resize(full, size, interpolation=cv2.INTER_AREA) if down_x + down_y else full
        share = fade / 20
        way = (float(normal), 0.0, 0.0) if normal else (0.0, 0.0, -1.0)
        value = np.arange(256)[:, None] * self._climate.shade(way)
        table = np.clip(value, 0, 255) * (1 - share) + self._climate.horizon * share
        lit = cv2.LUT(small, np.clip(table, 0, 255).astype(np.uint8)[:, None])
        return np.asarray(lit)


def _halvings(texels: int, samples: float) -> int:
    """How often a texture may be halved before it is coarser than the samples it fills."""
    return min(max(int(math.log2(texels / max(samples, 1.0))), 0), 4) if texels > samples else 0


def _inside(screen: Array, canvas: Canvas) -> bool:
    return bool(screen[:, 0].max() > 0 and screen[:, 0].min() < canvas.width)


def _planks(rng: np.random.Generator) -> Array:
    """Twelve metres of close-boarded fence."""
    tones = np.repeat(rng.normal(1.0, 0.12, 120), 4)
    image = np.array((142, 112, 80)) * tones[None, :, None] * np.ones((48, 1, 1))
    image *= 1 + 0.08 * fractal(rng, 48, 480, (3, 120), 2)[..., None]
    image[:, ::4] *= 0.55
    image[:, 78::80] *= 0.6
    image[:3] *= 1.2
    return np.clip(image, 0, 255).astype(np.uint8)


def _hedge(rng: np.random.Generator) -> Array:
    leaf = fractal(rng, 48, 480, (24, 240), 2)
    lump = fractal(rng, 48, 480, (2, 24), 2)
    tone = (1 + 0.28 * leaf + 0.16 * lump) * np.linspace(1.2, 0.65, 48)[:, None]
    return np.clip(np.array((70, 92, 46)) * tone[..., None], 0, 255).astype(np.uint8)


def _bars() -> Array:
    """Twelve metres of iron railings on a low wall, RGBA."""
    image: Array = np.zeros((48, 480, 4), np.uint8)
    image[..., :3] = (38, 42, 42)
    image[:, ::5, 3] = image[:, 1::5, 3] = 255
    image[3:6, :, 3] = image[30:33, :, 3] = 255
    image[36:, :, :3], image[36:, :, 3] = (140, 118, 100), 255
    return image
