"""CVAT's "for images" export: ``annotations.xml``, and the images where they were saved too."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

from knet_runtime.colours import hex_colour
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
from knet_train.data.convert.source import Drawing, Item, Size, Source, some, split_of

_FILE = "annotations.xml"
_TAKEN = ("polygon", "mask")
_OTHERS = ("box", "polyline", "points", "ellipse", "cuboid", "skeleton", "tag")


def is_cvat(root: Path) -> str | None:
    """Why it is an export of CVAT's; None where it is none."""
    return _FILE if (root / _FILE).is_file() else None


def read_cvat(root: Path, _: Path) -> Source:
    """Polygons and masks of every image; what is none of these is counted and left out."""
    file = root / _FILE
    top = read_xml(file)
    if top.tag != "annotations" or top.find("version") is None:
        raise DataError(f"{file} is no export of CVAT's for images: export 'CVAT for images 1.1'")
    if top.find("track") is not None:
        raise DataError(f"{file} is an export for video: export 'CVAT for images 1.1' instead")
    names, palette = [], dict[str, Colour]()
    for label in top.iterfind("meta//labels/label"):
        name = label.findtext("name", "")
        names.append(name)
        if (colour := hex_colour(label.findtext("color", ""))) is not None:
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
        split = split_of(entry.get("subset", ""))
        key = PurePosixPath(name).with_suffix("").as_posix()
        items.append(Item(key, image, file, draw, split))
    if missing:
        raise DataError(
            f"{file} has {len(missing)} labelled images that are not there, such as {missing[0]}: "
            f"put them into {root / 'images'}, or export with 'Save images'"
        )
    left = [f"{count} shapes of type {kind}" for kind, count in sorted(others.items())]
    left += some(empty, "images without a polygon or mask")
    classes = with_background(names)
    return Source(classes, tuple(items), frozenset(classes[1:]), palette, tuple(left))


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
    stated = entry.get("height"), entry.get("width")
    if stated != (str(size[0]), str(size[1])):
        raise DataError(
            f"{file}: {name} is {stated[1]}×{stated[0]}, but the image is {size[1]}×{size[0]}: put "
            "the image there that was labelled"
        )
    try:
        shapes = [_shape(child, size) for child in entry if child.tag in _TAKEN]
        return draw_shapes(shapes, classes, size)
    except (DataError, KeyError, ValueError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{file}: {name} {what}") from error


def _shape(child: ElementTree.Element, size: Size) -> Shape:
    stated = child.attrib
    level = int(stated.get("z_order", "0"))
    if child.tag == "polygon":
        points = [float(v) for pair in stated["points"].split(";") for v in pair.split(",")]
        return Shape(stated["label"], polygon(points, size), level)
    lengths = [int(value) for value in stated["rle"].split(",")]
    mask = runs(lengths, int(stated["height"]), int(stated["width"]))
    region = placed(mask, int(stated["left"]), int(stated["top"]), size)
    return Shape(stated["label"], region, level)
