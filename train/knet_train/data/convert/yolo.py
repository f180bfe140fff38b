"""YOLO's segmentation: a text file per image, with a polygon a line, and the names in a YAML."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from knet_runtime.errors import DataError
from knet_runtime.sources.images import IMAGE_SUFFIXES
from knet_train.data.convert.shapes import Shape, draw_shapes, polygon, with_background
from knet_train.data.convert.source import Drawing, Item, Size, Source, read_text, some, split_of
from knet_train.data.files import walk

_FAR = 0.01  # beyond 0 … 1, which tools that round leave


def is_yolo(root: Path) -> str | None:
    """Why it is a tree of YOLO's; None where it is none."""
    folders = (root / "labels", *sorted(root.glob("*/labels")))
    for folder in folders:
        if folder.is_dir() and any(path.suffix == ".txt" for path in walk(folder, [])):
            return f"{folder.relative_to(root).as_posix()}/ with text files"
    return None


def read_yolo(root: Path, _: Path) -> Source:
    """Polygons in ``labels/``, of the images at the same paths in ``images/``. An empty text file
    says that the image holds none of the classes; one without a text file is left out."""
    names = _names(root)
    classes = with_background(names)
    items, alone = [], []
    for image in walk(root, []):
        place = image.relative_to(root)
        if image.suffix.lower() not in IMAGE_SUFFIXES or "images" not in place.parts[:-1]:
            continue
        at = place.parts.index("images")
        label = root.joinpath(*place.parts[:at], "labels", *place.parts[at + 1 :])
        label = label.with_suffix(".txt")
        if not label.is_file():
            alone.append(image.name)
            continue
        # images/train/a.jpg, or train/images/a.jpg
        before, after = place.parts[:at], place.parts[at + 1 :]
        split = split_of((before or after[:-1] or ("",))[0])
        inner = after if before or len(after) == 1 or split is None else after[1:]
        name = Path(*inner).with_suffix("").as_posix()
        items.append(Item(name, image, label, partial(_draw, label, names, classes), split))
    left = some(alone, "images without a text file")
    return Source(classes, tuple(items), frozenset(classes[1:]), left_out=tuple(left))


def _names(root: Path) -> tuple[str, ...]:
    files = sorted((*root.glob("*.yaml"), *root.glob("*.yml")))
    for path in files:
        try:
            content: Any = yaml.safe_load(read_text(path))
        except yaml.YAMLError as error:
            raise DataError(f"{path}: {error}; it wants names: [...]") from error
        found = content.get("names") if isinstance(content, dict) else None
        if isinstance(found, dict) and sorted(found) == list(range(len(found))):
            found = [found[number] for number in range(len(found))]
        if isinstance(found, list) and found:
            return tuple(map(str, found))
    if (root / "classes.txt").is_file():
        return tuple(line.strip() for line in read_text(root / "classes.txt").splitlines() if line)
    raise DataError(f"{root} has no data.yaml with names: write `names: [...]` into one")


def _draw(path: Path, names: tuple[str, ...], classes: tuple[str, ...], size: Size) -> Drawing:
    shapes = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            if line.strip():
                shapes.append(_shape(line.split(), names, size))
        except DataError as error:
            raise DataError(f"{path}: line {number} {error}") from error
    return draw_shapes(shapes, classes, size)


def _shape(words: list[str], names: tuple[str, ...], size: Size) -> Shape:
    if not re.fullmatch(r"\d+", words[0]) or int(words[0]) >= len(names):
        raise DataError(
            f"is of class {words[0]}, but the classes are 0 … {len(names) - 1}: mend the line, or "
            "the names in the YAML"
        )
    if len(words) == 5:
        raise DataError("is a box, which no pixels can be told from: export polygons")
    try:
        values = [float(word) for word in words[1:]]
    except ValueError as error:
        raise DataError(f"is no list of numbers ({error}): export the file again") from error
    if not all(-_FAR <= value <= 1 + _FAR for value in values):
        raise DataError("has points outside of 0 … 1: they are parts of the width and height")
    height, width = size
    points = [v * (height if n % 2 else width) for n, v in enumerate(values)]
    return Shape(names[int(words[0])], polygon(points, size))
