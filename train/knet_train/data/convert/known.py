"""What training reads as it is, read for a conversion: to choose classes, merge or divide it, or
for another task."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from knet_runtime.errors import DataError
from knet_runtime.labels import LabelMap
from knet_runtime.types import Task
from knet_train.data.coco import open_coco
from knet_train.data.convert.label_images import Coding
from knet_train.data.convert.shapes import with_background
from knet_train.data.convert.source import (
    BACKGROUND,
    VOID,
    Drawing,
    Item,
    Size,
    Source,
    check_size,
    read_json,
    some,
    split_of,
)
from knet_train.data.files import entries
from knet_train.data.layouts import CocoFormat, find_layout, list_split, split_names
from knet_train.data.object_maps import read_ids
from knet_train.data.segment_folder import SegmentSample

_ROBOFLOW = "_annotations.coco.json"
_KINDS = ("panoptic", "instances", "stuff")
_FEW = 8  # JSON files of any name are looked into; more are another format's
_KEYS = {"images", "annotations", "categories"}


def is_ours(root: Path) -> str | None:
    """Why it is a folder of this project's; None where it is none."""
    if (root / "images").is_dir() and (root / "labels").is_dir():
        return "images/, labels/ and labels.json" if (root / "labels.json").is_file() else None
    return None


def is_ade20k(root: Path) -> str | None:
    """Why it is ADE20K's scene parsing benchmark; None where it is none."""
    found = (root / "images" / "training").is_dir() and (root / "annotations" / "training").is_dir()
    return "images/training/ and annotations/training/" if found else None


def read_layout(root: Path, _: Path) -> Source:
    """A folder of this project's or of ADE20K, with ``instances/`` where there are any."""
    layout = find_layout(root)
    labels = layout.labels
    numbered = (root / "instances").is_dir()
    first = int(layout.void_first)
    values = {labels.ignore_index: VOID, **({0: VOID} if first else {})}
    values |= {number + first: number for number in range(labels.num_classes)}
    # Labels may be painted in the colours that labels.json states.
    colours = {colour: n for n, colour in enumerate(labels.palette)} if layout.painted else {}
    coding = Coding(values, colours)
    taken: dict[Path, str] = {}
    items: list[Item] = []
    left: list[str] = []
    # "all" last, which has the images of the lists too.
    for split in sorted(split_names(layout), key=lambda name: name == "all"):
        listing = list_split(layout, split)
        left += listing.problems
        objects = {}
        if numbered:
            both = list_split(layout, split, "instances")
            left += both.problems
            objects = {one.image: one.label for one in both.samples}
        for sample in listing.samples:
            if taken.setdefault(sample.image, split) != split:
                continue
            image = sample.image.relative_to(root / "images").with_suffix("")
            inner = image.parts[1:] if image.parts[0] == split else image.parts
            draw = partial(_labelled, sample.label, objects.get(sample.image), coding)
            name = Path(*inner).as_posix()
            items.append(Item(name, sample.image, sample.label, draw, split_of(split)))
    palette = dict(zip(labels.names, labels.palette, strict=True))
    things = frozenset(labels.names[n] for n in labels.things if numbered)
    return Source(labels.names, tuple(items), things, palette, tuple(dict.fromkeys(left)))


def _labelled(path: Path, ids: Path | None, coding: Coding, _: Size) -> Drawing:
    return Drawing(coding.classes(path), None if ids is None else read_ids(ids))


def is_coco_tree(root: Path) -> str | None:
    """Why it is a tree in one of COCO's formats; None where it is none."""
    found = [] if is_ours(root) else _files(root)
    return ", ".join(sorted({path.name for path, _ in found})[:3]) if found else None


