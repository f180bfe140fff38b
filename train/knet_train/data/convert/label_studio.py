"""Label Studio's JSON export: polygons, and brush masks in its own run lengths."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_runtime.errors import DataError
from knet_train.data.convert.images import ImageFinder
from knet_train.data.convert.shapes import Shape, draw_shapes, placed, polygon, with_background
from knet_train.data.convert.source import Drawing, Item, Size, Source, check_size, read_json, some

_TAKEN = ("polygonlabels", "brushlabels")
_FEW = 8  # JSON files are looked into; more are another format's


class _Result(msgspec.Struct):
    type: str
    value: dict[str, Any] = {}
    original_width: int = 0
    original_height: int = 0


class _Annotation(msgspec.Struct):
    result: list[_Result]
    was_cancelled: bool = False


class _Task(msgspec.Struct):
    data: dict[str, Any]
    annotations: list[_Annotation]


def is_label_studio(root: Path) -> str | None:
    """Why it is an export of Label Studio's; None where it is none."""
    found = _file(root)
    return f"{found.name} lists tasks with annotations" if found is not None else None


def read_label_studio(root: Path, _: Path) -> Source:
    """The last annotation of every task. The images are looked for by name in the folder, with or
    without the eight letters that Label Studio puts before the names of uploads."""
    file = _file(root)
    assert file is not None
    finder = ImageFinder(root)
    names: set[str] = set()
    others: Counter[str] = Counter()
    items, empty, missing = [], [], []
    chosen: list[tuple[str, Path, list[_Result]]] = []
    for task in read_json(file, list[_Task]):
        text = next((v for v in task.data.values() if isinstance(v, str)), "")
        name = PurePosixPath(unquote(text.rpartition("?d=")[2])).name
        done = [one for one in task.annotations if not one.was_cancelled]
        if not done:
            empty.append(name)
            continue
        plain = name.partition("-")[2] if len(name.partition("-")[0]) == 8 else ""
        image = finder.find(name) or finder.find(plain)
        if image is None:
            missing.append(name)
            continue
        others.update(one.type for one in done[-1].result if one.type not in _TAKEN)
        own = [one for one in done[-1].result if one.type in _TAKEN]
        names.update(_label(file, one) for one in own)
        chosen.append((name, image, own))
    if missing:
        raise DataError(
            f"{file} has {len(missing)} labelled images that are not there, such as {missing[0]}: "
            f"put them into {root / 'images'}"
        )
    classes = with_background(sorted(names))
    for name, image, own in chosen:
        draw = partial(_draw, file, name, own, classes)
        items.append(Item(PurePosixPath(name).stem, image, file, draw))
    left = [f"{count} results of type {kind}" for kind, count in sorted(others.items())]
    left += some(empty, "images without an annotation")
    return Source(classes, tuple(items), frozenset(classes[1:]), left_out=tuple(left))


def _file(root: Path) -> Path | None:
    """The first JSON file that lists tasks."""
    files = sorted(root.glob("*.json"))
    for path in files if len(files) <= _FEW else ():
        try:
            tasks = read_json(path, list[dict[str, msgspec.Raw]])
        except DataError:
            continue
        if tasks and {"data", "annotations"} <= tasks[0].keys():
            return path
    return None


def _label(file: Path, one: _Result) -> str:
    names = one.value.get(one.type)
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise DataError(f"{file} has a region with {names!r} for its label: give it one label")
    return names[0]


def _draw(
    file: Path, name: str, own: list[_Result], classes: tuple[str, ...], size: Size
) -> Drawing:
    try:
        shapes = [_shape(file, one, size) for one in own]
        return draw_shapes(shapes, classes, size)
    except (DataError, KeyError, TypeError, ValueError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{file}: {name} {what}") from error


def _shape(file: Path, one: _Result, size: Size) -> Shape:
    check_size((one.original_height, one.original_width), size)
    if one.type == "polygonlabels":
        height, width = size
        points = [v for x, y in one.value["points"] for v in (x * width / 100, y * height / 100)]
        return Shape(_label(file, one), polygon(points, size))
    values = unpack(bytes(one.value["rle"]), 4 * size[0] * size[1])
    mask = values.reshape(*size, 4)[..., 3] > 0
    return Shape(_label(file, one), placed(mask, 0, 0, size))


def unpack(data: bytes, total: int) -> NDArray[np.uint8]:
    """Label Studio's run lengths (thi.ng/umbrella's rle-pack) as uint8 [``total``], RGBA, RGBA, …

    A stream of bits: the length in 32, the width of a word less one in 5, four widths of lengths
    less one in 4 each; then runs: a bit (1: one word repeated, 0: words that follow), which of the
    widths in 2, the length less one, the word or words. Raises DataError.
    """
    at = 0

    def read(count: int) -> int:
        nonlocal at
        first, at = at, at + count
        if at > 8 * len(data):
            raise DataError("has a brush mask that is cut off: export it again")
        whole = int.from_bytes(data[first // 8 : (at + 7) // 8], "big")
        return (whole >> -at % 8) & ((1 << count) - 1)

    stated, word = read(32), read(5) + 1
    widths = [read(4) + 1 for _ in range(4)]
    if stated != total or word != 8:
        raise DataError(
            f"has a brush mask of {stated} words of {word} bits, not {total} of 8: export it again"
        )
    found = np.zeros(total, np.uint8)
    done = 0
    while done < total:
        repeated = read(1)
        end = done + read(widths[read(2)]) + 1
        if end > total:
            raise DataError("has a brush mask that is longer than it says: export it again")
        found[done:end] = read(word) if repeated else [read(word) for _ in range(end - done)]
        done = end
    return found
