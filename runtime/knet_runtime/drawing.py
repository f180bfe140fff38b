"""Images drawn from class maps: colours, a blend, a legend, the mark of a stale frame; encoding.

Every array is RGB, as everywhere in this package; OpenCV's BGR stays inside this file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray

from knet_runtime.errors import ConfigError
from knet_runtime.labels import Colour, LabelMap
from knet_runtime.types import ClassMap, Rgb, Size, as_utf8

OPACITY = 0.4
"""Of the colours over an image, where nothing else is asked for."""

_LEGEND_CLASSES = 24
_BAND = 1 << 17  # pixels that are drawn at a time
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_HAS_FONTS = hasattr(cv2, "FontFace")  # of OpenCV 5; those of 4 know ASCII only
_STALE_RED = (200, 0, 0)


def colourise(class_map: ClassMap, labels: LabelMap) -> Rgb:
    """``labels.palette[class_map]`` as uint8 [H, W, 3] RGB, exactly.

    ``class_map`` is uint8 or uint16 [H, W]. The ignore index and every other value without a class
    become black.
    """
    return look_up(class_map, dict(enumerate(labels.palette)))


def look_up(ids: ClassMap, colours: Mapping[int, Colour]) -> Rgb:
    """The colours of ``ids`` [H, W] as uint8 [H, W, 3] RGB; black where there is none."""
    return _painted(ids, _table(colours))


def _table(colours: Mapping[int, Colour]) -> NDArray[np.uint8]:
    table = np.zeros((max(256, max(colours, default=0) + 2), 4), np.uint8)
    table[list(colours), :3] = np.reshape(list(colours.values()), (-1, 3))
    return table


def _painted(ids: ClassMap, table: NDArray[np.uint8]) -> Rgb:
    if ids.dtype != np.uint8:
        return table[:, :3][np.minimum(ids, len(table) - 1)]
    # Four bytes as one number: one look-up for each pixel, and dropping the fourth byte is cheap.
    packed = cv2.LUT(ids, table[:256].view(np.int32).reshape(1, 256))
    four = packed.view(np.uint8).reshape(*ids.shape, 4)
    return np.asarray(cv2.cvtColor(four, cv2.COLOR_RGBA2RGB), np.uint8)


def blend(
    image: Rgb,
    class_map: ClassMap,
    labels: LabelMap,
    alpha: float,
    classes: Collection[int] | None = None,
) -> Rgb:
    """``lay`` the classes' colours over ``image``: those of ``classes``, or of all (None)."""
    shown = range(labels.num_classes) if classes is None else classes
    return lay(image, class_map, {index: labels.palette[index] for index in shown}, alpha)


