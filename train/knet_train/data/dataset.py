"""Labelled images in a folder; ``knet_train.data.layouts`` says how such a folder may look."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from knet_runtime.errors import DataError, SourceError
from knet_runtime.labels import LabelMap
from knet_runtime.sources.images import read_image
from knet_train.data.census import Census, single_class
from knet_train.data.label_files import (
    UNREADABLE,
    Palettes,
    allowed_values,
    count_label,
    label_table,
    outside_values,
    read_label,
)
from knet_train.data.layouts import Layout, Sample, find_layout, list_split

_ORIENTATION = 274  # the EXIF tag; 5 and above swap width and height
# Labels that are read before a run starts, spread over the split: about a second of them, and for
# ten at most the search goes on for classes that none of them has.
_PROBES, _MOST_PROBES = 200, 2000


@dataclass(frozen=True)
class LabelledFolder:
    """One split of a data folder; images are read on demand."""

    layout: Layout
    split: str
    samples: tuple[Sample, ...]

    @property
    def root(self) -> Path:
        return self.layout.root

    @property
    def labels(self) -> LabelMap:
        return self.layout.labels

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Image uint8 [H, W, 3] RGB and label uint8 [H, W] of classes or the ignore index.

        Raises DataError when the two differ in size or a label is outside the label map, and
        SourceError when a file is unreadable.
        """
        sample = self.samples[index]
        image, label = read_image(sample.image), self.read_label(index)
        if label.shape != image.shape[:2]:
            raise DataError(sizes_differ(sample, label.shape, image.shape[:2]))
        return image, label

    def read_label(self, index: int) -> NDArray[np.uint8]:
        """Label uint8 [H, W] of classes or the ignore index; raises as ``read`` does."""
        label = self.samples[index].label
        return read_label(label, self.labels, void_first=self.layout.void_first)


def open_folder(root: Path, split: str) -> LabelledFolder:
    """Find the pairs of a split. Raises DataError that says what is missing."""
    layout = find_layout(root)
    listing = list_split(layout, split)
    if listing.problems:
        more = len(listing.problems) - 1
        raise DataError(
            listing.problems[0] + (f" (and {more} more problems)" if more else "") + _advice(root)
        )
    if not listing.samples:
        raise DataError(
            f"split {split!r} of {root} is empty: list images in split/{split}.txt, "
            f"or put images into images/{split}/"
        )
    return LabelledFolder(layout, split, listing.samples)


def check_pairs(folder: LabelledFolder, *, every_label: bool = False) -> Census:
    """Refuse a broken split before a run is begun with it: the sizes of every pair, by the files'
    headers, and the values and palettes of some labels, spread over the split (or of all); what
    these hold.

    Raises DataError with the first fault, and the command that lists all.
    """
    if problem := single_class(folder.layout):
        raise DataError(problem)
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(_check_sizes, folder.samples))
        census = _count(folder, every_label=every_label)
    except (DataError, SourceError) as error:
        raise DataError(f"{error}{_advice(folder.root)}") from error
    if census.files == census.total and not census.by_class(folder.layout).any():
        raise DataError(
            f"split {folder.split!r} of {folder.root} has no labelled pixel{_advice(folder.root)}"
        )
    return census


def _count(folder: LabelledFolder, *, every_label: bool) -> Census:
    census, palettes = Census(len(folder)), Palettes(folder.layout)
    table = label_table(folder.labels, void_first=folder.layout.void_first)
    order = np.random.default_rng(0).permutation(len(folder)).tolist()
    most = len(folder) if every_label else min(len(folder), _MOST_PROBES)
    with ThreadPoolExecutor() as pool:
        for start in range(0, most, _PROBES):
            if start and not every_label and census.by_class(folder.layout).all():
                break
            paths = [folder.samples[i].label for i in order[start : min(most, start + _PROBES)]]
            for path, count in zip(paths, pool.map(count_label, paths), strict=True):
                if outside := outside_values(count.pixels, table):
                    allowed = allowed_values(folder.labels, void_first=folder.layout.void_first)
                    raise DataError(f"{path} holds label {outside[0]}; {allowed}")
                if problem := palettes.fault(path, count):
                    raise DataError(problem)
                census.add(count.pixels)
    return census


def sizes_differ(sample: Sample, label: tuple[int, ...], image: tuple[int, ...]) -> str:
    """What to say of a pair whose (height, width) differ."""
    return (
        f"{sample.label} is {label[1]}×{label[0]} but its image is {image[1]}×{image[0]}: "
        "labels are never resized, fix the file"
    )


def _check_sizes(sample: Sample) -> None:
    label, _ = _header(sample.label)
    image, turned = _header(sample.image, like=label)
    if label != image and not (turned and label == image[::-1]):
        raise DataError(sizes_differ(sample, label, image))


def shown_size(path: Path) -> tuple[int, int]:
    """The (height, width) that an image has when it is read, by its header. Raises DataError."""
    size, turned = _header(path, like=(0, 0))
    return size[::-1] if turned else size


def _header(path: Path, like: tuple[int, int] | None = None) -> tuple[tuple[int, int], bool]:
    """The (height, width) that a file states, and whether it is shown with the two exchanged; the
    latter, for which a whole PNG is read, only where the size is not ``like`` another."""
    try:
        with Image.open(path) as opened:
            size = opened.height, opened.width
            turned = like not in (None, size) and opened.getexif().get(_ORIENTATION, 1) >= 5
            return size, turned
    except UNREADABLE as error:
        raise DataError(f"cannot read {path}: {error}; write the file again") from error


def _advice(root: Path) -> str:
    return f"; run `knet-deploy data check {root}` to see every fault"
