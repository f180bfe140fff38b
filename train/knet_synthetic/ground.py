"""The ground and the shadows that lie on it.

Asphalt, kerbs, pavement slabs and verges are read from one texture of the street's cross-section;
side roads and painted crossings lie on top; buildings, trees, posts, cars and people throw shadows.
"""

from __future__ import annotations

import math
from itertools import chain

import cv2
import numpy as np

from knet_synthetic.buildings import Buildings
from knet_synthetic.canvas import (
    NEAR,
    NO_LABEL,
    PAVEMENT,
    ROAD,
    TREE,
    Array,
    Camera,
    Canvas,
    flat,
    fractal,
)
from knet_synthetic.cars import SHAPES
from knet_synthetic.layout import Block, Car, Figure, Layout
from knet_synthetic.sky import Climate

CELL = 0.03  # metres per texel
HALF = 15.36  # metres from the centre line to the texture's edge
LENGTH = 15.36  # metres after which it repeats; the dashes' period divides it
LONGEST = 3.5  # metres of shadow for a metre of height
_TURNS = tuple(2 * math.pi * k / 9 for k in range(9))
_Outline = list[tuple[float, float]]  # (x, s) of a convex polygon on the ground


class Ground:
    def __init__(self, rng: np.random.Generator, layout: Layout, climate: Climate) -> None:
        light = climate.shade((0.0, 1.0, 0.0))
        self.layout, self.climate = layout, climate
        self.paint = np.clip(np.array((212, 210, 202)) * light, 0, 255)
        texture, self._profile, asphalt = _bake(rng, layout)
        lit = np.clip(texture * light, 0, 255).astype(np.uint8)
        self._levels = {(0, 0): np.concatenate([lit, lit])}
        self.asphalt = np.clip(asphalt * light, 0, 255)
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
            cv2.remap(texture, coarse, rest, cv2.INTER_LINEAR, target, cv2.BORDER_WRAP)
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
                strip = camera.polygon(flat(x, x + 0.6, s, s + 2.6))
                canvas.polygon(strip, self.paint * 0.92, NO_LABEL)
        else:
            for x in np.arange(left + 0.2, right - 0.2, 0.5):
                for start in (s, s + 2.5):
                    dot = camera.polygon(flat(x, x + 0.2, start, start + 0.2))
                    canvas.polygon(dot, self.paint, NO_LABEL)

    def stop_line(self, canvas: Canvas, camera: Camera, s: float) -> None:
        near, far = sorted((0.1 * self.layout.side, self.layout.kerb(self.layout.side)))
        line = camera.polygon(flat(near, far, s, s + 0.35))
        canvas.polygon(line, self.paint * 0.9, NO_LABEL)

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
            rim = flat(far, wall, start - 1.6, end + 1.6)
            slab = np.clip(np.array((150, 146, 140)) * self.climate.shade((0, 1, 0)), 0, 255)
            canvas.polygon(camera.polygon(rim), slab, PAVEMENT)
            canvas.polygon(camera.polygon(np.array(outline)), self.asphalt, ROAD)
            mouth = kerb + way * 0.4
            for s in np.arange(start + 0.4, end - 0.6, 1.0):
                dash = camera.polygon(flat(mouth, mouth + way * 0.25, s, s + 0.6))
                canvas.polygon(dash, self.paint * 0.9, NO_LABEL)

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
    road = (x > layout.kerb(-1)) & (x < layout.kerb(1))
    tone = 1 + 0.07 * grain[:, road] + 0.045 * blotch[:, road]
    for track in (-layout.lane * 0.75, -layout.lane * 0.28, layout.lane * 0.28, layout.lane * 0.75):
        tone *= (1 - 0.07 * np.exp(-(((x[road] - track) / 0.3) ** 2)))[None]
    image[:, road] = asphalt * tone[..., None]
    profile[road] = ROAD
    slab = np.array((158, 154, 146)) * rng.uniform(0.8, 1.15)
    long, wide = rng.uniform(0.5, 1.0), rng.uniform(0.5, 0.9)
    for side in (-1, 1):
        kerb, wall = layout.kerb(side), layout.wall(side)
        out = (x - kerb) * side
        pavement = (out > 0) & (out < abs(wall - kerb))
        across = out[pavement]
        joint = (s[:, None] % long < CELL) | (across[None] % wide < CELL)
        tones = rng.normal(1, 0.05, (int(LENGTH / long) + 1, int(20 / wide) + 1))
        places = np.clip(across / wide, 0, 10).astype(int)
        cells = tones[(s / long).astype(int)[:, None], places[None]]
        rough = 0.05 * grain[:, pavement] + 0.05 * blotch[:, pavement]
        tone = (cells + rough) * np.where(joint, 0.7, 1.0)
        # Walls keep the sky's light from the strip at their foot.
        light = 1 - 0.25 * np.exp(-np.maximum(abs(wall - kerb) - across, 0) / 0.4)
        image[:, pavement] = slab * tone[..., None] * light[None, :, None]
        profile[pavement] = PAVEMENT
        stones = (out >= 0) & (out < 0.16)
        image[:, stones] = np.array((176, 174, 168)) * (1 + 0.05 * grain[:, stones, None])
        gutter = (out < 0) & (out > -0.22)
        image[:, gutter] *= 0.8
        if layout.yellow:
            for line in (0.28, 0.46):
                paint = (-out > line) & (-out < line + 0.09)
                image[:, paint] = np.array((206, 172, 60)) * (0.9 + 0.05 * grain[:, paint, None])
        elif layout.parking[side > 0]:
            bay = (np.abs(-out - 2.1) < 0.05)[None] & (s % 1.28 < 0.7)[:, None]
            image[bay] = (196, 194, 188)
    dash = (s % 5.12) < rng.uniform(2.0, 3.2)
    middle = np.abs(x) < 0.07
    line = dash[:, None] & middle[None]
    wear = 0.88 + 0.06 * grain[line] + 0.08 * blotch[line]
    image[line] = (np.array((220, 218, 210)) * wear[:, None]).clip(0, 235)
    return np.clip(image, 0, 255), profile, asphalt


