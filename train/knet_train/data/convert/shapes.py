"""Objects that are outlined or masked one by one, and how they become maps of an image.

What lies on top: the object of the higher ``level`` (CVAT's z-order), else the smaller one, so that
a cup is not lost under the table that it stands on. What none covers is the class ``background``.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from knet_runtime.errors import DataError
from knet_train.data.convert.source import BACKGROUND, VOID, Drawing, Size
from knet_train.data.label_files import UNREADABLE
from knet_train.data.regions import Region, region, run_lengths

_MOST_OBJECTS = 65535  # what 16 bits can number


class Shape(NamedTuple):
    """One labelled object; ``name`` None is of no class, and its pixels are void. A ``crowd`` is
    many objects in one."""

    name: str | None
    region: Region
    level: int = 0
    crowd: bool = False


def with_background(names: Iterable[str]) -> tuple[str, ...]:
    """The classes of a format of outlines: ``background``, and the others in their order."""
    return (BACKGROUND, *dict.fromkeys(name for name in names if name != BACKGROUND))


def draw_shapes(shapes: Sequence[Shape], classes: Sequence[str], size: Size) -> Drawing:
    """The maps of an image of ``size``. Raises DataError for a name that is none of ``classes``."""
    if len(shapes) > _MOST_OBJECTS:
        raise DataError(f"has {len(shapes)} objects, more than {_MOST_OBJECTS}: split the image")
    index: dict[str | None, int] = {name: number for number, name in enumerate(classes)}
    index[None] = VOID
    found = np.full(size, index[BACKGROUND], np.int16)
    objects = np.zeros(size, np.uint16)
    areas = [int(shape.region.mask.sum()) for shape in shapes]
    order = sorted(range(len(shapes)), key=lambda n: (shapes[n].level, -areas[n]))
    for number in order:
        shape = shapes[number]
        if shape.name not in index:
            raise DataError(f"has an object of {shape.name!r}, which is none of its classes")
        place, mask = shape.region.place, shape.region.mask
        found[place][mask] = index[shape.name]
        objects[place][mask] = 0 if shape.crowd or shape.name is None else number + 1
    seen = np.bincount(objects.ravel(), minlength=len(shapes) + 1)[1:]
    numbered = np.array([not (one.crowd or one.name is None) for one in shapes], np.bool_)
    hidden = int((numbered & (seen == 0)).sum())
    return Drawing(found, objects, hidden)


def polygon(points: Sequence[float], size: Size, holes: Sequence[Sequence[float]] = ()) -> Region:
    """The pixels of x, y, x, y, …, filled as COCO's are, without those of ``holes``.

    Raises DataError where it has fewer than three points, or lies outside of the image.
    """
    outside = f"outside of its image of {size[1]}×{size[0]}: move the outline or take it out"
    filled = region(run_lengths([list(points)], size), size)  # which looks at the numbers
    for values, length in ((points[::2], size[1]), (points[1::2], size[0])):
        if max(values) < 0 or min(values) > length:
            raise DataError(f"has a polygon that lies {outside}")
    if holes:
        whole = np.zeros(size, np.bool_)
        whole[filled.place] = filled.mask
        for hole in holes:
            inner = region(run_lengths([list(hole)], size), size)
            whole[inner.place] &= ~inner.mask
        return Region(filled.left, filled.top, whole[filled.place])
    return filled


def circle(x: float, y: float, radius: float) -> list[float]:
    """The outline of a circle as x, y, x, y, …"""
    count = max(12, math.ceil(2 * math.pi * radius))
    angles = [2 * math.pi * step / count for step in range(count)]
    return [v for a in angles for v in (x + radius * math.cos(a), y + radius * math.sin(a))]


def placed(mask: NDArray[np.bool_], left: int, top: int, size: Size) -> Region:
    """A mask whose first pixel is at (left, top). Raises DataError where it leaves the image."""
    height, width = mask.shape
    if left < 0 or top < 0 or left + width > size[1] or top + height > size[0]:
        raise DataError(
            f"has a mask of {width}×{height} at ({left}, {top}), which leaves its image of "
            f"{size[1]}×{size[0]}: export it again"
        )
    return Region(left, top, mask)


def runs(lengths: Sequence[int], height: int, width: int) -> NDArray[np.bool_]:
    """Run lengths along the rows, the first outside of the mask, as bool [height, width]. Raises
    DataError."""
    if min(lengths, default=0) < 0 or sum(lengths) != height * width:
        raise DataError(
            f"has run lengths of {sum(lengths)} pixels in a mask of {width}×{height}: export it "
            "again"
        )
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(height, width)


def mask_png(data: bytes) -> NDArray[np.bool_]:
    """A small image of a mask as bool [h, w]: its opaque pixels where it has an alpha channel,
    else those that are not black. Raises DataError."""
    try:
        with Image.open(io.BytesIO(data)) as opened:
            alpha = "A" in opened.getbands()
            return np.asarray(opened.getchannel("A") if alpha else opened.convert("L")) > 0
    except UNREADABLE as error:
        raise DataError(
            f"has a mask that is no readable image ({error}): export it again"
        ) from error


def base64_bytes(text: str) -> bytes:
    """What a JSON file holds as base64; raises DataError."""
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise DataError(f"has data that is no base64 ({error}): export it again") from error
