"""Shadows on the ground: of buildings, trees, posts, cars and people, and the dark under cars."""

from __future__ import annotations

import math

import cv2
import numpy as np

from knet_synthetic.blocks import Block
from knet_synthetic.buildings import Buildings
from knet_synthetic.camera import NEAR, Camera
from knet_synthetic.carbody import SHAPES, shape_of
from knet_synthetic.climate import Climate
from knet_synthetic.layout import Layout
from knet_synthetic.noise import Array
from knet_synthetic.traffic import Mover

LONGEST = 3.5  # metres of shadow for a metre of height
_TURNS = tuple(2 * math.pi * k / 9 for k in range(9))
_Outline = list[tuple[float, float]]  # (x, s) of a convex polygon on the ground


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
        self, size: tuple[int, int], camera: Camera, blocks: list[Block], movers: list[Mover]
    ) -> Array:
        """Pixel-sized factors of the ground's light, 255 in the open."""
        mask: Array = np.full(size, 255, np.uint8)
        near, far = camera.s - 6.0, camera.s + 75.0
        cast: list[_Outline] = []
        under: list[tuple[float, float, float, float]] = []  # x, s, half width, half length
        for block in blocks:
            for car in block.parked:
                if near < car.s < far:
                    form = SHAPES[shape_of(car.style)]
                    under.append(_footprint(car.x, car.s, form.width, form.length, car.heading))
                    if self._sunny:
                        cast.append(self._box(*under[-1], form.height))
            if self._sunny:
                cast += self._standing(block, near, far)
        for mover in movers:
            if not near < mover.s < far:
                continue
            if mover.person is None:
                form = SHAPES[mover.shape]
                under.append(_footprint(mover.x, mover.s, form.width, form.length, 0.0))
                if self._sunny:
                    cast.append(self._box(*under[-1], form.height))
            else:
                under.append((mover.x, mover.s, 0.22, 0.8 if mover.cycling else 0.25))
                if self._sunny:
                    cast.append(self._streak(mover.x, mover.s, 1.7, 0.4))
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
                found.append(
                    self._streak(item.x, item.s, 5.0 if item.kind == "lamp" else 3.0, 0.12)
                )
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


def _footprint(
    x: float, s: float, width: float, length: float, heading: float
) -> tuple[float, float, float, float]:
    if abs(math.sin(heading)) > 0.7:
        width, length = length, width
    return x, s, width / 2, length / 2


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
