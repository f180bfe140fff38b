"""Colours that can be told apart, also by those who see red, green or blue in another way."""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Colour = tuple[int, int, int]
"""Red, green and blue, 0 … 255."""

Floats = NDArray[np.float64]

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color), less black and what is near another.
_FIRST: tuple[Colour, ...] = (
    *((230, 159, 0), (86, 180, 233), (0, 158, 115)),
    *((240, 228, 66), (0, 114, 178), (213, 94, 0)),
)
_MOST = 1024  # colours that differ from one another
_STEPS = 16  # per channel, of the colours that are tried
# Those that show over dark roads and bright skies, and are no greys; OKLab's lightness and chroma.
_LIGHTNESS, _CHROMA = (0.45, 0.95), 0.05

# How linear RGB looks without one kind of cones, and what a distance seen so counts for: Machado,
# Oliveira and Fernandes (doi:10.1109/TVCG.2009.113), severity 1.
_SIGHT = (
    (1.0, ((1, 0, 0), (0, 1, 0), (0, 0, 1))),
    (
        0.7,  # protanopia
        (
            (0.152286, 1.052583, -0.204868),
            (0.114503, 0.786281, 0.099216),
            (-0.003882, -0.048116, 1.051998),
        ),
    ),
    (
        0.7,  # deuteranopia
        (
            (0.367322, 0.860646, -0.227968),
            (0.280085, 0.672501, 0.047413),
            (-0.011820, 0.042940, 0.968881),
        ),
    ),
    (
        0.5,  # tritanopia, which is rare
        (
            (1.255528, -0.076749, -0.178779),
            (-0.078411, 0.930809, 0.147602),
            (0.004733, 0.691367, 0.303900),
        ),
    ),
)

# From linear sRGB to OKLab (https://bottosson.github.io/posts/oklab).
_TO_CONES = np.array(
    (
        (0.4122214708, 0.5363325363, 0.0514459929),
        (0.2119034982, 0.6806995451, 0.1073969566),
        (0.0883024619, 0.2817188376, 0.6299787005),
    )
)
_TO_LAB = np.array(
    (
        (0.2104542553, 0.7936177850, -0.0040720468),
        (1.9779984951, -2.4285922050, 0.4505937099),
        (0.0259040371, 0.7827717662, -0.8086757660),
    )
)


def distinct_palette(count: int) -> tuple[Colour, ...]:
    """``count`` colours of which each is as far as it can be from those before it, so that fewer
    are the beginning of more.

    Distances are OKLab's, the smallest of those that people see with all cones, or without one of
    the three kinds. The first six are Okabe and Ito's. After 1,024 they begin anew.
    """
    colours = further(_FIRST, min(count, _MOST) - len(_FIRST))
    colours = (*_FIRST, *colours)[: max(0, count)]
    return tuple(colours[index % len(colours)] for index in range(count))


@lru_cache(maxsize=32)
def further(taken: tuple[Colour, ...], count: int) -> tuple[Colour, ...]:
    """``count`` more colours, each as far as it can be from those ``taken`` and those before it."""
    tried, seen = _candidates()
    nearest = np.full(len(tried), np.inf)
    for colour in taken:
        nearest = np.minimum(nearest, _distances(seen, _seen(np.array([colour]))))
    found = []
    for _ in range(count):
        best = int(nearest.argmax())
        found.append(tuple(tried[best].tolist()))
        nearest = np.minimum(nearest, _distances(seen, seen[..., best : best + 1]))
    return tuple(found)


def hex_colour(text: str) -> Colour | None:
    """The colour ``#rrggbb``; None for what has not this form."""
    if not re.fullmatch("#[0-9a-fA-F]{6}", text):
        return None
    red, green, blue = bytes.fromhex(text[1:])
    return red, green, blue


@lru_cache(maxsize=1)
def _candidates() -> tuple[NDArray[np.int64], Floats]:
    """The colours that are tried [K, 3], and how they look [sights, 3, K]."""
    grid = np.linspace(0, 255, _STEPS).round().astype(np.int64)
    colours = np.stack(np.meshgrid(grid, grid, grid, indexing="ij"), -1).reshape(-1, 3)
    seen = _seen(colours)
    lightness, a, b = seen[0]
    low, high = _LIGHTNESS
    kept = (lightness >= low) & (lightness <= high) & (np.hypot(a, b) >= _CHROMA)
    return colours[kept], seen[..., kept]


def _distances(seen: Floats, other: Floats) -> Floats:
    """From each of [sights, 3, K] to [sights, 3, 1], squared, the smallest of all sights; rounded,
    so that the last bits of one machine or another decide nothing."""
    return np.asarray(((seen - other) ** 2).sum(1).min(0).round(9), np.float64)


def _seen(colours: NDArray[np.int64]) -> Floats:
    """Colours [K, 3] in OKLab [sights, 3, K], as each sight has them, times what it counts for;
    the first sight has all cones."""
    part = colours / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    return np.stack([weight * _oklab(np.array(sight) @ linear.T) for weight, sight in _SIGHT])


def _oklab(linear: Floats) -> Floats:
    return np.asarray(_TO_LAB @ np.cbrt(_TO_CONES @ linear.clip(0, 1)), np.float64)