def _shadow_table() -> Array:
    value = np.arange(256) / 255.0
    return np.rint(255 * np.stack([value**1.08, value, value**0.9], 1)).astype(np.uint8)[:, None]


_SHADOW = _shadow_table()


class Shadows:
    def __init__(self, climate: Climate, layout: Layout, buildings: Buildings) -> None:
        self._climate, self._layout, self._buildings = climate, layout, buildings
        x, y, s = climate.towards_sun
        reach = min(1.0 / y, LONGEST / max(np.hypot(x, s), 1e-6))
        self._throw = (-x * reach, -s * reach)  # of a metre of height
        self._depth = climate.in_shadow
        self._sunny = self._depth < 0.85

    def dim(self, x: float) -> float:
        """How much darker a thing at x is when the sun's side of the street shades it."""
        across = self._throw[0]
        if not self._sunny or abs(across) < 0.2:
            return 1.0
        side = -1 if across > 0 else 1
        away = abs(self._layout.wall(side) - x)
        return 0.72 if away < 0.75 * 7.0 * abs(across) else 1.0

    def mask(
        self, size: tuple[int, int], camera: Camera, blocks: list[Block], movers: list[Car | Figure]
    ) -> Array:
        """Pixel-sized factors of the ground's light, 255 in the open."""
        mask: Array = np.full(size, 255, np.uint8)
        near, far = camera.s - 6.0, camera.s + 75.0
        cast: list[_Outline] = []
        under: list[tuple[float, float, float, float]] = []  # x, s, half width, half length
        for thing in chain(*(block.parked for block in blocks), movers):
            if not near < thing.s < far:
                continue
            if isinstance(thing, Figure):
                under.append((thing.x, thing.s, 0.22, 0.8 if thing.cycling else 0.25))
                cast.append(self._streak(thing.x, thing.s, 1.7, 0.4))
                continue
            body = SHAPES[thing.shape]
            sides = body.width / 2, body.length / 2
            across, along = sides[::-1] if abs(math.sin(thing.heading)) > 0.7 else sides
            under.append((thing.x, thing.s, across, along))
            cast.append(self._box(*under[-1], body.height))
        if self._sunny:
            for block in blocks:
                cast += self._standing(block, near, far)
            _fill(mask, camera, cast, round(255 * self._depth))
        soft = 0.62 * self._depth if self._sunny else 0.55
        for grow, share in ((1.14, 0.5 + 0.5 * soft), (1.0, soft), (0.88, 0.6 * soft)):
            boxes = [
                [(x - grow * a, s - grow * b), (x + grow * a, s - grow * b),
                 (x + grow * a, s + grow * b), (x - grow * a, s + grow * b)]
                for x, s, a, b in under
            ]  # fmt: skip
            _fill(mask, camera, boxes, round(255 * share * (self._depth if self._sunny else 1.0)))
        return mask

    def _standing(self, block: Block, near: float, far: float) -> list[_Outline]:
        """What buildings, trees and posts of a block throw."""
        dx, ds = self._throw
        found: list[_Outline] = []
        for plot in block.plots:
            height = self._buildings.height(plot)
            if height and dx * plot.side < 0:
                x = self._layout.wall(plot.side) + plot.side * plot.setback
                low, high = ds * height, dx * height
                found.append([(x, plot.start), (x, plot.end), (x + high, plot.end + low),
                              (x + high, plot.start + low)])  # fmt: skip
        for item in block.fixtures:
            if not near - 14.0 < item.s < far:
                continue
            if item.kind == "tree":
                found.append(self._streak(item.x, item.s, 3.0 * item.size, 0.25))
                for lift, radius, turn in ((3.0, 1.7, 0.0), (4.0, 2.0, 1.0), (5.0, 1.4, 2.0)):
                    radius *= item.size
                    x, s = item.x + dx * lift * item.size, item.s + ds * lift * item.size
                    found.append(
                        [(x + radius * math.cos(a + turn) * (1 + 0.2 * math.sin(3 * a + item.s)),
                          s + radius * math.sin(a + turn)) for a in _TURNS]
                    )  # fmt: skip
            elif item.kind in ("lamp", "lights", "sign"):
                height = 5.0 if item.kind == "lamp" else 3.0
                found.append(self._streak(item.x, item.s, height, 0.12))
        return found

    def _box(self, x: float, s: float, a: float, b: float, height: float) -> _Outline:
        """The ground shadow of a box is the hull of its foot and its thrown lid."""
        dx, ds = self._throw[0] * height, self._throw[1] * height
        foot = [(x - a, s - b), (x + a, s - b), (x + a, s + b), (x - a, s + b)]
        both = np.array(foot + [(u + dx, v + ds) for u, v in foot]) - (x, s)
        hull = cv2.convexHull(both.astype(np.float32))[:, 0]
        return [(x + float(u), s + float(v)) for u, v in hull]

    def _streak(self, x: float, s: float, height: float, width: float) -> _Outline:
        dx, ds = self._throw[0] * height, self._throw[1] * height
        norm = max(math.hypot(dx, ds), 1e-6)
        px, ps = -ds / norm * width / 2, dx / norm * width / 2
        return [(x - px, s - ps), (x + px, s + ps), (x + px + dx, s + ps + ds),
                (x - px + dx, s - ps + ds)]  # fmt: skip


def _fill(mask: Array, camera: Camera, outlines: list[_Outline], value: int) -> None:
    """All outlines in one projection; those that reach behind the camera are cut one by one."""
    if not outlines:
        return
    flat = np.array([(x, 0.0, s) for outline in outlines for x, s in outline])
    view = camera.view(flat)
    depth = view[:, 2].copy()
    view[:, 2] = np.maximum(depth, NEAR)
    fixed = np.rint(camera.screen(view) * 8).astype(np.int32)  # sub-samples are half pixels
    first = 0
    for outline in outlines:
        last = first + len(outline)
        part = fixed[first:last]
        if min(depth[first:last].tolist()) < NEAR:
            part = np.rint(camera.polygon(flat[first:last]) * 8).astype(np.int32)
        if len(part) > 2:
            cv2.fillConvexPoly(mask, part, (value,), cv2.LINE_8, 4)
        first = last
