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
from knet_train.data.layouts import Sample, find_layout, list_split

_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
_ORIENTATION = 274  # the EXIF tag; 5 and above swap width and height
_PROBES = 200  # labels whose values are read before a run starts: about a second


@dataclass(frozen=True)
class LabelledFolder:
    """One split of a data folder; images are read on demand."""

    root: Path
    split: str
    labels: LabelMap
    samples: tuple[Sample, ...]
    void_first: bool = False  # label files hold 0 for void and v for class v - 1

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
        return read_label(self.samples[index].label, self.labels, void_first=self.void_first)

    def count_pixels(self) -> NDArray[np.int64]:
        """Labelled pixels of each class over the split, int64 [N]; raises as ``read`` does."""
        pixels = np.zeros(256, np.int64)
        for index in range(len(self)):
            pixels += np.bincount(self.read_label(index).ravel(), minlength=256)
        return pixels[: self.labels.num_classes]


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
            f"split {split!r} of {root} is empty: list stems in split/{split}.txt, "
            f"or put images into images/{split}/"
        )
    return LabelledFolder(root, split, layout.labels, listing.samples, layout.void_first)


def check_pairs(folder: LabelledFolder) -> None:
    """Refuse a broken split before a run is begun with it, in seconds: the sizes of every pair, by
    the files' headers, and the values of some labels, spread over the split.

    Raises DataError with the first fault, and the command that lists all.
    """
    step = -(-len(folder) // _PROBES)
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(_check_sizes, folder.samples))
            list(pool.map(folder.read_label, range(0, len(folder), step)))
    except (DataError, SourceError) as error:
        raise DataError(f"{error}{_advice(folder.root)}") from error


def read_label(path: Path, labels: LabelMap, *, void_first: bool = False) -> NDArray[np.uint8]:
    """A PNG of class indices (grey or palette) -> uint8 [H, W]; DataError when it holds others.

    With ``void_first`` the file holds 0 for void and v for class v - 1 (mmsegmentation's
    ``reduce_zero_label``).
    """
    values = read_values(path)
    table = label_table(labels, void_first=void_first)
    present = np.bincount(values.ravel(), minlength=256) > 0
    outside = np.flatnonzero(present & (table < 0))
    if outside.size:
        raise DataError(
            f"{path} holds label {int(outside[0])}; {allowed_values(labels, void_first=void_first)}"
        )
    return table.astype(np.uint8)[values] if void_first else values


def read_values(path: Path) -> NDArray[np.uint8]:
    """A label file's own values, uint8 [H, W]; DataError when it is no 8-bit PNG of one channel."""
    try:
        with Image.open(path) as opened:
            if opened.mode not in ("L", "P"):
                raise DataError(
                    f"{path} is a {opened.mode} image: labels are 8-bit PNGs of class indices"
                )
            # Not cv2: it would paint a palette PNG instead of giving its indices.
            return np.array(opened, np.uint8)
    except _UNREADABLE as error:
        raise DataError(f"cannot read label {path}: {error}; write the PNG again") from error


def label_table(labels: LabelMap, *, void_first: bool) -> NDArray[np.int16]:
    """What each value of a label file means, int16 [256]: a class, the ignore index, or -1."""
    table = np.full(256, -1, np.int16)
    first = int(void_first)
    table[labels.ignore_index] = labels.ignore_index
    table[first : first + labels.num_classes] = np.arange(labels.num_classes)
    if void_first:
        table[0] = labels.ignore_index
    return table


def allowed_values(labels: LabelMap, *, void_first: bool) -> str:
    """What a label file may hold, and what to do about others, in words."""
    classes = f"1 … {labels.num_classes}" if void_first else f"0 … {labels.num_classes - 1}"
    void = "0" if void_first else str(labels.ignore_index)
    return f"its classes are {classes} and {void} (ignore): fix the file, or labels.json"


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


def _header(path: Path, like: tuple[int, int] | None = None) -> tuple[tuple[int, int], bool]:
    """The (height, width) that a file states, and whether it is shown with the two exchanged; the
    latter, for which a whole PNG is read, only where the size is not ``like`` another."""
    try:
        with Image.open(path) as opened:
            size = opened.height, opened.width
            turned = like not in (None, size) and opened.getexif().get(_ORIENTATION, 1) >= 5
            return size, turned
    except _UNREADABLE as error:
        raise DataError(f"cannot read {path}: {error}; write the file again") from error


def _advice(root: Path) -> str:
    return f"; run `knet-deploy data check {root}` to see every fault"