def read_coco(root: Path, _: Path) -> Source:
    """Panoptic JSON where it is there, else instances and stuff, Roboflow's and CVAT's too."""
    files = _files(root)
    panoptic = [path for path, kind in files if kind == "panoptic"]
    stuff = [path for path, kind in files if path.name.startswith("stuff_")]
    instances = [path for path, _ in files if path not in (*panoptic, *stuff)]
    chosen = panoptic or instances or stuff
    kind: CocoFormat = "panoptic" if panoptic else "instances"
    task: Task = "panoptic" if panoptic else "instance"
    left = [f"{path.name}, as {chosen[0].name} is read" for path, _ in files if path not in chosen]
    no_things: set[str] = set()
    known: list[LabelMap] = []
    items = []
    for file in chosen:
        split = _split(root, file)
        folder = open_coco(root, file, split, kind, task)
        if folder.problems:
            raise DataError(folder.problems[0])
        known.append(folder.labels)
        no_things.update(folder.stuff)
        if folder.labels.names != known[0].names:
            raise DataError(
                f"{file} has other categories than {chosen[0]}: convert the two one by one"
            )
        names = known[0].names if kind == "panoptic" else with_background(known[0].names)
        index = tuple(names.index(name) for name in known[0].names)
        rest = VOID if kind == "panoptic" else names.index(BACKGROUND)
        for sample in folder.samples:
            draw = partial(_truth, sample, index, rest)
            items.append(Item(sample.name, sample.image, file, draw, split_of(split)))
    names = known[0].names if kind == "panoptic" else with_background(known[0].names)
    palette = dict(zip(known[0].names, known[0].palette, strict=True))
    things = frozenset(known[0].names[n] for n in known[0].things)
    left += some(sorted(no_things), "categories whose isthing is 0: they become background")
    return Source(names, tuple(items), things, palette, tuple(left))


def _files(root: Path) -> list[tuple[Path, str]]:
    """The JSON files in COCO's formats, and which."""
    found = []
    for folder in (root, root / "annotations"):
        files = sorted(folder.glob("*.json")) if folder.is_dir() else []
        for path in files:
            kind = path.name.partition("_")[0]
            if path.name == "panoptic_coco_categories.json":
                continue
            if kind in _KINDS:
                found.append((path, kind))
            elif len(files) <= _FEW and _has_keys(path):
                found.append((path, "instances"))
    for folder in entries(root):
        if folder.is_dir() and (folder / _ROBOFLOW).is_file():
            found.append((folder / _ROBOFLOW, "instances"))
    return found


def _has_keys(path: Path) -> bool:
    try:
        keys: dict[str, msgspec.Raw] = read_json(path, dict[str, msgspec.Raw])
    except DataError:
        return False
    return keys.keys() >= _KEYS


def _split(root: Path, file: Path) -> str:
    if file.name == _ROBOFLOW:
        return "" if file.parent == root else file.parent.name
    kind, _, rest = file.stem.partition("_")
    return rest if kind in _KINDS else ""


def _truth(sample: SegmentSample, index: tuple[int, ...], rest: int, size: Size) -> Drawing:
    truth = sample.truth()
    height, width = truth.void.shape
    try:
        check_size((height, width), size)
    except DataError as error:
        raise DataError(f"{sample.stated}: {sample.name} {error}") from error
    ids = truth.ids[0].copy()
    if len(truth.ids) > 1:  # overlaps: the smaller lies on top
        ids[:] = 0
        areas = np.bincount(truth.ids.ravel(), minlength=len(truth.classes) + 1)
        for number in sorted(range(1, len(truth.classes) + 1), key=lambda n: -areas[n]):
            ids[(truth.ids == number).any(0)] = number
    table = np.array([rest, *(index[n] for n in truth.classes)], np.int16)
    classes = table[ids]
    classes[truth.void & (ids == 0)] = VOID
    crowds = np.isin(ids, list(truth.crowds))
    seen = len(np.unique(ids[ids > 0]))
    return Drawing(classes, np.where(crowds, 0, ids).astype(np.uint16), len(truth.classes) - seen)
