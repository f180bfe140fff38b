"""Supervisely's project folder: ``meta.json``, and ``img/`` beside ``ann/`` in each data set."""

from __future__ import annotations

import zlib
from collections import Counter
from functools import partial
from pathlib import Path, PurePosixPath

import msgspec

from knet_runtime.errors import DataError
from knet_runtime.labels import Colour
from knet_runtime.sources.images import IMAGE_SUFFIXES
from knet_train.data.convert.shapes import (
    Shape,
    base64_bytes,
    draw_shapes,
    mask_png,
    placed,
    polygon,
    with_background,
)
from knet_train.data.convert.source import (
    Drawing,
    Item,
    Size,
    Source,
    check_size,
    read_json,
    some,
    stated_colour,
    usual_split,
)
from knet_train.data.files import entries

_META = "meta.json"
_TAKEN = ("polygon", "bitmap")


class _Class(msgspec.Struct):
    title: str
    color: str = ""


class _Meta(msgspec.Struct):
    classes: list[_Class]


class _Points(msgspec.Struct):
    exterior: list[tuple[float, float]]
    interior: list[list[tuple[float, float]]] = []


class _Bitmap(msgspec.Struct):
    data: str
    origin: tuple[int, int]


class _Object(msgspec.Struct, rename="camel"):
    class_title: str
    geometry_type: str
    points: _Points | None = None
    bitmap: _Bitmap | None = None


class _Size(msgspec.Struct):
    height: int
    width: int


class _File(msgspec.Struct):
    size: _Size
    objects: list[_Object]


def is_supervisely(root: Path) -> str | None:
    """Why it is a project of Supervisely's; None where it is none."""
    found = [folder for folder in _sets(root) if (root / _META).is_file()]
    return f"{_META} and {found[0].name}/ann/" if found else None


def read_supervisely(root: Path, _: Path) -> Source:
    """Polygons, with their holes, and bitmaps; data sets named as splits are splits."""
    meta: _Meta = read_json(root / _META, _Meta)
    classes = with_background(one.title for one in meta.classes)
    palette: dict[str, Colour] = {}
    for one in meta.classes:
        if (colour := stated_colour(one.color, root / _META)) is not None:
            palette[one.title] = colour
    items, empty, alone = [], [], []
    others: Counter[str] = Counter()
    for folder in _sets(root):
        split = usual_split(folder.name)
        for image in entries(folder / "img"):
            if image.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            file = folder / "ann" / f"{image.name}.json"
            if not file.is_file():
                alone.append(image.name)
                continue
            objects = read_json(file, _File).objects
            others.update(o.geometry_type for o in objects if o.geometry_type not in _TAKEN)
            if not any(one.geometry_type in _TAKEN for one in objects):
                empty.append(image.name)
                continue
            name = PurePosixPath(folder.name) / image.stem if split is None else image.stem
            items.append(Item(str(name), image, file, partial(_draw, file, classes), split))
    left = [f"{count} objects of type {kind}" for kind, count in sorted(others.items())]
    left += some(alone, "images without a file in ann/")
    left += some(empty, "images without a polygon or bitmap")
    return Source(classes, tuple(items), frozenset(classes[1:]), palette, tuple(left))


def _sets(root: Path) -> list[Path]:
    return [one for one in entries(root) if (one / "img").is_dir() and (one / "ann").is_dir()]


def _draw(file: Path, classes: tuple[str, ...], size: Size) -> Drawing:
    content: _File = read_json(file, _File)
    try:
        check_size((content.size.height, content.size.width), size)
        taken = [one for one in content.objects if one.geometry_type in _TAKEN]
        return draw_shapes([_shape(one, size) for one in taken], classes, size)
    except (DataError, zlib.error) as error:
        raise DataError(f"{file} {error}") from error


def _shape(one: _Object, size: Size) -> Shape:
    if one.bitmap is not None:
        mask = mask_png(zlib.decompress(base64_bytes(one.bitmap.data)))
        return Shape(one.class_title, placed(mask, *one.bitmap.origin, size))
    if one.points is None:
        raise DataError(f"has a {one.geometry_type} without points: export it again")
    holes = [_flat(points) for points in one.points.interior]
    return Shape(one.class_title, polygon(_flat(one.points.exterior), size, holes))


def _flat(points: list[tuple[float, float]]) -> list[float]:
    return [value for point in points for value in point]
