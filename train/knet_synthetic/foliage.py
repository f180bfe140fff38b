"""Crowns of trees, bare branches, bushes: cut-outs with ragged edges, lit from the sun's side."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from knet_synthetic.climate import Climate
from knet_synthetic.noise import Array, fractal

SIZE = 192


@dataclass(frozen=True)
class Cutout:
    """Albedo already lit, and alpha, at falling sizes: far trees need the small ones."""

    levels: tuple[tuple[Array, Array], ...]

    def at(self, height: float) -> tuple[Array, Array]:
        for texture, alpha in reversed(self.levels):
            if texture.shape[0] >= height:
                return texture, alpha
        return self.levels[0]


def draw_crown(rng: np.random.Generator, climate: Climate, season: int, bush: bool) -> Cutout:
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


def draw_bare(rng: np.random.Generator, climate: Climate) -> Cutout:
    """A winter tree: trunk and branches to the third order."""
    size = 2 * SIZE
    bark = np.array((92, 80, 68)) * rng.uniform(0.6, 1.0) * climate.shade((0.0, 0.3, -0.9))
    tone = tuple(map(float, np.clip(bark, 0, 255)))
    image: Array = np.zeros((size, size, 3), np.uint8)
    image[...] = tone
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
    while levels[-1][0].shape[0] > 20:
        small = (levels[-1][0].shape[1] // 2, levels[-1][0].shape[0] // 2)
        shrunk = cv2.resize(levels[-1][1], small, interpolation=cv2.INTER_AREA)
        levels.append(
            (
                cv2.resize(levels[-1][0], small, interpolation=cv2.INTER_AREA),
                cv2.convertScaleAbs(shrunk, alpha=fatten),
            )
        )
    return Cutout(tuple(levels))
