"""A confusion matrix as a picture that can be read for eleven classes and for 150."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from knet_runtime.labels import LabelMap
from knet_runtime.metrics import ConfusionMatrix

Rgb = NDArray[np.uint8]

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_INK, _PALE, _PAPER, _LINE = (40, 40, 40), (120, 120, 120), 255, (232, 232, 232)
_MARGIN, _LONGEST_NAME = 24, 26
_TICKS = (0, 1, 5, 10, 25, 50, 75, 100)  # percent, on the scale beside the matrix
# From white over blue to near black: brightness falls evenly, so that a grey print can be read too.
_RAMP = ((255, 255, 255), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107))


def draw_confusion(confusion: ConfusionMatrix, labels: LabelMap, title: str) -> bytes:
    """PNG bytes. A row is a labelled class, a column a predicted one; colours are shares of the
    row's pixels on a square-root scale, so that confusions of one in a hundred show. Up to 30
    classes have the percentages in the cells. A class that was never labelled has a grey row."""
    count = labels.num_classes
    totals = confusion.matrix.sum(1)
    shares = confusion.matrix / np.maximum(totals, 1)[:, None]
    cell, scale = (46, 0.46) if count <= 30 else (14, 0.36)
    names = [_short(name) for name in labels.names]
    widest = max(_width(name, scale) for name in names)
    left, top = _MARGIN + 22 + widest + 8, _MARGIN + 40 + widest + 8
    side = cell * count
    picture = np.full((top + side + _MARGIN, left + side + 110, 3), _PAPER, np.uint8)
    colours = _ramp(np.sqrt(shares))
    colours[totals == 0] = 243
    picture[top : top + side, left : left + side] = colours.repeat(cell, 0).repeat(cell, 1)
    for index in range(count + 1):
        edge = index * cell
        cv2.line(picture, (left, top + edge), (left + side, top + edge), _LINE, 1)
        cv2.line(picture, (left + edge, top), (left + edge, top + side), _LINE, 1)
    for index, name in enumerate(names):
        ink = _INK if totals[index] else _PALE
        middle = index * cell + cell // 2
        _text(picture, name, (left - 8 - _width(name, scale), top + middle + 4), scale, ink)
        _upright(picture, name, (left + middle, top - 8), scale, _INK)
    if count <= 30:
        _percentages(picture[top:, left:], shares, totals, cell)
    _text(picture, _short(title, 110), (_MARGIN, _MARGIN + 12), 0.6, _INK)
    _text(picture, "predicted", (left, _MARGIN + 34), 0.46, _PALE)
    _upright(picture, "labelled", (_MARGIN + 4, top + _width("labelled", 0.46)), 0.46, _PALE)
    _draw_scale(picture, left + side + 24, top, min(side, 400))
    _, data = cv2.imencode(".png", np.ascontiguousarray(picture[..., ::-1]))
    return data.tobytes()


def _percentages(
    cells: Rgb, shares: NDArray[np.float64], totals: NDArray[np.int64], cell: int
) -> None:
    for row, column in zip(*np.nonzero((shares >= 0.005) & (totals[:, None] > 0)), strict=True):
        text = f"{100 * shares[row, column]:.0f}"
        ink = (255, 255, 255) if shares[row, column] > 0.3 else _INK
        left = column * cell + (cell - _width(text, 0.44)) // 2
        _text(cells, text, (left, row * cell + cell // 2 + 5), 0.44, ink)


def _draw_scale(picture: Rgb, left: int, top: int, height: int) -> None:
    shares = np.linspace(1, 0, height)[:, None]
    picture[top : top + height, left : left + 16] = _ramp(shares)
    cv2.rectangle(picture, (left, top), (left + 16, top + height), _LINE, 1)
    for tick in _TICKS:
        at = top + round((1 - np.sqrt(tick / 100)) * height)
        cv2.line(picture, (left + 16, at), (left + 20, at), _PALE, 1)
        _text(picture, f"{tick} %", (left + 25, at + 4), 0.4, _PALE)


def _ramp(values: NDArray[np.float64]) -> Rgb:
    """0 … 1, of any shape, -> RGB with one more axis."""
    at = np.linspace(0, 1, len(_RAMP))
    channels = [np.interp(values, at, [colour[c] for colour in _RAMP]) for c in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def _short(text: str, longest: int = _LONGEST_NAME) -> str:
    plain = text.encode("ascii", "replace").decode()
    return plain if len(plain) <= longest else plain[: longest - 2] + ".."


def _width(text: str, scale: float) -> int:
    return int(cv2.getTextSize(text, _FONT, scale, 1)[0][0])


def _text(
    picture: Rgb, text: str, at: tuple[int, int], scale: float, ink: tuple[int, int, int]
) -> None:
    cv2.putText(picture, text, at, _FONT, scale, ink, 1, cv2.LINE_AA)


def _upright(
    picture: Rgb, text: str, at: tuple[int, int], scale: float, ink: tuple[int, int, int]
) -> None:
    """Text that reads upwards: it begins at ``at`` (x of its middle, y) on the white paper."""
    (width, height), below = cv2.getTextSize(text, _FONT, scale, 1)
    strip = np.full((height + below + 2, width + 2, 3), _PAPER, np.uint8)
    _text(strip, text, (1, height + 1), scale, ink)
    turned = np.ascontiguousarray(np.rot90(strip))
    top, left = at[1] - turned.shape[0], at[0] - (height + 2) // 2
    part = picture[top : top + turned.shape[0], left : left + turned.shape[1]]
    np.minimum(part, turned, out=part)
