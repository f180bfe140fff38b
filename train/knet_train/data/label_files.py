"""Label files: 8-bit PNGs of class indices, what their values mean, and the colours of those that
have a palette."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from knet_runtime.errors import DataError
from knet_runtime.labels import Colour, LabelMap
from knet_train.data.layouts import Layout

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
_NEAR = 16  # colours whose channels differ by no more are one: JPEG moves them


class LabelFile(NamedTuple):
    """A label file's own values, and what each value looks like where the file has a palette."""

    values: NDArray[np.uint8]  # [H, W]
    palette: NDArray[np.uint8] | None  # RGB [up to 256, 3]


class LabelCount(NamedTuple):
    """What one label file holds."""

    shape: tuple[int, int]  # height, width
    pixels: NDArray[np.int64]  # of each value, [256]
    colours: dict[int, Colour]  # of each value that occurs, where the file has a palette


def read_file(path: Path) -> LabelFile:
    """Raises DataError when it is no 8-bit PNG of one channel."""
    try:
        with Image.open(path) as opened:
            if opened.mode not in ("L", "P"):
                raise DataError(
                    f"{path} is a {opened.mode} image: labels are 8-bit PNGs of class indices, "
                    "which `knet-deploy data convert` makes of colours"
                )
            palette = opened.getpalette()
            # Not cv2: it would paint a palette PNG instead of giving its indices.
            values = np.array(opened, np.uint8)
            colours = None if palette is None else np.array(palette, np.uint8).reshape(-1, 3)
            return LabelFile(values, colours)
    except UNREADABLE as error:
        raise DataError(f"cannot read label {path}: {error}; write the PNG again") from error


def read_label(path: Path, labels: LabelMap, *, void_first: bool = False) -> NDArray[np.uint8]:
    """A PNG of class indices (grey or palette) -> uint8 [H, W]; DataError when it holds others.

    With ``void_first`` the file holds 0 for void and v for class v - 1 (mmsegmentation's
    ``reduce_zero_label``).
    """
    values = read_file(path).values
    table = label_table(labels, void_first=void_first)
    outside = outside_values(np.bincount(values.ravel(), minlength=256), table)
    if outside:
        raise DataError(
            f"{path} holds label {outside[0]}; {allowed_values(labels, void_first=void_first)}"
        )
    return table.astype(np.uint8)[values] if void_first else values


def count_label(path: Path) -> LabelCount:
    """Read a label file and keep only its counts. Raises as ``read_file`` does."""
    values, palette = read_file(path)
    pixels = np.bincount(values.ravel(), minlength=256)
    colours: dict[int, Colour] = {}
    if palette is not None:
        for value in np.flatnonzero(pixels[: len(palette)]).tolist():
            red, green, blue = palette[value].tolist()
            colours[value] = (red, green, blue)
    return LabelCount((values.shape[0], values.shape[1]), pixels, colours)


def label_table(labels: LabelMap, *, void_first: bool) -> NDArray[np.int16]:
    """What each value of a label file means, int16 [256]: a class, the ignore index, or -1."""
    table = np.full(256, -1, np.int16)
    first = int(void_first)
    table[labels.ignore_index] = labels.ignore_index
    table[first : first + labels.num_classes] = np.arange(labels.num_classes)
    if void_first:
        table[0] = labels.ignore_index
    return table


def outside_values(pixels: NDArray[np.int64], table: NDArray[np.int16]) -> list[int]:
    """The values that occur and mean nothing."""
    found: list[int] = np.flatnonzero((pixels > 0) & (table < 0)).tolist()
    return found


def allowed_values(labels: LabelMap, *, void_first: bool) -> str:
    """What a label file may hold, and what to do about others, in words."""
    classes = f"1 … {labels.num_classes}" if void_first else f"0 … {labels.num_classes - 1}"
    void = "0" if void_first else str(labels.ignore_index)
    return f"its classes are {classes} and {void} (ignore): fix the file, or labels.json"


class Palettes:
    """Holds the palettes of label files against the colours of the classes, or, where labels.json
    states none, against those of the files before.

    Programs that turn a painted mask into a palette PNG number the colours by their own rules; the
    file then looks right, and every label in it is another class's.
    """

    def __init__(self, layout: Layout) -> None:
        self.labels, self.painted = layout.labels, layout.painted
        self.table = label_table(layout.labels, void_first=layout.void_first)
        self.known: dict[int, Colour] = {}  # by class
        if layout.painted:
            self.known = dict(enumerate(layout.labels.palette))

    def fault(self, path: Path, count: LabelCount) -> str | None:
        """What contradicts in one file, in words.

        It does where one of its colours is another class's, unless the palette has little to do
        with those of the classes, as the one that a program gives to all its files.
        """
        right: list[int] = []  # values that look like their own class
        wrong: list[tuple[int, int]] = []  # like another, which is named
        strange: list[int] = []  # like none
        for value, colour in count.colours.items():
            label = int(self.table[value])
            if not 0 <= label < self.labels.num_classes:
                continue
            alike = [other for other, known in self.known.items() if _alike(colour, known)]
            if label in alike:
                right.append(value)
            elif alike:
                wrong.append((value, alike[0]))
            else:
                strange.append(value)
            if not self.painted:
                self.known.setdefault(label, colour)
        if not wrong or (strange and len(wrong) <= max(len(right), len(strange) - 1)):
            return None
        value, other = wrong[0]
        own, others = (self.labels.names[label] for label in (int(self.table[value]), other))
        source = "labels.json" if self.painted else "other files' palettes"
        return (
            f"{path}: its palette gives label {value} ({own}) the colour that {others} has in "
            f"{source}: number its pixels by class"
        )


def _alike(a: Colour, b: Colour) -> bool:
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) <= _NEAR
