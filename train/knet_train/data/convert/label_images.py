"""Images whose pixels are labels: by number, or by colour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from knet_runtime.errors import DataError
from knet_runtime.labels import Colour
from knet_train.data.convert.source import VOID, Drawing, Size
from knet_train.data.label_files import UNREADABLE

_SHOWN = 4  # values, or colours, in one line


@dataclass(frozen=True)
class Coding:
    """What the pixels of label images mean: a class, or VOID, for each of the ``values`` of grey
    and palette images, or for each of the ``colours``.

    Where both are given, an RGB image is read by colour, and any other by its values.
    """

    values: Mapping[int, int] = field(default_factory=dict)
    colours: Mapping[Colour, int] = field(default_factory=dict)

    def classes(self, path: Path) -> NDArray[np.int16]:
        """The classes int16 [H, W] of a label image. Raises DataError, with pixel counts, where
        it holds others."""
        pixels = read_pixels(path, colours=not self.values)
        by_colour = pixels.ndim == 3
        if by_colour:
            if not self.colours:
                raise DataError(
                    f"{path} is painted in colours, and nothing says what they mean: write "
                    "class_dict.csv beside the folders, a line name,r,g,b for each class"
                )
            pixels = packed(pixels)
            table = {(r << 16) | (g << 8) | b: found for (r, g, b), found in self.colours.items()}
        else:
            table = dict(self.values)
        known = np.array(sorted(table), np.int64)
        means = np.array([table[value] for value in known.tolist()], np.int16)
        place = np.minimum(np.searchsorted(known, pixels), len(known) - 1)
        right = known[place] == pixels
        if not right.all():
            raise DataError(f"{path} {_strange(pixels[~right], by_colour=by_colour)}")
        return means[place]

    def draw(self, path: Path, _: Size) -> Drawing:
        """The same as a drawing, without objects."""
        return Drawing(self.classes(path))


def _strange(pixels: NDArray[np.int64], *, by_colour: bool) -> str:
    """What to say of a label image's pixels that mean nothing."""
    found, counts = np.unique(pixels, return_counts=True)
    order = np.argsort(-counts)[:_SHOWN]
    shown = ", ".join(
        f"{_colour_text(found[n]) if by_colour else found[n]} ({counts[n]} pixels)" for n in order
    )
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    if by_colour:
        return (
            f"holds {counts.sum()} pixels of {len(found)} colours that its classes do not have: "
            f"{shown}{more}; labels must keep exact colours, as PNG does and JPEG does not: export "
            "it again, or add the colour to the list of classes"
        )
    return (
        f"holds {counts.sum()} pixels of values that are no class: {shown}{more}; mend the file, "
        "or the list of classes"
    )


def read_pixels(path: Path, *, colours: bool = False) -> NDArray[np.int64]:
    """A label image as int64: [H, W] of the numbers of a grey or palette image, [H, W, 3] of an
    RGB image, and with ``colours`` of any. Raises DataError."""
    try:
        with Image.open(path) as opened:
            grey = opened.mode in ("1", "L", "P", "I", "I;16")
            if not grey and opened.mode not in ("RGB", "RGBA", "LA", "PA"):
                raise DataError(
                    f"{path} is a {opened.mode} image: labels are grey, palette or RGB images"
                )
            if grey and not colours:
                return np.asarray(opened).astype(np.int64)
            return np.asarray(opened.convert("RGB")).astype(np.int64)
    except UNREADABLE as error:
        raise DataError(f"cannot read label {path}: {error}; write the file again") from error


def packed(pixels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Colours [H, W, 3] as one number each, [H, W]."""
    return (pixels[..., 0] << 16) | (pixels[..., 1] << 8) | pixels[..., 2]


def numbered(path: Path, nothing: tuple[int, ...]) -> NDArray[np.uint16]:
    """The objects of an image in which each has a value or colour of its own, numbered from 1;
    ``nothing`` are the values (R << 16 | G << 8 | B of colours) that are none."""
    pixels = read_pixels(path)
    flat = packed(pixels) if pixels.ndim == 3 else pixels
    found, inverse = np.unique(flat, return_inverse=True)
    numbers = np.cumsum(~np.isin(found, nothing)) * ~np.isin(found, nothing)
    return numbers.astype(np.uint16)[inverse].reshape(flat.shape)


def _colour_text(value: int) -> str:
    return f"{value >> 16},{value >> 8 & 255},{value & 255}"


def numbers_of(count: int, *, void: int | None = 255) -> dict[int, int]:
    """The values 0 … ``count`` - 1 as their own classes, and the value of void."""
    return {**({} if void is None else {void: VOID}), **{n: n for n in range(count)}}
