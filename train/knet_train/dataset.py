"""Labelled images in a folder.

Layout: ``images/`` and ``labels/`` with the same file stems (labels are PNGs of class indices),
and ``labels.json`` (``class_names``, optionally ``palette_rgb`` and ``ignore_index``). A split is
``split/NAME.txt`` (one stem a line) if that file exists, else the folder ``images/NAME``; a flat
``images/`` has the splits ``all``, ``val`` (every tenth image by name) and ``train`` (the others).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from knet_runtime.errors import DataError
from knet_runtime.image_file import read_image
from knet_runtime.images import IMAGE_SUFFIXES
from knet_runtime.labels import LabelMap, load_labels_json


@dataclass(frozen=True)
class Sample:
    """One labelled picture, not yet read."""

    name: str
    image: Path
    label: Path


@dataclass(frozen=True)
class LabelledFolder:
    """One split of a data folder; pictures are read on demand."""

    root: Path
    split: str
    labels: LabelMap
    samples: tuple[Sample, ...]

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Image uint8 [H, W, 3] RGB and label uint8 [H, W].

        Raises DataError when the two differ in size or a label is outside the label map, and
        SourceError when a file is unreadable.
        """
        sample = self.samples[index]
        image = read_image(sample.image)
        label = read_label(sample.label, self.labels)
        if label.shape != image.shape[:2]:
            raise DataError(
                f"{sample.label} is {label.shape[1]}×{label.shape[0]} but its image is "
                f"{image.shape[1]}×{image.shape[0]}: labels are never resized, mend the file"
            )
        return image, label


def open_folder(root: Path, split: str) -> LabelledFolder:
    """Find the pairs of a split. Raises DataError that says what is missing."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: --data wants one with images/ and labels/")
    for part in ("images", "labels"):
        if not (root / part).is_dir():
            raise DataError(f"{root} has no folder {part}/: a data folder has images/ and labels/")
    labels = load_labels_json(root / "labels.json")
    if labels.num_classes > 255 or labels.ignore_index > 255:
        raise DataError(f"{root / 'labels.json'}: label PNGs are 8-bit, so values end at 255")
    images = _by_stem(root / "images", frozenset(IMAGE_SUFFIXES))
    masks = _by_stem(root / "labels", frozenset({".png"}))
    samples = []
    for stem in _stems(root, split, images):
        if stem not in images:
            raise DataError(
                f"split {split!r} names {stem}, which is not in {root / 'images'}: "
                f"add the picture, or take the line out of split/{split}.txt"
            )
        if stem not in masks:
            raise DataError(f"{images[stem]} has no label: expected a PNG named {stem}.png")
        samples.append(Sample(stem, images[stem], masks[stem]))
    if not samples:
        raise DataError(
            f"split {split!r} of {root} is empty: list stems in split/{split}.txt, "
            f"or put pictures into images/{split}/"
        )
    return LabelledFolder(root, split, labels, tuple(samples))


def read_label(path: Path, labels: LabelMap) -> NDArray[np.uint8]:
    """A PNG of class indices (grey or palette) -> uint8 [H, W]; DataError when it holds others."""
    try:
        with Image.open(path) as picture:
            if picture.mode not in ("L", "P"):
                raise DataError(
                    f"{path} is a {picture.mode} picture: labels are 8-bit PNGs of class indices"
                )
            # Not cv2: it would paint a palette PNG instead of giving its indices.
            label: NDArray[np.uint8] = np.array(picture, np.uint8)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"can not read label {path}: {error}; write the PNG again") from error
    allowed = np.zeros(256, bool)
    allowed[: labels.num_classes] = True
    allowed[labels.ignore_index] = True
    present = np.bincount(label.ravel(), minlength=256) > 0
    if (present & ~allowed).any():
        raise DataError(
            f"{path} holds label {int(np.flatnonzero(present & ~allowed)[0])}; labels.json allows "
            f"0 … {labels.num_classes - 1} and {labels.ignore_index} (ignore): mend one of the two"
        )
    return label


def _stems(root: Path, split: str, images: dict[str, Path]) -> list[str]:
    listing = root / "split" / f"{split}.txt"
    if listing.is_file():
        try:
            lines = listing.read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{listing}: {error}; it wants one stem a line, in UTF-8") from error
        stems = [line.strip() for line in lines if line.strip()]
        if len(set(stems)) < len(stems):
            twice = next(stem for stem in stems if stems.count(stem) > 1)
            raise DataError(f"{listing} names {twice} more than once: take the others out")
        return stems
    folder = root / "images" / split
    if folder.is_dir():
        return sorted(stem for stem, path in images.items() if folder in path.parents)
    flat = sorted(stem for stem, path in images.items() if path.parent == root / "images")
    match split if flat else None:
        case "all":
            return flat
        case "val":
            return flat[::10]
        case "train":
            return [stem for index, stem in enumerate(flat) if index % 10]
        case _:
            known = sorted(
                {path.stem for path in (root / "split").glob("*.txt")}
                | {path.name for path in (root / "images").iterdir() if path.is_dir()}
                | ({"all", "train", "val"} if flat else set())
            )
            raise DataError(
                f"{root} has no split {split!r}; it has {', '.join(known) or 'none'}: "
                f"make split/{split}.txt or images/{split}/"
            )


def _by_stem(folder: Path, suffixes: frozenset[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.name.startswith("."):  # macOS leaves "._photo.jpg" beside "photo.jpg"
            continue
        if path.suffix.lower() in suffixes and path.is_file():
            if path.stem in found:
                raise DataError(f"{path} and {found[path.stem]} share a name: rename one of them")
            found[path.stem] = path
    return found
