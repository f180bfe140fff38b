"""Images beside label images, under any of the usual names: CamVid's, Kaggle's, Roboflow's semantic
masks, and folders such as ``images/`` and ``masks/``.

What the pixels mean is read from a list of classes (``class_files``). Without one, masks of two
values are ``background`` and ``foreground``, and classes of numbers are named by these.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from knet_runtime.errors import DataError
from knet_runtime.sources.images import IMAGE_SUFFIXES
from knet_train.data.convert.class_files import Classes, find_classes
from knet_train.data.convert.label_images import Coding, packed, read_pixels
from knet_train.data.convert.source import VOID, Item, Source, some, split_of, usual_split
from knet_train.data.files import entries, walk

_IMAGES = ("images", "image", "imgs", "img", "photos", "input", "inputs", "701_stillsraw_full")
_MASKS = (
    *("masks", "mask", "labels", "label", "annotations", "annotation", "gt", "ground_truth"),
    *("groundtruth", "segmentation", "segmentations", "targets", "labeledapproved_full"),
)
# Kaggle's train/ and train_labels/ lie side by side.
_BESIDE = ("_labels", "_label", "_masks", "_mask", "annot", "_annotations")
_END = re.compile(r"_(l|mask|masks|label|labels|gt|seg|segmentation)$", re.I)
_MASK_SUFFIXES = (*IMAGE_SUFFIXES, ".gif")
_MOST_CLASSES = 255
_ROWS = 12  # colours that are shown as lines to write


class _Pair(NamedTuple):
    """Folders of images and masks, the same where the masks end in ``_mask``, and their split."""

    images: Path
    masks: Path
    split: str | None


def is_roboflow(root: Path) -> str | None:
    """Why it is a tree of Roboflow's semantic masks; None where it is none."""
    found = [path for path in (root, *_folders(root)) if (path / "_classes.csv").is_file()]
    return f"_classes.csv in {found[0].name}/" if found else None


def is_camvid(root: Path) -> str | None:
    """Why it is CamVid as it is published, or Kaggle's; None where it is none."""
    for pair in _pairs(root):
        for path in walk(pair.masks, []):
            if path.stem.endswith("_L"):
                return f"{pair.masks.relative_to(root)}/*_L{path.suffix}"
            break
    return None


def is_mask_folders(root: Path) -> str | None:
    """Why they are folders of images and label images; None where they are none."""
    for pair in _pairs(root):
        if pair.images == pair.masks:
            return f"{pair.masks.name}/*_mask.*"
        if any(path.suffix.lower() in _MASK_SUFFIXES for path in walk(pair.masks, [])):
            places = (path.relative_to(root).as_posix() for path in (pair.images, pair.masks))
            return "{}/ and {}/".format(*places)
    return None


def read_mask_folders(root: Path, _: Path) -> Source:
    """Every image with its label image. Raises DataError where nothing says what colours mean."""
    left: list[str] = []
    found: list[tuple[str, Path, Path, str | None]] = []
    for pair in _pairs(root):
        found += _matched(pair, left)
    lists = [find_classes(folder) for folder in (root, *_folders(root))]
    stated = next((one for one in lists if one is not None), None)
    classes = stated or _unnamed(root, [label for _, _, label, _ in found])
    if classes.names[:1] == ("0",):
        left.append(
            "names of classes, as there is no classes.txt: write one, or use --map 0=background; "
            "but where the numbers are of single objects, train reads the folder as it is, with a "
            "labels.json of one class"
        )
    items = [
        Item(name, image, label, partial(classes.coding.draw, label), split)
        for name, image, label, split in found
    ]
    return Source(classes.names, tuple(items), palette=classes.palette, left_out=tuple(left))


def _folders(root: Path) -> list[Path]:
    return [path for path in entries(root) if path.is_dir()]


def _pairs(root: Path) -> list[_Pair]:
    """Folders that go together: in ``root``, side by side in it, or in its folders of splits."""
    if found := _pair(root, None):
        return [found]
    folders = {path.name.casefold(): path for path in _folders(root)}
    beside = [
        _Pair(folder, folders[name + end], split_of(name))
        for name, folder in folders.items()
        for end in _BESIDE
        if name + end in folders
    ]
    inner = (_pair(folder, split_of(folder.name)) for folder in folders.values())
    return beside or [pair for pair in inner if pair is not None]


