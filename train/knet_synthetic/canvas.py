"""The picture and its labels, drawn together at two sub-samples per pixel and side."""

from __future__ import annotations

import math

import cv2
import numpy as np

from knet_synthetic.noise import Array

SHIFT = 4  # binary places of the polygon coordinates handed to OpenCV
KEEP = -1  # "draw the image and leave the label": paint on the road, windows on a car


class Canvas:
    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = 2 * height, 2 * width
        self.image: Array = np.zeros((self.height, self.width, 3), np.uint8)
        self.labels: Array = np.zeros((self.height, self.width), np.uint8)

    def polygon(self, points: Array, colour: Array, label: int) -> None:
        """A convex polygon [N, 2] of one colour."""
        if len(points) < 3:
            return
        fixed = np.rint(points * (1 << SHIFT)).astype(np.int32)
        self.fill(fixed, (float(colour[0]), float(colour[1]), float(colour[2])), label)

    def fill(self, fixed: Array, colour: tuple[float, float, float], label: int) -> None:
        """As `polygon`, for points that are already in fixed point."""
        cv2.fillConvexPoly(self.image, fixed, colour, cv2.LINE_8, SHIFT)
        if label != KEEP:
            cv2.fillConvexPoly(self.labels, fixed, (label,), cv2.LINE_8, SHIFT)

    def line(self, a: Array, b: Array, width: float, colour: Array, label: int) -> None:
        """A round-ended limb; never thinner than a pixel, so that its label does not break up."""
        scale = 1 << SHIFT
        first = (round(float(a[0]) * scale), round(float(a[1]) * scale))
        second = (round(float(b[0]) * scale), round(float(b[1]) * scale))
        thickness = max(2, round(width))
        tone = (float(colour[0]), float(colour[1]), float(colour[2]))
        cv2.line(self.image, first, second, tone, thickness, cv2.LINE_8, SHIFT)
        if label != KEEP:
            cv2.line(self.labels, first, second, (label,), thickness, cv2.LINE_8, SHIFT)

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
            source = np.array([[0, 0], [columns, 0], [columns, rows], [0, rows]], np.float32) - 0.5
        local = (corners - (left, top)).astype(np.float32)
        matrix = cv2.getPerspectiveTransform(source.astype(np.float32), local)
        patch = cv2.warpPerspective(
            texture,
            matrix,
            (right - left, bottom - top),
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )
        mask: Array = np.zeros(patch.shape[:2], np.uint8)
        cv2.fillConvexPoly(mask, _fixed(local), (255,), cv2.LINE_8, SHIFT)
        region = self.image[top:bottom, left:right]
        if texture.ndim == 3 and texture.shape[2] == 4:
            # Railings: bars finer than a sample are mixed, and the whole panel is labelled.
            weight = patch[..., 3:].astype(np.float32) * (mask[..., None] * (1 / 65025.0))
            region += (
                ((patch[..., :3] - region.astype(np.float32)) * weight)
                .astype(np.int16)
                .astype(np.uint8)
            )
        else:
            cv2.copyTo(patch, mask, region)
        cv2.fillConvexPoly(self.labels, _fixed(corners), (label,), cv2.LINE_8, SHIFT)

    def sprite(
        self,
        texture: Array,
        alpha: Array,
        rectangle: tuple[float, float, float, float],
        label: int,
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
    return np.asarray(np.rint(points * (1 << SHIFT)), np.int32)
