"""Drawings for people: a data set's contact sheet and an evaluation's confusion matrix."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from knet_runtime.drawing import blend, drawable, encode_png, lay, legend_strip, resized
from knet_runtime.labels import Colour, LabelMap
from knet_runtime.metrics import ConfusionMatrix
from knet_runtime.painting import shade
from knet_runtime.preprocess import resize
from knet_runtime.types import ClassMap, Rgb
from knet_train.data.dataset import LabelledFolder
from knet_train.data.segment_folder import SegmentFolder
from knet_train.data.truth import Truth

_FONT = cv2.FONT_HERSHEY_SIMPLEX

_COLUMNS, _PAIRS = 3, 12
_BOX = (180, 240)  # height, width of an image's place; half of a pair
_CAPTION, _GAP = 24, 14
_DARK, _LIGHT = 32, (225, 225, 225)
_OPACITY = 0.65
_VOID = (255, 0, 255)  # no label map paints with it
_CROWD = (255, 255, 255)

_INK, _PALE, _PAPER, _LINE = (40, 40, 40), (120, 120, 120), 255, (232, 232, 232)
_MARGIN, _LONGEST_NAME = 24, 26
_TICKS = (0, 1, 5, 10, 25, 50, 75, 100)  # percent, on the scale beside the matrix
# From white over blue to near black: brightness falls evenly, so that a grey print can be read too.
_RAMP = ((255, 255, 255), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107))


def draw_sheet(folder: LabelledFolder | SegmentFolder, shares: dict[str, float]) -> bytes:
    """Up to twelve images, evenly spread over the folder, each beside itself under its labels;
    PNG bytes. Class maps are shown in their colours, things each in a shade of its own with an
    outline; crowds are crossed by white lines, and pixels without a label by magenta ones.

    ``shares`` (0 … 1 by class name) are written into the legend, which leaves out classes without
    any. Raises what the folder's ``read`` raises.
    """
    count = min(_PAIRS, len(folder))
    columns = min(_COLUMNS, count)
    cell = (_BOX[0] + _CAPTION + _GAP, 2 * _BOX[1] + 4 + _GAP)
    rows = -(-count // columns)
    sheet = np.full((rows * cell[0] + _GAP, columns * cell[1] + _GAP, 3), _DARK, np.uint8)
    for place, index in enumerate(np.linspace(0, len(folder) - 1, count).round().astype(int)):
        top = place // columns * cell[0] + _GAP
        left = place % columns * cell[1] + _GAP
        image, label = folder.read(index)
        _draw_pair(sheet[top:, left:], image, label, folder.labels)
        name = _end(drawable(folder.samples[index].name), 2 * _BOX[1] - 90)
        caption = f"{name}  {image.shape[1]}x{image.shape[0]}"
        _text(sheet, caption, (left, top + _BOX[0] + 16), 0.42, _LIGHT)
    legend = legend_strip(_seen(folder.labels, shares), sheet.shape[1], shares)
    return encode_png(np.concatenate([sheet, legend]))


def _seen(labels: LabelMap, shares: dict[str, float]) -> LabelMap:
    pairs = [pair for pair in zip(labels.names, labels.palette, strict=True) if shares[pair[0]] > 0]
    if not pairs:
        return labels
    names, palette = zip(*pairs, strict=True)
    return LabelMap(names, palette, labels.ignore_index)


def _draw_pair(sheet: Rgb, image: Rgb, label: ClassMap | Truth, labels: LabelMap) -> None:
    """The image and its labels, into the top left of ``sheet``."""
    scale = min(_BOX[0] / image.shape[0], _BOX[1] / image.shape[1])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    small = resize(image, (height, width))
    if isinstance(label, Truth):
        painted = _paint_objects(small, label, labels)
    else:
        painted = _paint_classes(small, label, labels)
    top, left = (_BOX[0] - height) // 2, (_BOX[1] - width) // 2
    for shift, part in ((0, small), (_BOX[1] + 4, painted)):
        sheet[top : top + height, left + shift : left + shift + width] = part


def _paint_classes(image: Rgb, label: ClassMap, labels: LabelMap) -> Rgb:
    classes = resized(label, image.shape[:2])
    painted = blend(image, classes, labels, _OPACITY)
    _cross(painted, classes == labels.ignore_index, _VOID)
    return painted


def _paint_objects(image: Rgb, truth: Truth, labels: LabelMap) -> Rgb:
    size = image.shape[:2]
    layers = np.stack([resized(layer, size) for layer in truth.ids])
    ids = np.zeros(size, np.uint16)
    areas = np.bincount(layers.ravel(), minlength=len(truth.classes) + 1)[1:]
    for id_ in (np.argsort(-areas) + 1).tolist():  # small ones lie above
        ids[(layers == id_).any(0)] = id_
    things = [id_ for id_, one in enumerate(truth.classes, 1) if one in labels.things]
    single = [id_ for id_ in things if id_ not in truth.crowds]
    colours = {id_: labels.palette[one] for id_, one in enumerate(truth.classes, 1)}
    colours |= {id_: shade(colours[id_], id_) for id_ in single}
    painted = lay(image, ids, colours, _OPACITY)
    edges = cv2.morphologyEx(ids, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    painted[edges & np.isin(ids, things)] = _LIGHT
    _cross(painted, np.isin(ids, list(truth.crowds)), _CROWD)
    _cross(painted, (ids == 0) & (resized(truth.void.view(np.uint8), size) > 0), _VOID)
    return painted


def _cross(image: Rgb, where: NDArray[np.bool_], colour: Colour) -> None:
    """Draw slanted lines there."""
    lines = np.add.outer(np.arange(image.shape[0]), np.arange(image.shape[1])) % 8 == 0
    image[lines & where] = colour


def draw_confusion(confusion: ConfusionMatrix, labels: LabelMap, title: str) -> Rgb:
    """uint8 [H, W, 3] RGB. A row is a labelled class, a column a predicted one; colours are shares
    of the row's pixels on a square-root scale, so that confusions of one in a hundred show. Up to
    30 classes have the percentages in the cells. A class that was never labelled has a grey row."""
    count = labels.num_classes
    totals = confusion.matrix.sum(1)
    shares = confusion.matrix / np.maximum(totals, 1)[:, None]
    cell, scale = (46, 0.46) if count <= 30 else (14, 0.36)
    names = [_start(drawable(name), _LONGEST_NAME) for name in labels.names]
    widest = max(_width(name, scale) for name in names)
    left, top = _MARGIN + 22 + widest + 8, _MARGIN + 40 + widest + 8
    side = cell * count
    image = np.full((top + side + _MARGIN, left + side + 110, 3), _PAPER, np.uint8)
    colours = _ramp(np.sqrt(shares))
    colours[totals == 0] = 243
    image[top : top + side, left : left + side] = colours.repeat(cell, 0).repeat(cell, 1)
    for index in range(count + 1):
        edge = index * cell
        cv2.line(image, (left, top + edge), (left + side, top + edge), _LINE, 1)
        cv2.line(image, (left + edge, top), (left + edge, top + side), _LINE, 1)
    for index, name in enumerate(names):
        ink = _INK if totals[index] else _PALE
        middle = index * cell + cell // 2
        _text(image, name, (left - 8 - _width(name, scale), top + middle + 4), scale, ink)
        _upright(image, name, (left + middle, top - 8), scale, _INK)
    if count <= 30:
        _percentages(image[top:, left:], shares, totals, cell)
    _text(image, _start(drawable(title), 110), (_MARGIN, _MARGIN + 12), 0.6, _INK)
    _text(image, "predicted", (left, _MARGIN + 34), 0.46, _PALE)
    _upright(image, "labelled", (_MARGIN + 4, top + _width("labelled", 0.46)), 0.46, _PALE)
    _draw_scale(image, left + side + 24, top, min(side, 400))
    return image


def _percentages(
    cells: Rgb, shares: NDArray[np.float64], totals: NDArray[np.int64], cell: int
) -> None:
    for row, column in zip(*np.nonzero((shares >= 0.005) & (totals[:, None] > 0)), strict=True):
        text = f"{100 * shares[row, column]:.0f}"
        ink = (255, 255, 255) if shares[row, column] > 0.3 else _INK
        left = column * cell + (cell - _width(text, 0.44)) // 2
        _text(cells, text, (left, row * cell + cell // 2 + 5), 0.44, ink)


def _draw_scale(image: Rgb, left: int, top: int, height: int) -> None:
    shares = np.linspace(1, 0, height)[:, None]
    image[top : top + height, left : left + 16] = _ramp(shares)
    cv2.rectangle(image, (left, top), (left + 16, top + height), _LINE, 1)
    for tick in _TICKS:
        at = top + round((1 - np.sqrt(tick / 100)) * height)
        cv2.line(image, (left + 16, at), (left + 20, at), _PALE, 1)
        _text(image, f"{tick} %", (left + 25, at + 4), 0.4, _PALE)


def _ramp(values: NDArray[np.float64]) -> Rgb:
    """0 … 1, of any shape, -> RGB with one more axis."""
    at = np.linspace(0, 1, len(_RAMP))
    channels = [np.interp(values, at, [colour[c] for colour in _RAMP]) for c in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def _text(image: Rgb, text: str, at: tuple[int, int], scale: float, ink: Colour) -> None:
    cv2.putText(image, text, at, _FONT, scale, ink, 1, cv2.LINE_AA)


def _upright(image: Rgb, text: str, at: tuple[int, int], scale: float, ink: Colour) -> None:
    """Text that reads upwards: it begins at ``at`` (x of its middle, y) on the white paper."""
    (width, height), below = cv2.getTextSize(text, _FONT, scale, 1)
    strip = np.full((height + below + 2, width + 2, 3), _PAPER, np.uint8)
    _text(strip, text, (1, height + 1), scale, ink)
    turned = np.ascontiguousarray(np.rot90(strip))
    top, left = at[1] - turned.shape[0], at[0] - (height + 2) // 2
    part = image[top : top + turned.shape[0], left : left + turned.shape[1]]
    np.minimum(part, turned, out=part)


def _width(text: str, scale: float) -> int:
    return int(cv2.getTextSize(text, _FONT, scale, 1)[0][0])


def _start(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 2] + ".."


def _end(text: str, width: int) -> str:
    """The end of a text that is too wide: names differ in their ends."""
    cut = text
    while len(cut) > 1 and _width(cut, 0.42) > width:
        cut = cut[1:]
    return cut if cut == text else ".." + cut[2:]
