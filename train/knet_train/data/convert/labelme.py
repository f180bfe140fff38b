"""LabelMe: a JSON file beside each image."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from knet_runtime.errors import DataError
from knet_runtime.sources.images import IMAGE_SUFFIXES
from knet_train.data.convert.shapes import (
    Shape,
    base64_bytes,
    circle,
    draw_shapes,
    mask_png,
    placed,
    polygon,
    with_background,
)
from knet_train.data.convert.source import (
    BACKGROUND,
    Drawing,
    Item,
    Size,
    Source,
    check_size,
    read_json,
    some,
    usual_split,
)
from knet_train.data.files import walk
from knet_train.data.truth import IGNORED


class _Shape(msgspec.Struct):
    label: str
    points: list[list[float]]
    shape_type: str = "polygon"
    mask: str | None = None


class _File(msgspec.Struct):
    shapes: list[_Shape]
    imagePath: str  # noqa: N815
    imageData: str | None = None  # noqa: N815
    imageHeight: int | None = None  # noqa: N815
    imageWidth: int | None = None  # noqa: N815


def is_labelme(root: Path) -> str | None:
    """Why it is a folder of LabelMe's; None where it is none."""
    for path in walk(root, []):
        if path.suffix != ".json":
            continue
        try:
            keys = read_json(path, dict[str, msgspec.Raw])
        except DataError:
            return None
        found = {"shapes", "imagePath"} <= keys.keys()
        return f"{path.relative_to(root)} has shapes and imagePath" if found else None
    return None


def read_labelme(root: Path, scratch: Path) -> Source:
    """Polygons, rectangles, circles and masks; lines and points are counted and left out. An image
    that lies only in its JSON is written into ``scratch``."""
    names: set[str] = set()
    others: Counter[str] = Counter()
    found: list[tuple[Path, Path]] = []
    images = {path for path in walk(root, []) if path.suffix.lower() in IMAGE_SUFFIXES}
    for path in walk(root, []):
        if path.suffix != ".json":
            continue
        content: _File = read_json(path, _File)
        names |= {_name(shape.label) for shape in content.shapes if shape.label != IGNORED}
        others.update(s.shape_type for s in content.shapes if not _is_area(s))
        image = path.parent / content.imagePath.replace("\\", "/")
        if not image.is_file():
            image = path.parent / image.name
        if not image.is_file() and content.imageData:
            image = scratch / path.relative_to(root).parent / image.name
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(base64_bytes(content.imageData))
        if not image.is_file():
            raise DataError(
                f"{path}: its image {content.imagePath} is not there: put it beside the JSON"
            )
        found.append((path, image))
    classes = with_background(sorted(names))
    items = []
    for path, image in found:
        place = path.relative_to(root).with_suffix("")
        split = usual_split(place.parts[0]) if len(place.parts) > 1 else None
        name = place if split is None else place.relative_to(place.parts[0])
        items.append(Item(name.as_posix(), image, path, partial(_draw, path, classes), split))
    alone = sorted(path.name for path in images - {image for _, image in found})
    left = [f"{count} shapes of type {kind}" for kind, count in sorted(others.items())]
    left += some(alone, "images without a JSON file")
    return Source(classes, tuple(items), frozenset(classes[1:]), left_out=tuple(left))


def _is_area(shape: _Shape) -> bool:
    return shape.shape_type in ("polygon", "rectangle", "circle", "mask")


def _name(label: str) -> str:
    return BACKGROUND if label == "_background_" else label


def _draw(path: Path, classes: tuple[str, ...], size: Size) -> Drawing:
    content: _File = read_json(path, _File)
    try:
        if content.imageHeight is not None and content.imageWidth is not None:
            check_size((content.imageHeight, content.imageWidth), size)
        shapes = [_shape(shape, size) for shape in content.shapes if _is_area(shape)]
        return draw_shapes(shapes, classes, size)
    except (DataError, ValueError) as error:
        raise DataError(f"{path} {error}") from error


def _shape(shape: _Shape, size: Size) -> Shape:
    name = None if shape.label == IGNORED else _name(shape.label)
    points: list[Any] = [value for point in shape.points for value in point]
    match shape.shape_type:
        case "rectangle":
            left, top, right, bottom = points
            points = [left, top, right, top, right, bottom, left, bottom]
        case "circle":
            x, y, other_x, other_y = points
            points = circle(x, y, ((other_x - x) ** 2 + (other_y - y) ** 2) ** 0.5)
        case "mask":
            mask = mask_png(base64_bytes(shape.mask or ""))
            return Shape(name, placed(mask, round(points[0]), round(points[1]), size))
    return Shape(name, polygon(points, size))
