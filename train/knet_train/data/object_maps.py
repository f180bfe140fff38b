"""PNGs that number the objects of an image: beside class maps, alone, or as Cityscapes has them.

- **Beside class maps** (``labels/`` and ``instances/``): an object is the pixels of one number and
  one class of things, so numbers may run through the image or begin anew for each class. The class
  map decides: void is void, and stuff has no objects, whatever its number. A thing's pixels of
  number 0 are a crowd.
- **Alone** (``instances/`` or ``masks/``, of one class of things): a number is an object. What has
  none is the class of stuff, if labels.json has just one; else it is void to task "panoptic".
- **Cityscapes**: v from 1000 on is object v % 1000 of label v // 1000; below that it is a label,
  and where that is a thing, a group of them: a crowd. Its panoptic JSON is made from these files,
  and says the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from knet_runtime.errors import DataError
from knet_runtime.labels import LabelMap
from knet_runtime.types import Task
from knet_train.data.label_files import UNREADABLE, read_label
from knet_train.data.layouts import Layout, Sample, find_objects, list_split
from knet_train.data.segment_folder import SegmentFolder, task_labels
from knet_train.data.truth import BACKGROUND, VOID, Truth, from_classes

# Cityscapes' labels (github mcordts/cityscapesScripts, helpers/labels.py) of train id 0, 1, ….
CITYSCAPES_LABELS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


@dataclass(frozen=True)
class _Coding:
    """What the values of the PNGs mean: ``table`` is the task's class (or VOID, or BACKGROUND) of
    each class of the ``layout``, ``things`` those of the task. Of numbers that stand alone,
    ``thing`` is the class, and ``rest`` what is not numbered."""

    layout: Layout
    table: tuple[int, ...]
    things: tuple[int, ...]
    thing: int
    rest: int


@dataclass(frozen=True)
class MapSample:
    """One image and its PNGs, not yet read; ``classes`` is the class map beside the numbers."""

    name: str
    image: Path
    ids: Path
    classes: Path | None
    coding: _Coding

    @property
    def stated(self) -> Path:
        return self.ids

    def truth(self) -> Truth:
        """The truth; raises DataError."""
        coding, ids = self.coding, read_ids(self.ids)
        if coding.layout.kind == "Cityscapes":
            alone = ids < 1000
            classes = _city_table(coding.table)[np.where(alone, ids, ids // 1000)]
            ids = np.where(alone, 0, ids % 1000 + 1).astype(np.uint16)
        elif self.classes is None:
            classes = np.where(ids > 0, coding.thing, coding.rest)
        else:
            classes = self._classes(ids.shape)
        return from_classes(classes, ids, coding.things)

    def _classes(self, size: tuple[int, ...]) -> NDArray[np.int64]:
        assert self.classes is not None
        layout = self.coding.layout
        label = read_label(self.classes, layout.labels, void_first=layout.void_first)
        if label.shape != size:
            raise DataError(
                f"{self.ids} is {size[1]}×{size[0]} but {self.classes} is "
                f"{label.shape[1]}×{label.shape[0]}: labels are never resized, fix the file"
            )
        table = np.full(256, VOID)
        table[: layout.labels.num_classes] = self.coding.table
        return table[label]


def read_ids(path: Path) -> NDArray[np.uint16]:
    """A PNG of objects' numbers -> uint16 [H, W]; DataError when it is none of one channel."""
    try:
        with Image.open(path) as opened:
            if opened.mode not in ("L", "P", "I;16", "I"):
                raise DataError(
                    f"{path} is a {opened.mode} image: objects' numbers are PNGs of one channel, "
                    "of 16 bits, or of 8 where 255 are enough"
                )
            values = np.asarray(opened)
    except UNREADABLE as error:
        raise DataError(f"cannot read {path}: {error}; write the PNG again") from error
    return values.astype(np.uint16)


def list_maps(root: Path, split: str, task: Task) -> SegmentFolder:
    """The images and maps of a split. Raises DataError where nothing can be listed."""
    layout, maps, beside = find_objects(root)
    stated, file = layout.labels, root / "labels.json"
    if layout.kind == "Cityscapes":
        file = root / "gtFine" / split
    elif not beside:
        stated = _one_thing(stated, file)
    labels = task_labels(stated, task, file)
    if not labels.things:
        raise DataError(f'{file} has no thing: name the classes of {maps}/ under "things"')
    listing = list_split(layout, split, maps)
    problems, class_maps = list(listing.problems), dict[str, Sample]()
    if beside:
        own = list_split(layout, split)
        problems += own.problems
        class_maps = {sample.name: sample for sample in own.samples}
    coding = _coding(layout, stated, labels, task)
    samples = tuple(
        MapSample(
            one.name, one.image, one.label, class_maps[one.name].label if beside else None, coding
        )
        for one in listing.samples
        if not beside or one.name in class_maps
    )
    named = layout.kind if layout.kind == "Cityscapes" else f"{layout.kind} with {maps}/"
    return SegmentFolder(
        root, named, file, split, labels, task, samples, tuple(dict.fromkeys(problems))
    )


def _one_thing(labels: LabelMap, file: Path) -> LabelMap:
    """Of numbers that stand alone: a class that is the only one is a thing without saying so."""
    if labels.num_classes == 1:
        return LabelMap(labels.names, labels.palette, labels.ignore_index, (0,))
    if len(labels.things) != 1:
        raise DataError(
            f'{file} wants one class under "things", as objects without class maps are all of one '
            "class; else put class maps into labels/ and the objects' numbers into instances/"
        )
    return labels


def _coding(layout: Layout, stated: LabelMap, labels: LabelMap, task: Task) -> _Coding:
    other = BACKGROUND if task == "instance" else VOID
    table = tuple(
        labels.names.index(name) if name in labels.names else other for name in stated.names
    )
    stuff = [index for index in range(stated.num_classes) if index not in stated.things]
    rest = table[stuff[0]] if len(stuff) == 1 else other
    return _Coding(layout, table, labels.things, labels.things[0], rest)


def _city_table(table: tuple[int, ...]) -> NDArray[np.int64]:
    """The class of each of Cityscapes' labels, and of any other number below 1000, [1000]."""
    found = np.full(1000, VOID)
    found[list(CITYSCAPES_LABELS)] = table
    return found
