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

_LEGEND_CLASSES = 24
_ROW, _PAD, _SWATCH = 22, 6, 12
_FONT, _SCALE = cv2.FONT_HERSHEY_SIMPLEX, 0.42
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
    table = np.zeros((max(256, max(colours, default=0) + 2), 4), np.uint8)
    table[list(colours), :3] = np.reshape(list(colours.values()), (-1, 3))
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


def lay(image: Rgb, ids: ClassMap, colours: Mapping[int, Colour], alpha: float) -> Rgb:
    """Lay the ``colours`` of ``ids`` [H, W] over ``image`` uint8 [H, W, 3] RGB; a new array.

    With a = round(256 · alpha) each sample is (image · (256 - a) + colour · a + 128) // 256, in
    integers, the same on every machine: alpha 0 gives the image, alpha 1 the colours. Where ``ids``
    have no colour the image shows untouched. Raises ConfigError when alpha lies outside 0 … 1,
    ValueError when the sizes differ.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha is {alpha}; the overlay's opacity lies between 0 and 1")
    if image.shape[:2] != ids.shape:
        raise ValueError(f"image {image.shape[:2]} and map {ids.shape} differ in size")
    if not ids.size:
        return image.copy()
    share = round(256 * alpha) / 256
    # OpenCV adds in float32, which holds every one of these sums exactly, and rounds to the
    # nearest: with half of the smallest step on top a half goes up, as the formula says.
    painted = look_up(ids, colours)
    result = np.asarray(cv2.addWeighted(image, 1 - share, painted, share, 1 / 512), np.uint8)
    if any(value not in colours for value in range(int(ids.max()) + 1)):
        untouched = np.full(max(256, max(colours, default=0) + 2), 255, np.uint8)
        untouched[list(colours)] = 0
        cv2.copyTo(image, select(ids, untouched), result)
    return result


def resized(ids: ClassMap, size: Size) -> ClassMap:
    """``ids`` [h, w] at ``size`` (height, width), each pixel that of the nearest."""
    return cast(ClassMap, cv2.resize(ids, size[::-1], interpolation=cv2.INTER_NEAREST))


def select(class_map: ClassMap, table: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``table`` [N', N' ≥ 256] at each value of the map; its last entry beyond it; uint8 [H, W]."""
    if class_map.dtype == np.uint8:
        return np.asarray(cv2.LUT(class_map, table[:256]), np.uint8)
    return table[np.minimum(class_map, len(table) - 1)]


def legend_strip(
    labels: LabelMap,
    width: int,
    shares: dict[str, float] | None = None,
    classes: Collection[int] | None = None,
) -> Rgb:
    """Names and colours of the classes, in rows, as uint8 [h, width, 3] RGB on dark grey.

    ``shares`` (0 … 1 by class name) are written as percentages; ``classes`` are those shown (None:
    all). The height follows from labels, classes and width alone, so the strips of a video fit one
    another. Of more than 24 classes the 24 with the largest share are shown. OpenCV 5 draws names
    in most scripts; what it has no glyph for, and with OpenCV 4 all outside ASCII, is shown as "?".
    """
    shown = sorted(range(labels.num_classes) if classes is None else classes)
    # All names count, not only those shown now, so that the columns stay where they are.
    texts = {index: drawable(labels.names[index]) for index in shown}
    if len(shown) > _LEGEND_CLASSES:
        if shares is not None:
            shown.sort(key=lambda index: -shares.get(labels.names[index], 0.0))
        shown = sorted(shown[:_LEGEND_CLASSES])
    widest = max(
        (cv2.getTextSize(f"{text} 100%", _FONT, _SCALE, 1)[0][0] for text in texts.values()),
        default=0,
    )
    cell = _PAD + _SWATCH + _PAD + widest + _PAD
    columns = max(1, width // cell)
    rows = -(-len(shown) // columns)
    strip = np.full((rows * _ROW + _PAD, width, 3), 32, np.uint8)
    for place, index in enumerate(shown):
        left = place % columns * cell + _PAD
        top = place // columns * _ROW + _PAD
        corner = (left + _SWATCH, top + _SWATCH)
        cv2.rectangle(strip, (left, top), corner, labels.palette[index], cv2.FILLED)
        cv2.rectangle(strip, (left, top), corner, (160, 160, 160), 1)
        text = texts[index]
        if shares is not None:
            text += f" {100 * shares.get(labels.names[index], 0.0):.0f}%"
        at = (left + _SWATCH + _PAD, top + _SWATCH - 1)
        cv2.putText(strip, text, at, _FONT, _SCALE, (235, 235, 235), 1, cv2.LINE_AA)
    return strip


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
