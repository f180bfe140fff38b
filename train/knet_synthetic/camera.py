"""Where the camera is, and how points of the street come to lie in the picture.

Street coordinates are (x right of the centre line, y up, s along it). The street bends: `Curve` is
its centre line's lateral offset, and a point's true position is x + offset(s). Pitch is a shift of
the horizon (exact for a shifted lens), so that what is vertical stays vertical in the picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from knet_synthetic.noise import Array

NEAR = 1.0
BEHIND, BEYOND = -60, 460  # metres from the camera within which the bend is known
_METRES = np.arange(BEYOND - BEHIND)


@dataclass(frozen=True)
class Curve:
    amplitude: tuple[float, float]
    length: tuple[float, float]
    phase: tuple[float, float]

    def offset(self, s: Array | float) -> Array:
        waves = zip(self.amplitude, self.length, self.phase, strict=True)
        return np.asarray(sum(a * np.sin(np.asarray(s) / n + p) for a, n, p in waves))

    def slope(self, s: float) -> float:
        waves = zip(self.amplitude, self.length, self.phase, strict=True)
        return float(sum(a / n * np.cos(s / n + p) for a, n, p in waves))


@dataclass(frozen=True)
class Camera:
    """Focal length and principal point are in sub-samples, half a pixel each."""

    focal: float
    cx: float
    cy: float
    height: float
    s: float
    x: float
    yaw: float
    curve: Curve

    @cached_property
    def _bends(self) -> Array:
        """The bend at each whole metre from `BEHIND` on: sines are slow, and asked for often."""
        s = self.s + np.arange(BEHIND, BEYOND)
        here = float(self.curve.offset(self.s))
        return np.asarray(self.curve.offset(s) - here - self.curve.slope(self.s) * (s - self.s))

    def bend(self, ahead: Array) -> Array:
        """The centre line's offset from its tangent at the camera, so many metres ahead of it."""
        return np.asarray(np.interp(ahead - BEHIND, _METRES, self._bends))

    def bend_at(self, ahead: float) -> float:
        place = min(max(ahead - BEHIND, 0.0), BEYOND - BEHIND - 1.001)
        whole = int(place)
        low, high = self._bends[whole : whole + 2].tolist()
        return float(low + (high - low) * (place - whole))

    def view(self, points: Array) -> Array:
        """[N, 3] (x, y, s) to camera space (right, up, depth)."""
        ahead = points[:, 2] - self.s
        right = points[:, 0] + self.bend(ahead) - self.x
        sin, cos = math.sin(self.yaw), math.cos(self.yaw)
        view = np.empty((len(points), 3))
        view[:, 0] = right * cos - ahead * sin
        view[:, 1] = points[:, 1] - self.height
        view[:, 2] = ahead * cos + right * sin
        return view

    def screen(self, view: Array) -> Array:
        """Camera space with depth > 0 to [N, 2] sub-samples."""
        scale = self.focal / view[:, 2]
        screen = np.empty((len(view), 2))
        screen[:, 0] = self.cx + view[:, 0] * scale
        screen[:, 1] = self.cy - view[:, 1] * scale
        return screen

    def polygon(self, points: Array) -> Array:
        """The picture of a polygon, cut where it passes behind the camera; may be [0, 2]."""
        view = self.view(points)
        if float(view[:, 2].min()) < NEAR:
            view = _in_front(view)
            if len(view) < 3:
                return np.zeros((0, 2))
        return self.screen(view)

    def point(self, x: float, s: float) -> tuple[float, float, float]:
        """The ground at (x, s): column, row, and sub-samples per metre there (0: behind)."""
        ahead = s - self.s
        right = x + self.bend_at(ahead) - self.x
        sin, cos = math.sin(self.yaw), math.cos(self.yaw)
        depth = ahead * cos + right * sin
        if depth < NEAR:
            return 0.0, 0.0, 0.0
        scale = self.focal / depth
        return self.cx + (right * cos - ahead * sin) * scale, self.cy + self.height * scale, scale


def _in_front(view: Array) -> Array:
    """Sutherland and Hodgman's clip against the near plane."""
    kept: list[Array] = []
    for a, b in zip(view, np.roll(view, -1, axis=0), strict=True):
        if a[2] >= NEAR:
            kept.append(a)
        if (a[2] >= NEAR) != (b[2] >= NEAR):
            kept.append(a + (b - a) * (NEAR - a[2]) / (b[2] - a[2]))
    return np.array(kept) if kept else np.zeros((0, 3))
