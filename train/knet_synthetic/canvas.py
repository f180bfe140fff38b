"""What everything is drawn with: noise of a seed, CamVid's classes, the camera, and the canvas.

The camera says where a point of the street lies in the frame; the canvas draws there, image and
labels by the same call. Street coordinates are (x right of the centre line, y up, s along it). The
street bends: `Curve` is its centre line's lateral offset, and a point's true position is
x + offset(s). Pitch is a shift of the horizon (exact for a shifted lens), so that what is vertical
stays vertical in the frame. The canvas has two sub-samples per pixel and side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from knet_runtime.labels import LabelMap

Array = NDArray[Any]

CAMVID11 = LabelMap(
    names=("Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car",
           "Pedestrian", "Bicyclist"),
    palette=((128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222),
             (128, 128, 0), (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0),
             (0, 128, 192)),
    ignore_index=11,
)  # fmt: skip
SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST = range(11)
NO_LABEL = -1  # only the image is drawn and labels stay: paint on the road

NEAR = 1.0
BEHIND, BEYOND = -60, 460  # metres from the camera within which the bend is known
_METRES = np.arange(BEYOND - BEHIND)
_SHIFT = 4  # binary places of the polygon coordinates handed to OpenCV


def generator(*key: int) -> np.random.Generator:
    """A generator for this key alone: what makes every frame a pure function of its index."""
    # Seeds may not be negative: the sign is folded in so that block -1 differs from block 1.
    return np.random.default_rng([2 * k if k >= 0 else -2 * k - 1 for k in key])


def fractal(
    rng: np.random.Generator, height: int, width: int, cells: tuple[int, int], octaves: int = 3
) -> Array:
    """Float32 noise of about unit deviation which tiles in both directions."""
    total = np.zeros((height, width), np.float32)
    rows, columns, power = *cells, 0.0
    for octave in range(1, octaves + 1):
        weight = 0.6**octave
        rows, columns = min(rows, height), min(columns, width)
        grid = np.pad(rng.standard_normal((rows, columns), dtype=np.float32), 2, mode="wrap")
        # Sampling the padded grid between its first and last true cell makes the tile periodic.
        scale_y, scale_x = rows / height, columns / width
        matrix = np.array([[scale_x, 0, 2.0], [0, scale_y, 2.0]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        total += weight * cv2.warpAffine(grid, matrix, (width, height), flags=flags)
        power += weight**2
        rows, columns = rows * 2, columns * 2
    return total * np.float32(1.4 / power**0.5)


def flat(x0: float, x1: float, s0: float, s1: float) -> Array:
    """The corners [4, 3] of a rectangle on the ground."""
    return np.array([[x0, 0, s0], [x1, 0, s0], [x1, 0, s1], [x0, 0, s1]])


def upright(x: float, height: float, s0: float, s1: float) -> Array:
    """The corners [4, 3] of a wall along the street, from its top at s0."""
    return np.array([[x, height, s0], [x, height, s1], [x, 0, s1], [x, 0, s0]])


def placed(points: Array, x: float, s: float, heading: float) -> Array:
    """Points [N, 3] of a thing's own frame (right, up, forward) on the street, where it stands at
    (x, s) and faces ``heading``: 0 along the street, in radians."""
    sin, cos = np.sin(heading), np.cos(heading)
    right, up, forward = points.T
    return np.stack([x + right * cos + forward * sin, up, s + forward * cos - right * sin], 1)


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

    def project(self, points: Array) -> Array:
        """[N, 3] (x, y, s), all before the camera, to [N, 2] sub-samples."""
        return self.screen(self.view(points))

    def polygon(self, points: Array) -> Array:
        """A polygon [N, 3] in the frame, cut where it passes behind the camera; may be [0, 2]."""
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


class Canvas:
    """``labels`` holds classes and, where ``value`` was set meanwhile, that value in place of the
    class of polygons and lines: so an object can be told from others of its class."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = 2 * height, 2 * width
        self.image: Array = np.zeros((self.height, self.width, 3), np.uint8)
        self.labels: Array = np.zeros((self.height, self.width), np.uint8)
        self.value: int | None = None

    def polygon(self, points: Array, colour: Array, label: int) -> None:
        """A convex polygon [N, 2] of one colour."""
        if len(points) > 2:
            self.fill(_fixed(points), colour, label)

    def fill(self, fixed: Array, colour: Array, label: int) -> None:
        """As `polygon`, for points that are already in fixed point."""
        cv2.fillConvexPoly(self.image, fixed, colour.tolist(), cv2.LINE_8, _SHIFT)
        if label != NO_LABEL:
            value = label if self.value is None else self.value
            cv2.fillConvexPoly(self.labels, fixed, (value,), cv2.LINE_8, _SHIFT)

    def line(self, a: Array, b: Array, width: float, colour: Array, label: int) -> None:
        """A round-ended limb; never thinner than a pixel, so that its label does not break up."""
        first, second = ([round(v * (1 << _SHIFT)) for v in end.tolist()] for end in (a, b))
        thickness = max(2, round(width))
        cv2.line(self.image, first, second, colour.tolist(), thickness, cv2.LINE_8, _SHIFT)
        if label != NO_LABEL:
            value = label if self.value is None else self.value
            cv2.line(self.labels, first, second, (value,), thickness, cv2.LINE_8, _SHIFT)

    def box(
        self, left: float, top: float, right: float, bottom: float, colour: Array, label: int
    ) -> None:
        corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
        self.polygon(corners, colour, label)

    def quad(self, texture: Array, corners: Array, label: int, source: Array | None = None) -> None:
        """A texture in perspective: `corners` are the places of its top left, top right, bottom
        right and bottom left; `source` names other texture points than the corners."""
        window = self._window(corners)
        if window is None:
            return
        left, top, right, bottom = window
        if source is None:
            rows, columns = texture.shape[:2]
            source = np.array([[0, 0], [columns, 0], [columns, rows], [0, rows]]) - 0.5
        local = (corners - (left, top)).astype(np.float32)
        matrix = cv2.getPerspectiveTransform(source.astype(np.float32), local)
        size = (right - left, bottom - top)
        patch = cv2.warpPerspective(texture, matrix, size, borderMode=cv2.BORDER_REPLICATE)
        mask: Array = np.zeros(patch.shape[:2], np.uint8)
        cv2.fillConvexPoly(mask, _fixed(local), (255,), cv2.LINE_8, _SHIFT)
        region = self.image[top:bottom, left:right]
        if texture.ndim == 3 and texture.shape[2] == 4:
            # Railings: bars finer than a sample are mixed, and the whole panel is labelled.
            weight = patch[..., 3:].astype(np.float32) * (mask[..., None] * (1 / 65025.0))
            change = (patch[..., :3] - region.astype(np.float32)) * weight
            region += change.astype(np.int16).astype(np.uint8)
        else:
            cv2.copyTo(patch, mask, region)
        cv2.fillConvexPoly(self.labels, _fixed(corners), (label,), cv2.LINE_8, _SHIFT)

    def sprite(
        self, texture: Array, alpha: Array, rectangle: tuple[float, float, float, float], label: int
    ) -> None:
        """A cut-out facing the camera, in (left, top, right, bottom); a sample is in it or out."""
        x0, y0, x1, y1 = rectangle
        if x1 - x0 < 1 or y1 - y0 < 1:
            return
        # Only the texels in view are enlarged. Resizing them to whole samples costs a fraction of
        # a warp, and is off by half a sample at most.
        columns = _in_view(x0, x1, self.width, texture.shape[1])
        rows = _in_view(y0, y1, self.height, texture.shape[0])
        if columns is None or rows is None:
            return
        (u0, u1, left, right), (v0, v1, top, bottom) = columns, rows
        size = (right - left, bottom - top)
        patch = cv2.resize(texture[v0:v1, u0:u1], size)
        mask = cv2.threshold(cv2.resize(alpha[v0:v1, u0:u1], size), 127, 255, cv2.THRESH_BINARY)[1]
        inside = (slice(max(-top, 0), self.height - top), slice(max(-left, 0), self.width - left))
        target = (slice(max(top, 0), bottom), slice(max(left, 0), right))
        cv2.copyTo(patch[inside], mask[inside], self.image[target])
        self.labels[target][np.asarray(mask[inside], np.bool_)] = label

    def _window(self, points: Array) -> tuple[int, int, int, int] | None:
        low, high = points.min(axis=0), points.max(axis=0)
        left, top = max(math.floor(low[0]), 0), max(math.floor(low[1]), 0)
        right = min(math.ceil(high[0]) + 1, self.width)
        bottom = min(math.ceil(high[1]) + 1, self.height)
        return (left, top, right, bottom) if left < right and top < bottom else None


def _in_view(
    start: float, end: float, samples: int, texels: int
) -> tuple[int, int, int, int] | None:
    """Along one axis: the texels in view, and the samples that those cover."""
    density = texels / (end - start)
    first = max(math.floor(-start * density), 0)
    last = min(math.ceil((samples - start) * density), texels)
    low, high = round(start + first / density), round(start + last / density)
    return (first, last, low, high) if first < last and low < high and high > 0 else None


def _fixed(points: Array) -> Array:
    return np.asarray(np.rint(points * (1 << _SHIFT)), np.int32)
