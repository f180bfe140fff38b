"""CVAT's "for images" export: ``annotations.xml``, and the images where they were saved too."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

from knet_runtime.errors import DataError
from knet_runtime.labels import Colour
from knet_train.data.convert.images import ImageFinder
from knet_train.data.convert.shapes import (
    Shape,
    draw_shapes,
    placed,
    polygon,
    runs,
    with_background,
)
from knet_train.data.convert.source import (
    Drawing,
    Item,
    Size,
    Source,
    check_size,
    some,
    split_of,
    stated_colour,
    usual_split,
)
from knet_train.data.truth import IGNORED

_FILE = "annotations.xml"
CROWD = "is_crowd"  # the attribute of a shape that is many objects in one
_TAKEN = ("polygon", "mask")
_OTHERS = ("box", "polyline", "points", "ellipse", "cuboid", "skeleton", "tag")


def is_cvat(root: Path) -> str | None:
    """Why it is an export of CVAT's; None where it is none."""
    return _FILE if (root / _FILE).is_file() else None


def read_cvat(root: Path, _: Path) -> Source:
    """Polygons and masks of every image; what is none of these is counted and left out.

    An image is of the subset that is stated, or of the split that its path begins with. Labels are
    of things; where some have the attribute ``is_crowd``, only these.
    """
    file = root / _FILE
    top = read_xml(file)
    if top.tag != "annotations" or top.find("version") is None:
        raise DataError(f"{file} is no export of CVAT's for images: export 'CVAT for images 1.1'")
    if top.find("track") is not None:
        raise DataError(f"{file} is an export for video: export 'CVAT for images 1.1' instead")
    names, things, palette = [], [], dict[str, Colour]()
    for label in top.iterfind("meta//labels/label"):
        name = label.findtext("name", "")
        if name == IGNORED:
            continue
        names.append(name)
        if any(one.text == CROWD for one in label.iterfind("attributes/attribute/name")):
            things.append(name)
        if (colour := stated_colour(label.findtext("color"), file)) is not None:
            palette[name] = colour
    items, empty, missing = [], [], []
    others: Counter[str] = Counter()
    finder = ImageFinder(root)
    for entry in top.iterfind("image"):
        name = entry.get("name", "")
        shapes = [child for child in entry if child.tag in _TAKEN]
        others.update(child.tag for child in entry if child.tag in _OTHERS)
        if not shapes:
            empty.append(name)
            continue
        image = finder.find(name)
        if image is None:
            missing.append(name)
            continue
        draw = partial(_draw, file, entry, with_background(names))
        subset, key = entry.get("subset", ""), PurePosixPath(name).with_suffix("")
        first = key.parts[0] if len(key.parts) > 1 else ""
        split = split_of(subset) or usual_split(first)
        if first and first in (subset, *(() if usual_split(first) is None else (first,))):
            key = key.relative_to(first)
        items.append(Item(key.as_posix(), image, file, draw, split))
    if missing:
        raise DataError(
            f"{file} has {len(missing)} labelled images that are not there, such as {missing[0]}: "
            f"put them into {root / 'images'}, or export with 'Save images'"
        )
    left = [f"{count} shapes of type {kind}" for kind, count in sorted(others.items())]
    left += some(empty, "images without a polygon or mask")
    classes = with_background(names)
    return Source(classes, tuple(items), frozenset(things or classes[1:]), palette, tuple(left))


def read_xml(path: Path) -> ElementTree.Element:
    """The root of an XML file without a document type, which could make it grow without end.
    Raises DataError."""
    try:
        data = path.read_bytes()
        if b"<!DOCTYPE" in data or b"<!ENTITY" in data or data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{path} declares a document type or is UTF-16: export it again")
        return ElementTree.fromstring(data)
    except (OSError, ElementTree.ParseError) as error:
        raise DataError(f"{path}: {error}; export the file again") from error


def _draw(file: Path, entry: ElementTree.Element, classes: tuple[str, ...], size: Size) -> Drawing:
    name = entry.get("name", "")
    try:
        check_size((int(entry.attrib["height"]), int(entry.attrib["width"])), size)
        shapes = [_shape(child, size) for child in entry if child.tag in _TAKEN]
        return draw_shapes(shapes, classes, size)
    except (DataError, KeyError, ValueError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{file}: {name} {what}") from error


def _shape(child: ElementTree.Element, size: Size) -> Shape:
    stated = child.attrib
    level = int(stated.get("z_order", "0"))
    name = None if stated["label"] == IGNORED else stated["label"]
    crowd = any(one.get("name") == CROWD and one.text == "true" for one in child)
    if child.tag == "polygon":
        points = [float(v) for pair in stated["points"].split(";") for v in pair.split(",")]
        return Shape(name, polygon(points, size), level, crowd)
    lengths = [int(value) for value in stated["rle"].split(",")]
    mask = runs(lengths, int(stated["height"]), int(stated["width"]))
    region = placed(mask, int(stated["left"]), int(stated["top"]), size)
    return Shape(name, region, level, crowd)