def lay(
    image: Rgb,
    ids: ClassMap,
    colours: Mapping[int, Colour],
    alpha: float,
    lines: Mapping[int, Colour] | None = None,
) -> Rgb:
    """Lay the ``colours`` of ``ids`` [H, W] over ``image`` uint8 [H, W, 3] RGB; a new array.

    With a = round(256 · alpha) each sample is (image · (256 - a) + colour · a + 128) // 256, in
    integers, the same on every machine: alpha 0 gives the image, alpha 1 the colours. Where ``ids``
    have no colour the image shows untouched. ``lines`` are the colours of the borders of the same
    ids with others, inside of them and ``line_width`` wide; with alpha 0 there are none. Raises
    ConfigError when alpha lies outside 0 … 1, ValueError when the sizes differ.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha is {alpha}; the overlay's opacity lies between 0 and 1")
    if image.shape[:2] != ids.shape:
        raise ValueError(f"image {image.shape[:2]} and map {ids.shape} differ in size")
    if not ids.size:
        return image.copy()
    share = round(256 * alpha) / 256
    fills, edges = _table(colours), None if lines is None or not share else _table(lines)
    clear = np.full(len(fills), 255, np.uint8)
    clear[list(colours)] = 0
    some_clear = clear[: int(ids.max()) + 1].any() or ids.max() >= len(clear)
    result = np.empty(image.shape, np.uint8)
    # A band of rows at a time, which stays in the processor's cache.
    rows = max(1, _BAND // ids.shape[1])
    for top in range(0, len(ids), rows):
        band = slice(top, top + rows)
        part, drawn = ids[band], result[band]
        painted = _painted(part, fills)
        # OpenCV adds in float32, which holds every one of these sums exactly, and rounds to the
        # nearest: with half of the smallest step on top a half goes up, as the formula says.
        cv2.addWeighted(image[band], 1 - share, painted, share, 1 / 512, drawn)
        if edges is not None:
            full = painted if lines is colours else _painted(part, edges)
            cv2.copyTo(full, _borders(ids, band), drawn)
        if some_clear:
            cv2.copyTo(image[band], select(part, clear), drawn)
    return result


def _borders(ids: ClassMap, band: slice) -> NDArray[np.uint8]:
    """Not 0 where ``ids`` [H, W] change within ``line_width`` pixels, in these rows; the image's
    own edge is no border."""
    near = line_width(ids.shape)
    first = max(0, band.start - near)
    kernel = np.ones((2 * near + 1, 2 * near + 1), np.uint8)
    edges = cv2.morphologyEx(ids[first : band.stop + near], cv2.MORPH_GRADIENT, kernel)
    edges = edges[band.start - first :][: band.stop - band.start]
    return np.asarray(edges if edges.dtype == np.uint8 else edges > 0, np.uint8)


def line_width(size: Size) -> int:
    """Pixels of a line that is seen well on an image of this (height, width)."""
    return max(1, round(min(size) / 480))


def text_scale(size: Size) -> float:
    """OpenCV's font scale for an image of this (height, width): letters never too small to be
    read, and the same part of every large image."""
    return max(0.36, min(size) / 1400)


def text_size(text: str, scale: float) -> tuple[int, int, int]:
    """Width of drawn text, its height above the base line and below it, in pixels."""
    (long, tall), below = cv2.getTextSize(drawable(text), _FONT, scale, _stroke(scale))
    return int(long), int(tall), int(below)


def write(
    image: Rgb, text: str, at: tuple[int, int], scale: float, ink: Colour = (255, 255, 255)
) -> None:
    """Write ``text`` into ``image`` uint8 [H, W, 3], its base line beginning at ``at`` (x, y)."""
    cv2.putText(image, drawable(text), at, _FONT, scale, ink, _stroke(scale), cv2.LINE_AA)


def _stroke(scale: float) -> int:
    """Lines of OpenCV 4's letters are as wide as they are told; those of OpenCV 5's fonts grow."""
    return 1 if _HAS_FONTS else max(1, round(1.3 * scale))


def resized(ids: ClassMap, size: Size) -> ClassMap:
    """``ids`` [h, w] at ``size`` (height, width), each pixel that of the nearest."""
    return cast(ClassMap, cv2.resize(ids, size[::-1], interpolation=cv2.INTER_NEAREST))


def select(class_map: ClassMap, table: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``table`` [N', N' ≥ 256] at each value of the map; its last entry beyond it; uint8 [H, W]."""
    if class_map.dtype == np.uint8:
        return np.asarray(cv2.LUT(class_map, table[:256]), np.uint8)
    return table[np.minimum(class_map, len(table) - 1)]