def _pair(folder: Path, split: str | None) -> _Pair | None:
    """``images/`` and ``masks/``, or the folder itself where its masks end in ``_mask``."""
    folders = {path.name.casefold(): path for path in _folders(folder)}
    images = next((folders[name] for name in _IMAGES if name in folders), None)
    masks = next((folders[name] for name in _MASKS if name in folders), None)
    if images is not None and masks is not None:
        return _Pair(images, masks, split)
    files = [path for path in entries(folder) if path.suffix.lower() in _MASK_SUFFIXES]
    masks_here = sum(bool(_END.search(path.stem)) for path in files)
    return _Pair(folder, folder, split) if 0 < masks_here < len(files) else None


def _matched(pair: _Pair, left: list[str]) -> Iterator[tuple[str, Path, Path, str | None]]:
    """Name, image, label and split of what goes together; the others go to ``left``."""
    images, masks = dict[str, Path](), dict[str, Path]()
    for folder, table, suffixes in (
        (pair.images, images, IMAGE_SUFFIXES),
        (pair.masks, masks, _MASK_SUFFIXES),
    ):
        for path in walk(folder, left):
            is_mask = bool(_END.search(path.stem))
            if path.suffix.lower() not in suffixes:
                continue
            if pair.images == pair.masks and is_mask != (table is masks):
                continue
            key = path.relative_to(folder).with_suffix("").as_posix()
            key = _END.sub("", key) if table is masks else key
            if table.setdefault(key, path) != path:
                raise DataError(f"{path} and {table[key]} share a name: rename one of them")
    alone = []
    for key, image in images.items():
        label = masks.pop(key, None) or masks.pop(_END.sub("", key), None)
        first, _, rest = key.partition("/")
        if label is None:
            alone.append(image.name)
        elif pair.split is None and rest and (split := usual_split(first)) is not None:
            yield rest, image, label, split
        else:
            yield key, image, label, pair.split
    left += some([path.name for path in masks.values()], f"masks without an image in {pair.images}")
    left += some(alone, f"images without a mask in {pair.masks}")


def _unnamed(root: Path, labels: list[Path]) -> Classes:
    """The classes of label images that no list names."""
    counts: Counter[int] = Counter()
    painted = None
    for path in labels:
        pixels = read_pixels(path)
        if pixels.ndim == 3:
            painted = painted or path
            pixels = packed(pixels)
        unique, times = np.unique(pixels, return_counts=True)
        counts.update(dict(zip(unique.tolist(), times.tolist(), strict=True)))
    if painted is not None:
        grey = all(value % 0x10101 == 0 for value in counts)
        if not grey or len(counts) > 2:
            raise _unlisted(root, painted, counts)
        levels = sorted(value >> 16 for value in counts)
        coding = {(level, level, level): n for n, level in enumerate(levels)}
        return Classes(("background", "foreground")[: len(levels)], Coding(colours=coding), {})
    found = sorted(counts)
    if found in ([0, 255], [0, 1]):
        values = {value: n for n, value in enumerate(found)}
        return Classes(("background", "foreground"), Coding(values), {})
    named = [value for value in found if value != 255]
    if len(named) > _MOST_CLASSES or (labels and labels[0].suffix.lower() in (".jpg", ".jpeg")):
        raise DataError(
            f"{root}: its {len(labels)} label images hold {len(found)} values, such as "
            f"{', '.join(map(str, found[:6]))}: labels must keep exact values, as PNG does and "
            "JPEG does not; export them as PNG"
        )
    names = tuple(map(str, range(max(named, default=-1) + 1)))
    return Classes(names, Coding({255: VOID, **{n: n for n in range(len(names))}}), {})


def _unlisted(root: Path, painted: Path, counts: Counter[int]) -> DataError:
    shown = counts.most_common(_ROWS)
    error = DataError(
        f"{painted} is painted in colours, and nothing says what they mean: the {len(counts)} "
        f"colours of all labels, most pixels first, begin as below; write {root / 'class_dict.csv'}"
        " with a name for each (void for what is no class)"
    )
    rows = (f"NAME,{c >> 16},{c >> 8 & 255},{c & 255}  ({times} pixels)" for c, times in shown)
    error.example = "\n".join(("name,r,g,b", *rows))
    return error
