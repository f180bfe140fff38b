"""A contact sheet of a data set: pictures beside their labels, as one PNG."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from knet_runtime.labels import LabelMap
from knet_runtime.overlay import blend, legend_strip
from knet_runtime.preprocess import resize
from knet_train.dataset import LabelledFolder
from knet_train.layouts import Layout, Sample

Rgb = NDArray[np.uint8]

_COLUMNS, _PICTURES = 3, 12
_BOX = (180, 240)  # height, width of a picture's place; half of a pair
_CAPTION, _GAP = 24, 14
_DARK, _TEXT = 32, (225, 225, 225)
_VOID = (255, 0, 255)  # no label map paints with it
_FONT = cv2.FONT_HERSHEY_SIMPLEX


def draw_sheet(layout: Layout, samples: Sequence[Sample], shares: dict[str, float]) -> bytes:
    """Up to twelve pairs, evenly spread over ``samples``, each as the picture and the picture under
    its labels' colours (pixels without a label: crossed by magenta lines); PNG bytes.

    ``shares`` (0 … 1 by class name) are written into the legend, which leaves out classes without
    any. Raises what ``LabelledFolder.read`` raises.
    """
    count = min(_PICTURES, len(samples))
    places = np.linspace(0, len(samples) - 1, count).round().astype(int)
    folder = LabelledFolder(
        layout.root, "", layout.labels, tuple(samples[place] for place in places), layout.void_first
    )
    columns = min(_COLUMNS, count)
    cell = (_BOX[0] + _CAPTION + _GAP, 2 * _BOX[1] + 4 + _GAP)
    rows = -(-count // columns)
    sheet = np.full((rows * cell[0] + _GAP, columns * cell[1] + _GAP, 3), _DARK, np.uint8)
    for place in range(count):
        top = place // columns * cell[0] + _GAP
        left = place % columns * cell[1] + _GAP
        image, label = folder.read(place)
        _draw_pair(sheet[top:, left:], image, label, layout.labels)
        text = folder.samples[place].name.encode("ascii", "replace").decode()
        at = (left, top + _BOX[0] + 16)
        size = f"{image.shape[1]}x{image.shape[0]}"
        text = f"{_shortened(text, 2 * _BOX[1] - 90)}  {size}"
        cv2.putText(sheet, text, at, _FONT, 0.42, _TEXT, 1, cv2.LINE_AA)
    whole = np.concatenate(
        [sheet, legend_strip(_seen(layout.labels, shares), sheet.shape[1], shares)]
    )
    _, data = cv2.imencode(".png", np.ascontiguousarray(whole[..., ::-1]))
    return data.tobytes()


def _seen(labels: LabelMap, shares: dict[str, float]) -> LabelMap:
    pairs = [pair for pair in zip(labels.names, labels.palette, strict=True) if shares[pair[0]] > 0]
    if not pairs:
        return labels
    names, palette = zip(*pairs, strict=True)
    return LabelMap(names, palette, labels.ignore_index)


def _draw_pair(sheet: Rgb, image: Rgb, label: NDArray[np.uint8], labels: LabelMap) -> None:
    """The picture and its labels, into the top left of ``sheet``."""
    scale = min(_BOX[0] / image.shape[0], _BOX[1] / image.shape[1])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    small = resize(image, (height, width))
    nearest = cv2.resize(label, (width, height), interpolation=cv2.INTER_NEAREST)
    classes = np.asarray(nearest, np.uint8)
    painted = blend(small, classes, labels, 0.65)
    lines = np.add.outer(np.arange(height), np.arange(width)) % 8 == 0
    painted[lines & (classes == labels.ignore_index)] = _VOID
    top, left = (_BOX[0] - height) // 2, (_BOX[1] - width) // 2
    for shift, picture in ((0, small), (_BOX[1] + 4, painted)):
        sheet[top : top + height, left + shift : left + shift + width] = picture


def _shortened(text: str, width: int) -> str:
    """The end of a text that is too wide: names differ in their ends."""
    cut = text
    while len(cut) > 1 and cv2.getTextSize(cut, _FONT, 0.42, 1)[0][0] > width:
        cut = cut[1:]
    return cut if cut == text else ".." + cut[2:]