class LegendGrid:
    """Where colours and names of ``classes`` stand in a strip of ``width`` pixels.

    ``scale`` is that of ``text_scale``. As wide as the longest name needs them are the columns, so
    names stay where they are whichever are shown.
    """

    def __init__(
        self, labels: LabelMap, classes: Collection[int], width: int, scale: float
    ) -> None:
        self._labels = labels
        self._width, self._scale = width, scale
        self._swatch = round(30 * scale)
        self._pad = max(3, round(14 * scale))
        self._row = self._swatch + round(22 * scale)
        sizes = [text_size(f"{labels.names[index]} 100%", scale) for index in classes]
        self._tall = max((tall for _, tall, _ in sizes), default=0)
        self._cell = 3 * self._pad + self._swatch + max((long for long, _, _ in sizes), default=0)
        self.columns = max(1, width // self._cell)

    def draw(
        self, places: Mapping[int, int], count: int, shares: Mapping[str, float] | None = None
    ) -> Rgb:
        """The strip with room for ``count`` names, uint8 [h, width, 3] RGB on dark grey.

        ``places`` (from 0 on, row by row) are those of the classes that are shown; ``shares``
        (0 … 1 by class name) are written as percentages.
        """
        rows = max(1, -(-count // self.columns))
        strip = np.full((rows * self._row + self._pad, self._width, 3), 32, np.uint8)
        for index, place in places.items():
            left = place % self.columns * self._cell + self._pad
            top = place // self.columns * self._row + self._pad
            corner = (left + self._swatch, top + self._swatch)
            cv2.rectangle(strip, (left, top), corner, self._labels.palette[index], cv2.FILLED)
            cv2.rectangle(strip, (left, top), corner, (160, 160, 160), 1)
            text = self._labels.names[index]
            if shares is not None:
                text += f" {_percent(shares.get(text, 0.0))}"
            below = top + (self._swatch + self._tall) // 2
            write(strip, text, (corner[0] + self._pad, below), self._scale, (235, 235, 235))
        return strip


def _percent(share: float) -> str:
    return "<1%" if 0 < share < 0.005 else f"{100 * share:.0f}%"


def legend_strip(
    labels: LabelMap,
    width: int,
    shares: Mapping[str, float] | None = None,
    classes: Collection[int] | None = None,
    scale: float = 0.42,
) -> Rgb:
    """Colours and names of ``classes`` (None: all) in rows, uint8 [h, width, 3] RGB.

    ``shares`` (0 … 1 by class name) are written as percentages. Of more than 24 classes the 24 with
    the largest share are shown. OpenCV 5 draws names in most scripts; what it has no glyph for, and
    with OpenCV 4 all outside ASCII, is shown as "?".
    """
    shown = legend_classes(labels, shares or {}, classes)
    grid = LegendGrid(labels, shown, width, scale)
    return grid.draw({index: place for place, index in enumerate(shown)}, len(shown), shares)


def legend_classes(
    labels: LabelMap, shares: Mapping[str, float], classes: Collection[int] | None
) -> list[int]:
    """Of ``classes`` (None: all) those that a legend has room for, the largest, in label order."""
    shown = sorted(range(labels.num_classes) if classes is None else classes)
    if len(shown) > _LEGEND_CLASSES:
        shown.sort(key=lambda index: -shares.get(labels.names[index], 0.0))
    return sorted(shown[:_LEGEND_CLASSES])


def drawable(text: str) -> str:
    """Text as OpenCV's fonts can draw it."""
    if _HAS_FONTS:
        return as_utf8(text)
    return text.replace("×", "x").replace("·", "-").encode("ascii", "replace").decode()


def mark_stale(image: Rgb, seconds: float) -> Rgb:
    """A copy with a red border, and across its top that no image has come for ``seconds``."""
    height, width = image.shape[:2]
    marked = image.copy()
    line = max(2, min(height, width) // 90)
    cv2.rectangle(marked, (0, 0), (width - 1, height - 1), _STALE_RED, line)
    text = f"STALE {seconds:.0f} s"
    (long, tall), _ = cv2.getTextSize(text, _FONT, 1.0, 2)
    scale = min(0.9 * width / long, max(0.5, height / 720))
    band = min(height, round(2 * tall * scale) + 2)
    marked[:band] = _STALE_RED
    at = (round((width - long * scale) / 2), round((band + tall * scale) / 2))
    stroke = max(1, round(2 * scale))
    cv2.putText(marked, text, at, _FONT, scale, (255, 255, 255), stroke, cv2.LINE_AA)
    return marked


def letterbox(image: Rgb, hw: tuple[int, int]) -> Rgb:
    """Scale uint8 [h, w, 3] to fit (height, width), centred on black; the same array if it fits."""
    height, width = image.shape[:2]
    if (height, width) == hw:
        return image
    scale = min(hw[0] / height, hw[1] / width)
    inner = max(1, min(hw[0], round(height * scale))), max(1, min(hw[1], round(width * scale)))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    canvas = np.zeros((*hw, 3), np.uint8)
    top, left = (hw[0] - inner[0]) // 2, (hw[1] - inner[1]) // 2
    canvas[top : top + inner[0], left : left + inner[1]] = cv2.resize(
        image, (inner[1], inner[0]), interpolation=method
    )
    return canvas


def encode_png(pixels: Rgb | ClassMap) -> bytes:
    """A PNG of uint8 [H, W, 3] RGB, or grey of uint8 or uint16 [H, W]. Raises ValueError when PNG
    cannot hold its size."""
    return _encode(".png", pixels, [])


def encode_jpeg(image: Rgb, quality: int) -> bytes:
    """A JPEG of uint8 [H, W, 3] RGB at ``quality`` 0 … 100. Raises ValueError when a side is above
    65,500 pixels."""
    return _encode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])


def _encode(suffix: str, pixels: Rgb | ClassMap, options: list[int]) -> bytes:
    if pixels.ndim == 3:
        pixels = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), np.uint8)
    try:
        encoded, data = cv2.imencode(suffix, pixels, options)
    except cv2.error:
        encoded = False
    if not encoded:
        raise ValueError(f"{pixels.shape} cannot be encoded as {suffix[1:].upper()}")
    return data.tobytes()
