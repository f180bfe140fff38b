"""The ground: asphalt, kerbs, pavement slabs, verges, all read from one texture of the street's
cross-section; side roads and painted crossings on top; then the shadows that lie on it."""

from __future__ import annotations

import cv2
import numpy as np

from knet_synthetic.camera import Camera
from knet_synthetic.canvas import KEEP, Canvas
from knet_synthetic.climate import Climate
from knet_synthetic.layout import Layout
from knet_synthetic.noise import Array, fractal

ROAD, PAVEMENT, TREE = 3, 4, 5
CELL = 0.03  # metres per texel
HALF = 15.36  # metres from the centre line to the texture's edge
LENGTH = 15.36  # metres after which it repeats; the dashes' period divides it


class Ground:
    def __init__(self, rng: np.random.Generator, layout: Layout, climate: Climate) -> None:
        light = climate.shade((0.0, 1.0, 0.0))
        self.layout, self.climate = layout, climate
        self.paint = np.clip(np.array((212, 210, 202)) * light, 0, 255)
        texture, self._profile, self.asphalt = _bake(rng, layout)
        lit = np.clip(texture * light, 0, 255).astype(np.uint8)
        self._levels = {(0, 0): np.concatenate([lit, lit])}
        self.asphalt = np.clip(self.asphalt * light, 0, 255)
        self._haze = climate.horizon.astype(np.float32)

    def draw(
        self, canvas: Canvas, camera: Camera, junctions: list[tuple[float, float, int]]
    ) -> None:
        top = max(int(np.ceil(camera.cy + 0.5)), 0)
        top += top % 2
        rows = np.arange(top, canvas.height)
        depth = np.minimum(camera.focal * camera.height / (rows - camera.cy), 400.0)
        columns = (np.arange(canvas.width) - camera.cx) / camera.focal
        sin, cos = np.sin(camera.yaw), np.cos(camera.yaw)
        # Along a row both street coordinates are linear in the column (the bend is taken at the
        # row's depth; the yaw is small).
        x0 = camera.x + depth * sin - camera.bend(depth)
        x1 = depth * cos
        s0 = camera.s % LENGTH + depth * cos
        s1 = -depth * sin
        level_s = np.log2(np.maximum(depth**2 / (camera.focal * camera.height) / CELL, 1.0))
        level_x = np.log2(np.maximum(depth / camera.focal / CELL, 1.0))
        pairs = np.stack([np.minimum(level_s, 7).astype(int), np.minimum(level_x, 3).astype(int)])
        edges = np.flatnonzero(np.any(np.diff(pairs, axis=1) != 0, axis=0)) + 1
        for band in np.split(np.arange(len(rows)), edges):
            fine = (int(pairs[0, band[0]]), int(pairs[1, band[0]]))
            texture = self._level(*fine)
            cell_s, cell_x = CELL * 2 ** fine[0], CELL * 2 ** fine[1]
            across = _plane((x0[band] + HALF) / cell_x - 0.5, x1[band] / cell_x, columns)
            # Whole repeats are taken off, since samples beyond the (doubled) texture are slow.
            whole = np.floor((s0[band] - np.abs(s1[band]) * 0.6).min() / LENGTH) * LENGTH
            along = _plane((s0[band] - whole) / cell_s - 0.5, s1[band] / cell_s, columns)
            target = canvas.image[rows[band[0]] : rows[band[-1]] + 1]
            # Fixed-point maps halve the time of the largest drawing step.
            coarse, rest = cv2.convertMaps(across, along, cv2.CV_16SC2)
            cv2.remap(
                texture, coarse, rest, cv2.INTER_LINEAR, dst=target, borderMode=cv2.BORDER_WRAP
            )
        # Labels are taken of every second sample only: the others need none of their own.
        index = _plane((x0[::2] + HALF) / CELL, x1[::2] / CELL, columns[::2])
        np.clip(index, 0, len(self._profile) - 1, out=index)
        canvas.labels[top::2, ::2] = self._profile[index.astype(np.int32)]
        for start, end, side in junctions:
            self._side_road(canvas, camera, start, end, side)
        self._fade(canvas, top, depth)

    def crossing(self, canvas: Canvas, camera: Camera, s: float) -> None:
        """Zebra stripes, or two studded lines."""
        left, right = self.layout.kerb(-1), self.layout.kerb(1)
        if self.layout.zebra:
            for x in np.arange(left + 0.3, right - 0.5, 1.1):
                strip = np.array(
                    [[x, 0, s], [x + 0.6, 0, s], [x + 0.6, 0, s + 2.6], [x, 0, s + 2.6]]
                )
                canvas.polygon(camera.polygon(strip), self.paint * 0.92, KEEP)
        else:
            for x in np.arange(left + 0.2, right - 0.2, 0.5):
                for start in (s, s + 2.5):
                    dot = np.array(
                        [[x, 0, start], [x + 0.2, 0, start],
                         [x + 0.2, 0, start + 0.2], [x, 0, start + 0.2]]
                    )  # fmt: skip
                    canvas.polygon(camera.polygon(dot), self.paint, KEEP)

    def stop_line(self, canvas: Canvas, camera: Camera, s: float) -> None:
        near, far = sorted((0.1 * self.layout.side, self.layout.kerb(self.layout.side)))
        line = np.array([[near, 0, s], [far, 0, s], [far, 0, s + 0.35], [near, 0, s + 0.35]])
        canvas.polygon(camera.polygon(line), self.paint * 0.9, KEEP)

    def shade(self, canvas: Canvas, mask: Array, top: int) -> None:
        """Multiply the ground by a pixel-sized uint8 mask; shadows are a little blue."""
        part = mask[top // 2 :]
        tinted = cv2.LUT(cv2.cvtColor(cv2.blur(part, (3, 3)), cv2.COLOR_GRAY2RGB), _SHADOW)
        tinted = cv2.resize(tinted, (canvas.width, part.shape[0] * 2))
        region = canvas.image[top:]
        cv2.multiply(region, tinted, dst=region, scale=1 / 255)

    def _level(self, down_s: int, down_x: int) -> Array:
        if (down_s, down_x) not in self._levels:
            base = self._levels[0, 0]
            size = (base.shape[1] >> down_x, base.shape[0] >> down_s)
            self._levels[down_s, down_x] = cv2.resize(base, size, interpolation=cv2.INTER_AREA)
        return self._levels[down_s, down_x]

    def _side_road(
        self, canvas: Canvas, camera: Camera, start: float, end: float, side: int
    ) -> None:
        for way in (-1, 1):
            if side == -way:
                continue
            kerb, wall = self.layout.kerb(way) - way * 0.1, self.layout.wall(way)
            far = kerb + way * 40.0
            outline = [
                [kerb, 0, start - 1.4], [wall, 0, start], [far, 0, start],
                [far, 0, end], [wall, 0, end], [kerb, 0, end + 1.4],
            ]  # fmt: skip
            rim = np.array([[far, 0, start - 1.6], [wall, 0, start - 1.6],
                            [wall, 0, end + 1.6], [far, 0, end + 1.6]])  # fmt: skip
            slab = np.clip(np.array((150, 146, 140)) * self.climate.shade((0, 1, 0)), 0, 255)
            canvas.polygon(camera.polygon(rim), slab, PAVEMENT)
            canvas.polygon(camera.polygon(np.array(outline)), self.asphalt, ROAD)
            mouth = kerb + way * 0.4
            for s in np.arange(start + 0.4, end - 0.6, 1.0):
                rim_x = mouth + way * 0.25
                dash = np.array([[mouth, 0, s], [rim_x, 0, s], [rim_x, 0, s + 0.6],
                                 [mouth, 0, s + 0.6]])  # fmt: skip
                canvas.polygon(camera.polygon(dash), self.paint * 0.9, KEEP)

    def _fade(self, canvas: Canvas, top: int, depth: Array) -> None:
        far = depth[depth > 12.0]
        region = canvas.image[top : top + len(far)]
        if len(far) == 0:
            return
        clear = np.exp(-self.climate.haze * (far - 6.0))[:, None, None]
        mist = np.broadcast_to(self._haze * (1 - clear), region.shape).astype(np.uint8)
        weight = np.broadcast_to(255 * clear, region.shape).astype(np.uint8)
        cv2.add(cv2.multiply(region, weight, scale=1 / 255), mist, dst=region)


def _plane(start: Array, slope: Array, columns: Array) -> Array:
    """start + slope · column for each row, as remap takes it."""
    plane = np.multiply.outer(slope.astype(np.float32), columns.astype(np.float32))
    plane += start.astype(np.float32)[:, None]
    return np.asarray(plane)


def _bake(rng: np.random.Generator, layout: Layout) -> tuple[Array, Array, Array]:
    """The cross-section's albedo, the class of each of its columns, and the asphalt's mean."""
    rows, columns = round(LENGTH / CELL), round(2 * HALF / CELL)
    grain = rng.standard_normal((rows, columns), dtype=np.float32)
    blotch = fractal(rng, rows, columns, (6, 10), 3)
    x = (np.arange(columns) + 0.5) * CELL - HALF
    s = (np.arange(rows) + 0.5) * CELL
    profile = np.full(columns, TREE, np.uint8)
    image: Array = np.empty((rows, columns, 3), np.float32)
    grass = np.array((92, 108, 58)) * rng.uniform(0.8, 1.1)
    image[...] = grass * (1 + 0.16 * grain + 0.12 * blotch)[..., None]
    asphalt = np.array((98, 98, 100)) * rng.uniform(0.75, 1.25)
    tone = 1 + 0.07 * grain + 0.045 * blotch
    for track in (-layout.lane * 0.75, -layout.lane * 0.28, layout.lane * 0.28, layout.lane * 0.75):
        tone *= (1 - 0.07 * np.exp(-(((x - track) / 0.3) ** 2)))[None]
    road = (x > layout.kerb(-1)) & (x < layout.kerb(1))
    image[:, road] = (asphalt * tone[..., None])[:, road]
    profile[road] = ROAD
    slab = np.array((158, 154, 146)) * rng.uniform(0.8, 1.15)
    long, wide = rng.uniform(0.5, 1.0), rng.uniform(0.5, 0.9)
    for side in (-1, 1):
        kerb, wall = layout.kerb(side), layout.wall(side)
        out = (x - kerb) * side
        pavement = (out > 0) & (out < abs(wall - kerb))
        joint = (s[:, None] % long < CELL) | (out[None] % wide < CELL)
        tones = rng.normal(1, 0.05, (int(LENGTH / long) + 1, int(20 / wide) + 1))
        cells = tones[(s / long).astype(int)[:, None], np.clip(out / wide, 0, 10).astype(int)[None]]
        stone = (
            slab * ((cells + 0.05 * grain + 0.05 * blotch) * np.where(joint, 0.7, 1.0))[..., None]
        )
        # Walls keep the sky's light from the strip at their foot.
        stone *= (1 - 0.25 * np.exp(-np.maximum(abs(wall - kerb) - out, 0) / 0.4))[None, :, None]
        image[:, pavement] = stone[:, pavement]
        profile[pavement] = PAVEMENT
        stones = (out >= 0) & (out < 0.16)
        image[:, stones] = (np.array((176, 174, 168)) * (1 + 0.05 * grain[..., None]))[:, stones]
        gutter = (out < 0) & (out > -0.22)
        image[:, gutter] *= 0.8
        if layout.yellow:
            for line in (0.28, 0.46):
                paint = (-out > line) & (-out < line + 0.09)
                image[:, paint] = np.array((206, 172, 60)) * (0.9 + 0.05 * grain[:, paint, None])
        elif layout.parking[side > 0]:
            bay = (np.abs(-out - 2.1) < 0.05)[None] & (s % 1.28 < 0.7)[:, None]
            image[bay] = (196, 194, 188)
    wear = 0.88 + 0.06 * grain + 0.08 * blotch
    dash = (s % 5.12) < rng.uniform(2.0, 3.2)
    middle = np.abs(x) < 0.07
    line = dash[:, None] & middle[None]
    image[line] = (np.array((220, 218, 210)) * wear[line][:, None]).clip(0, 235)
    return np.clip(image, 0, 255), profile, asphalt


def _shadow_table() -> Array:
    value = np.arange(256) / 255.0
    return np.rint(255 * np.stack([value**1.08, value, value**0.9], 1)).astype(np.uint8)[:, None]


_SHADOW = _shadow_table()
