"""Periodic fractal noise, and random generators that depend on nothing but their key."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


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
