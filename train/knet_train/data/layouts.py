"""Where a data folder has its images and labels, and of which classes: three layouts, told apart
by what is there.

- **knet-deploy**: ``images/`` and ``labels/`` with the same file stems (labels are PNGs of class
  indices) and ``labels.json`` (``class_names``, optionally ``palette_rgb`` and ``ignore_index``).
- **ADE20K**: ``images/`` and ``annotations/``, whose PNGs hold 0 for void and v for class v - 1.
  The 150 classes of the benchmark, unless a ``labels.json`` names others.
- **Cityscapes**: ``leftImg8bit/SPLIT/CITY/*_leftImg8bit.png`` and
  ``gtFine/SPLIT/CITY/*_gtFine_labelTrainIds.png``; 19 classes, 255 is void.

A split of the first two is ``split/NAME.txt`` (one stem a line) if that file exists, else the
folder ``images/NAME``; a flat ``images/`` has the splits ``all``, ``val`` (every tenth image by
name) and ``train`` (the others). ``training`` and ``validation`` stand for ``train`` and ``val``,
and the other way round, where only one of the two exists.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import msgspec

from knet_runtime.errors import DataError
from knet_runtime.labels import Colour, LabelMap, distinct_palette
from knet_runtime.sources.images import IMAGE_SUFFIXES


class _LabelsJson(msgspec.Struct):
    class_names: tuple[str, ...]
    palette_rgb: tuple[Colour, ...] | None = None
    ignore_index: int = 255


def load_labels_json(path: Path) -> LabelMap:
    """Read a data set's ``labels.json``: ``class_names``, and optionally ``palette_rgb``
    (a distinct palette is made when it is absent) and ``ignore_index`` (255).

    Raises DataError with the file's name when it is missing or malformed.
    """
    try:
        return _decode(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}; a data folder needs a labels.json with class_names"
        ) from error
    except (msgspec.DecodeError, ValueError) as error:
        raise DataError(f"{path}: {error}") from error


def _decode(data: bytes) -> LabelMap:
    raw = msgspec.json.decode(data, type=_LabelsJson)
    palette = raw.palette_rgb or distinct_palette(len(raw.class_names))
    return LabelMap(raw.class_names, palette, raw.ignore_index)


def _packaged(name: str) -> LabelMap:
    return _decode((resources.files("knet_train.data") / name).read_bytes())


# The 150 classes of the scene parsing benchmark (arXiv 1608.05442) in its order, with
# mmsegmentation's short names and palette (``mmseg/utils/class_names.py``); 255 is void.
ADE20K = _packaged("ade20k.json")

# The 19 classes that Cityscapes (arXiv 1604.01685) scores, by train id; 255 is void.
CITYSCAPES19 = _packaged("cityscapes.json")

_SAME_SPLIT = {"train": "training", "training": "train", "val": "validation", "validation": "val"}
_IMAGE, _TRAIN_IDS, _IDS = "_leftImg8bit.png", "_gtFine_labelTrainIds.png", "_gtFine_labelIds.png"


@dataclass(frozen=True)
class Sample:
    """One labelled image, not yet read; its name is the only one of its kind in the folder."""

    name: str
    image: Path
    label: Path


@dataclass(frozen=True)
class Layout:
    """A data folder whose layout and classes are known."""

    root: Path
    kind: Literal["knet-deploy", "ADE20K", "Cityscapes"]
    labels: LabelMap

    @property
    def void_first(self) -> bool:
        """Whether a label PNG holds 0 for void and v for class v - 1."""
        return self.kind == "ADE20K"


@dataclass(frozen=True)
class Listing:
    """The pairs of a split, and, a line each, what is wrong with those that are none."""

    samples: tuple[Sample, ...]
    problems: tuple[str, ...]
    unused: tuple[Path, ...]  # labels, of whatever split, that no image goes with


def find_layout(root: Path) -> Layout:
    """Tell the layout of ``root``. Raises DataError that says what is missing."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: --data wants one with images/ and labels/")
    if (root / "leftImg8bit").is_dir():
        if not (root / "gtFine").is_dir():
            raise DataError(
                f"{root} has leftImg8bit/ but no gtFine/: unpack Cityscapes' labels too"
            )
        return Layout(root, "Cityscapes", CITYSCAPES19)
    if not (root / "images").is_dir():
        inner = [path.parent for path in sorted(root.glob("*/images")) if path.is_dir()]
        hint = f"; did you mean {inner[0]}?" if inner else ""
        raise DataError(
            f"{root} has no folder images/: a data folder has images/ and labels/ (or annotations/ "
            f"as ADE20K has, or leftImg8bit/ and gtFine/ as Cityscapes has){hint}"
        )
    names = root / "labels.json"
    if (root / "labels").is_dir():
        return Layout(root, "knet-deploy", _eight_bits(load_labels_json(names), names))
    if (root / "annotations").is_dir():
        labels = _eight_bits(load_labels_json(names), names) if names.exists() else ADE20K
        return Layout(root, "ADE20K", labels)
    raise DataError(
        f"{root} has no folder labels/: a data folder has images/ and labels/ "
        "(or annotations/, with ADE20K's values)"
    )


