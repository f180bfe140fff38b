"""What an export is made of: every image of a data folder once, with its labels."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import find_objects

from knet_runtime.errors import DataError
from knet_runtime.labels import LabelMap
from knet_runtime.segmentation import Instance, Segmentation
from knet_runtime.types import Size, Task
from knet_train.data.convert.source import check_size
from knet_train.data.dataset import LabelledFolder, open_folder, shown_size
from knet_train.data.layouts import find_layout, split_names
from knet_train.data.segment_folder import SegmentFolder
from knet_train.data.segments import open_segments, segment_splits
from knet_train.data.truth import Truth

UNDIVIDED = "all"  # the split of a folder that has none


class Labels(NamedTuple):
    """The labels of one image. ``crowds`` are the ids of segments that are many objects in one,
    ``void`` bool [H, W] the pixels that are not labelled and of no segment."""

    found: Segmentation
    crowds: frozenset[int]
    void: NDArray[np.bool_]


@dataclass(frozen=True)
class LabelledImage:
    """One image, not yet read. ``name`` is its path below its split's folder, with the suffix;
    ``labels`` reads what is labelled, and raises DataError."""

    name: str
    split: str
    image: Path
    size: Size
    labels: Callable[[], Labels]

    @property
    def path(self) -> str:
        """Its path among all images: the split's folder, where there is one, and ``name``."""
        return self.name if self.split == UNDIVIDED else f"{self.split}/{self.name}"


@dataclass(frozen=True)
class LabelledImages:
    """All images of a folder that training takes, by ``path``."""

    labels: LabelMap
    task: Task
    images: tuple[LabelledImage, ...]


def list_images(root: Path, split: str | None, task: Task) -> LabelledImages:
    """The images of one split, or of all. Raises DataError where anything is wrong with one."""
    if split is not None:
        splits = [split]
    elif task == "semantic":
        splits = split_names(find_layout(root))
    else:
        splits = segment_splits(root, task)
    found: dict[Path, LabelledImage] = {}
    labels: LabelMap | None = None
    # Last come the images that lists divide too.
    for name in sorted(splits, key=lambda one: one == UNDIVIDED):
        folder = open_folder(root, name) if task == "semantic" else open_segments(root, name, task)
        if labels is not None and folder.labels != labels:
            raise DataError(
                f"{root} has other classes in split {name}: export one after the other with --split"
            )
        labels = folder.labels
        for index in range(len(folder)):
            if (image := folder.samples[index].image) not in found:
                found[image] = _image(folder, index)
    names: dict[str, Path] = {}
    for path, one in found.items():
        other = names.setdefault(str(Path(one.path).with_suffix("")), path)
        if other != path:
            raise DataError(f"{path} and {other} share a name: rename one of them, and its labels")
    if labels is None:
        raise DataError(f"{root} has no split: put images into images/")
    return LabelledImages(labels, task, tuple(sorted(found.values(), key=lambda one: one.path)))


def _image(folder: LabelledFolder | SegmentFolder, index: int) -> LabelledImage:
    image = folder.samples[index].image
    name, size = _name(folder.root, folder.split, image), shown_size(image)
    if any(unicodedata.category(char) in ("Cc", "Cs") for char in name):
        raise DataError(f"{image}: other programs cannot read this name, so rename the file")

    def read() -> Labels:
        try:
            if isinstance(folder, LabelledFolder):
                return _semantic(folder.read_label(index), folder.labels, size)
            return _objects(folder.read_truth(index), folder.labels, folder.task, size)
        except DataError as error:
            if str(error).startswith("was labelled"):
                raise DataError(f"{image} {error}") from error
            raise

    return LabelledImage(name, folder.split, image, size, read)


def _name(root: Path, split: str, image: Path) -> str:
    """The path of an image below the folder of its split, in whatever layout."""
    last = split.rpartition("_")[2]  # COCO's instances_custom_train.json goes with train/
    bases = [
        root / folder / part
        for folder in ("images", "leftImg8bit", "")
        for part in dict.fromkeys((split, last, ""))
    ]
    below = next(base for base in bases if image.is_relative_to(base))
    return unicodedata.normalize("NFC", image.relative_to(below).as_posix())


def _semantic(label: NDArray[np.uint8], labels: LabelMap, size: Size) -> Labels:
    check_size((label.shape[0], label.shape[1]), size)
    return Labels(Segmentation(label, labels), frozenset(), label == labels.ignore_index)


def _objects(truth: Truth, labels: LabelMap, task: Task, size: Size) -> Labels:
    check_size((truth.void.shape[0], truth.void.shape[1]), size)
    void = truth.void & ~(truth.ids > 0).any(0)
    if task == "panoptic" and len(truth.ids) == 1:
        scores = [None] * len(truth.classes)
        found = Segmentation.from_panoptic(truth.ids[0], truth.classes, scores, labels)
        return Labels(found, truth.crowds, void)
    places = {
        number: (layer, box)
        for layer in truth.ids
        for number, box in enumerate(find_objects(layer), 1)
        if box is not None
    }
    objects, crowds = [], set()
    for number in sorted(places):
        layer, (rows, columns) = places[number]
        mask, class_id = layer[rows, columns] == number, truth.classes[number - 1]
        # Equal scores keep their order.
        objects.append(Instance(class_id, 0.0, columns.start, rows.start, mask))
        if number in truth.crowds:
            crowds.add(len(objects))
    return Labels(Segmentation.from_instances(objects, size, labels), frozenset(crowds), void)
