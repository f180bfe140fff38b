"""Lists of classes beside label images: names with colours, or names in the order of numbers."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import NamedTuple

from knet_runtime.errors import DataError
from knet_runtime.labels import Colour
from knet_train.data.convert.label_images import Coding
from knet_train.data.convert.source import VOID, read_text
from knet_train.data.layouts import load_labels_json

_VOID_NAMES = ("void", "unlabeled", "unlabelled", "__ignore__", "ignore")
_LISTS = ("classes.txt", "class_names.txt", "labels.txt", "names.txt")
_COLOURS = ("class_dict.csv", "label_colors.txt", "labelmap.txt", "_classes.csv")
_FILES = (*_COLOURS, "labels.json", *_LISTS)


class Classes(NamedTuple):
    """The ``names`` of a list (void left out), what pixels mean, and colours by name."""

    names: tuple[str, ...]
    coding: Coding
    palette: dict[str, Colour]


def find_classes(root: Path) -> Classes | None:
    """The list that a folder has; None for none. Raises DataError."""
    for name in _FILES:
        if (root / name).is_file():
            return read_classes(root / name)
    return None


def read_classes(path: Path) -> Classes:
    """One list, told by its name:

    - ``class_dict.csv``: name,r,g,b, with a line of titles
    - ``label_colors.txt`` (CamVid): r g b name
    - ``labelmap.txt`` (CVAT): name:r,g,b:parts:actions
    - ``_classes.csv`` (Roboflow): pixel value, class, with a line of titles
    - ``labels.json``: this project's
    - ``classes.txt`` and the like: a name a line, in the order of numbers

    Raises DataError that names the file.
    """
    if path.name == "labels.json":
        labels = load_labels_json(path)
        values = {labels.ignore_index: VOID, **{n: n for n in range(labels.num_classes)}}
        palette = dict(zip(labels.names, labels.palette, strict=True))
        colours = {colour: n for n, colour in enumerate(labels.palette)}
        return Classes(labels.names, Coding(values, colours), palette)
    lines = [line.strip() for line in read_text(path).splitlines()]
    rows = [_row(path, line) for line in lines if line and not line.startswith("#")]
    if path.name in ("class_dict.csv", "_classes.csv"):
        rows = rows[1:]
    try:
        found = [(name, tuple(int(part) for part in numbers)) for name, *numbers in rows]
    except ValueError as error:
        raise DataError(f"{path}: {error}; write {_FORM[path.name]}") from error
    names = tuple(dict.fromkeys(name for name, _ in found if name.casefold() not in _VOID_NAMES))
    index = {name: number for number, name in enumerate(names)}
    if not names:
        raise DataError(f"{path} names no class: write {_FORM.get(path.name, 'a name a line')}")
    if path.name in _LISTS:
        # labelme2voc's first line is __ignore__, which its PNGs do not count.
        kept = [name for name, _ in found if name.casefold() != "__ignore__"]
        return Classes(names, Coding(_by_value(kept, index)), {})
    if path.name == "_classes.csv":
        return Classes(names, Coding({n[0]: index.get(name, VOID) for name, n in found}), {})
    colours, palette = {}, {}
    for name, numbers in found:
        if len(numbers) != 3 or not all(0 <= part <= 255 for part in numbers):
            raise DataError(f"{path}: {name} has no colour of 0 … 255: write {_FORM[path.name]}")
        colour = numbers[0], numbers[1], numbers[2]
        if colours.get(colour, index.get(name, VOID)) != index.get(name, VOID):
            raise DataError(f"{path}: {name} has the colour of another class: give it its own")
        colours[colour] = index.get(name, VOID)
        palette.setdefault(name, colour)
    return Classes(names, Coding(colours=colours), palette)


_FORM = {
    "class_dict.csv": "a line name,r,g,b for each class, under one with titles",
    "label_colors.txt": "a line r g b name for each class",
    "labelmap.txt": "a line name:r,g,b:: for each class",
    "_classes.csv": "a line value,name for each class, under one with titles",
}


def _by_value(names: list[str], index: dict[str, int]) -> dict[int, int]:
    return {255: VOID, **{n: index.get(name, VOID) for n, name in enumerate(names)}}


def _row(path: Path, line: str) -> list[str]:
    """A name and its numbers."""
    match path.name:
        case "class_dict.csv":
            parts = next(csv.reader([line]))
            return [part.strip() for part in parts[:4]]
        case "_classes.csv":
            value, _, name = line.partition(",")
            return [name.strip(), value.strip()]
        case "label_colors.txt":
            found = re.fullmatch(r"(\d+)[\s,]+(\d+)[\s,]+(\d+)[\s,]+(.+)", line)
            if found is None:
                raise DataError(f"{path}: {line!r} is no line r g b name: mend it")
            return [found[4].strip(), found[1], found[2], found[3]]
        case "labelmap.txt":
            name, _, rest = line.partition(":")
            return [name.strip(), *rest.partition(":")[0].split(",")]
        case _:
            return [line]