def split_names(layout: Layout) -> list[str]:
    """The splits that the folder itself has, by name."""
    if layout.kind == "Cityscapes":
        return sorted(
            folder.name
            for folder in (layout.root / "leftImg8bit").iterdir()
            if folder.is_dir() and (layout.root / "gtFine" / folder.name).is_dir()
        )
    images = layout.root / "images"
    named = {path.stem for path in (layout.root / "split").glob("*.txt")}
    folders = {path.name for path in images.iterdir() if path.is_dir()}
    flat = any(path.suffix.lower() in IMAGE_SUFFIXES for path in images.iterdir())
    return sorted(named | folders | ({"all"} if flat else set()))


def list_split(layout: Layout, split: str) -> Listing:
    """Find the pairs of a split. Raises DataError when there is no such split."""
    known = split_names(layout)
    # The shares of a flat folder are no splits of its own: nothing to list twice.
    known += ["train", "val"] if "all" in known else []
    if split not in known:
        other = _SAME_SPLIT.get(split)
        if other not in known:
            has = ", ".join(sorted(set(known))) or "none"
            hint = f"split/{split}.txt or images/{split}/"
            if layout.kind == "Cityscapes":
                hint = f"leftImg8bit/{split}/ and gtFine/{split}/"
            raise DataError(f"{layout.root} has no split {split!r}; it has {has}: make {hint}")
        split = other
    return _cityscapes(layout, split) if layout.kind == "Cityscapes" else _trees(layout, split)


def _trees(layout: Layout, split: str) -> Listing:
    root = layout.root
    folder = root / ("annotations" if layout.void_first else "labels")
    images, twins = _by_stem(root / "images", IMAGE_SUFFIXES)
    masks, twin_masks = _by_stem(folder, (".png",))
    problems, samples = [*twins, *twin_masks], []
    stems = _stems(root, split, images)
    for stem, times in Counter(stems).items():
        if times > 1:
            problems.append(
                f"{root / 'split' / split}.txt names {stem} more than once: take the others out"
            )
        if stem not in images:
            problems.append(
                f"split {split!r} names {stem}, which is not in {root / 'images'}: "
                f"add the image, or take the line out of split/{split}.txt"
            )
        elif stem not in masks:
            problems.append(
                f"{images[stem]} has no label: expected a PNG named {stem}.png in {folder}"
            )
        else:
            samples.append(Sample(stem, images[stem], masks[stem]))
    unused = tuple(path for stem, path in masks.items() if stem not in images)
    return Listing(tuple(samples), tuple(problems), unused)


def _cityscapes(layout: Layout, split: str) -> Listing:
    images = layout.root / "leftImg8bit" / split
    labels = layout.root / "gtFine" / split
    found, numbers = (
        {path.name: path for path in labels.glob(f"*/*{suffix}")} for suffix in (_TRAIN_IDS, _IDS)
    )
    if numbers and not found:
        raise DataError(
            f"{labels} has *{_IDS} but no *{_TRAIN_IDS}: make them with cityscapesscripts "
            f"(pip install cityscapesscripts; CITYSCAPES_DATASET={layout.root} "
            "python -m cityscapesscripts.preparation.createTrainIdLabelImgs)"
        )
    samples, problems = [], []
    for path in sorted(images.glob(f"*/*{_IMAGE}")):
        stem = path.name.removesuffix(_IMAGE)
        label = found.pop(stem + _TRAIN_IDS, None)
        if label is None:
            problems.append(f"{path} has no label: expected {stem}{_TRAIN_IDS} in {labels}")
        else:
            samples.append(Sample(stem, path, label))
    return Listing(tuple(samples), tuple(problems), tuple(sorted(found.values())))


def _stems(root: Path, split: str, images: dict[str, Path]) -> list[str]:
    listing = root / "split" / f"{split}.txt"
    if listing.is_file():
        try:
            lines = listing.read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{listing}: {error}; it wants one stem a line, in UTF-8") from error
        return [line.strip() for line in lines if line.strip()]
    folder = root / "images" / split
    if folder.is_dir():
        return sorted(stem for stem, path in images.items() if folder in path.parents)
    flat = sorted(stem for stem, path in images.items() if path.parent == root / "images")
    match split:
        case "val":
            return flat[::10]
        case "train":
            return [stem for index, stem in enumerate(flat) if index % 10]
        case _:
            return flat


def _by_stem(folder: Path, suffixes: Sequence[str]) -> tuple[dict[str, Path], list[str]]:
    found: dict[str, Path] = {}
    twins = []
    for path in sorted(folder.rglob("*")):
        if path.name.startswith("."):  # macOS leaves "._photo.jpg" beside "photo.jpg"
            continue
        if path.suffix.lower() in suffixes and path.is_file():
            if path.stem in found:
                twins.append(f"{path} and {found[path.stem]} share a name: rename one of them")
            found[path.stem] = path
    return found, twins


def _eight_bits(labels: LabelMap, path: Path) -> LabelMap:
    if labels.num_classes > 255 or labels.ignore_index > 255:
        raise DataError(f"{path}: label PNGs are 8-bit, so values end at 255")
    return labels
