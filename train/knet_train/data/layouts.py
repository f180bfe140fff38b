"""Where a data folder has its images and labels, and of which classes: three layouts, told apart
by what is there.

- **knet-deploy**: ``images/`` and ``labels/`` with the same paths below them (labels are PNGs of
  class indices) and ``labels.json`` (see ``load_labels_json``).
- **ADE20K**: ``images/`` and ``annotations/``, whose PNGs hold 0 for void and v for class v - 1.
  The 150 classes of the benchmark, unless a ``labels.json`` names others.
- **Cityscapes**: ``leftImg8bit/SPLIT/CITY/*_leftImg8bit.png`` and
  ``gtFine/SPLIT/CITY/*_gtFine_labelTrainIds.png``; 19 classes, 255 is void.

Single objects are told apart by ``instances/`` beside the first two, PNGs of objects' numbers with
the same paths, or by Cityscapes' ``*_gtFine_instanceIds.png``. Of one class, ``instances/`` or
``masks/`` may stand alone. COCO's formats are another matter: ``knet_train.data.coco``.

A split of the first two is ``split/NAME.txt`` (an image a line: its path below ``images/``, or its
stem where no other image has it) if that file exists, else the folder ``images/NAME``; a flat
``images/`` has the splits ``all``, ``val`` (every tenth image by name) and ``train`` (the others).
``training`` and ``validation`` stand for ``train`` and ``val``, and the other way round, where only
one of the two exists. Links are followed; hidden files and folders, and what network drives and
notebooks leave behind, are left out.
"""

from __future__ import annotations

import difflib
import json
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import msgspec

from knet_runtime.errors import DataError
from knet_runtime.labels import Colour, LabelMap, distinct_palette
from knet_runtime.sources.images import IMAGE_SUFFIXES
from knet_train.data.files import entries, walk


class _LabelsJson(msgspec.Struct):
    class_names: tuple[str, ...]
    palette_rgb: tuple[Colour, ...] | None = None
    ignore_index: int = 255
    things: tuple[str, ...] = ()
    map: dict[str, tuple[str, ...]] = {}


_OPTIONAL = ("things", "map")  # keys that a file states all of the rest without
# What people call the keys of labels.json, and what comes near to a key when it is misspelt.
_MEANT = {
    **{key: key for key in _LabelsJson.__struct_fields__},
    **dict.fromkeys(("names", "classes", "labels", "categories"), "class_names"),
    **dict.fromkeys(("palette", "colors", "colours", "color_map", "colour_map"), "palette_rgb"),
    **dict.fromkeys(("ignore", "ignore_label", "ignore_value", "void"), "ignore_index"),
}
LABELS_EXAMPLE = """\
{"class_names": ["background", "crack"],
 "palette_rgb": [[0, 0, 0], [220, 20, 60]],
 "ignore_index": 255}"""


def load_labels_json(path: Path) -> LabelMap:
    """Read a data set's ``labels.json``: ``class_names``, and optionally ``palette_rgb``
    (a distinct palette is made when it is absent) and ``ignore_index`` (255); or a plain list of
    the names.

    An unknown key is refused while one of the three is missing, as it may be meant for it; in a
    file that states all three it is a note. Raises DataError with the file's name, and an example,
    when it is missing or malformed.
    """
    return _labels_json(path).labels


def class_sources(path: Path) -> tuple[LabelMap, dict[str, tuple[str, ...]]]:
    """The label map of a ``labels.json``, and what its ``map`` lists: by class, the names that
    other data has for it. Raises DataError as ``load_labels_json`` does."""
    stated = _labels_json(path)
    return stated.labels, stated.sources


class _Stated(NamedTuple):
    """What a labels.json says: ``painted`` is whether it states its colours."""

    labels: LabelMap
    painted: bool
    sources: dict[str, tuple[str, ...]]


def _labels_json(path: Path) -> _Stated:
    try:
        return _decode(path.read_bytes())
    except OSError as error:
        text = f"{path}: {error.strerror}; a data folder needs a labels.json with class_names"
        raise _labels_error(text) from error
    except ValueError as error:  # msgspec's errors are ValueErrors too
        raise _labels_error(f"{path}: {error}") from error


def _labels_error(text: str) -> DataError:
    error = DataError(text)
    error.example = LABELS_EXAMPLE
    return error


def _decode(data: bytes) -> _Stated:
    # Windows writes UTF-8 with a byte order mark, or UTF-16.
    raw: Any = msgspec.json.decode(data.decode(json.detect_encoding(data)))
    if isinstance(raw, list):
        raw = {"class_names": raw}
    if not isinstance(raw, dict):
        raise ValueError(f"is {raw!r}: it wants an object with class_names, or a list of names")
    known = _LabelsJson.__struct_fields__
    unknown = [key for key in raw if key not in known]
    if unknown and not all(key in raw for key in known if key not in _OPTIONAL):
        near = difflib.get_close_matches(unknown[0].casefold(), _MEANT, 1, 0.75)
        hint = f"did you mean {_MEANT[near[0]]}?" if near else f"its keys are {', '.join(known)}"
        raise ValueError(f"unknown key {unknown[0]!r}; {hint}")
    stated = msgspec.convert(raw, _LabelsJson)
    palette = stated.palette_rgb or distinct_palette(len(stated.class_names))
    labels = LabelMap(stated.class_names, palette, stated.ignore_index)
    labels = msgspec.structs.replace(labels, things=labels.indices(stated.things))
    for name in stated.map:
        if name not in labels.names:
            raise ValueError(f"map names {name!r}, which is no class of it")
    return _Stated(labels, stated.palette_rgb is not None, stated.map)


def _packaged(name: str, package: str = "knet_train.data") -> LabelMap:
    return _decode((resources.files(package) / name).read_bytes()).labels


# The 150 classes of the scene parsing benchmark (arXiv 1608.05442) in its order, with
# mmsegmentation's short names and palette (``mmseg/utils/class_names.py``); 255 is void.
ADE20K = _packaged("ade20k.json")

# The 19 classes that Cityscapes (arXiv 1604.01685) scores, by train id, and which of them have
# single objects; 255 is void.
CITYSCAPES19 = _packaged("cityscapes.json", "knet_runtime")

# COCO's 80 things, in the order of its instances, and its 53 classes of stuff after them, as the
# published networks have them; and its things alone.
COCO = _packaged("coco.json")
COCO_THINGS = LabelMap(COCO.names[:80], COCO.palette[:80], COCO.ignore_index, COCO.things)

_SAME_SPLIT = {"train": "training", "training": "train", "val": "validation", "validation": "val"}
_IMAGE, _IDS = "_leftImg8bit.png", "_gtFine_labelIds.png"
# What an image is paired with: the folder of PNGs beside images/, or the end of Cityscapes' names.
_CLASS_MAPS = {
    "knet-deploy": "labels",
    "ADE20K": "annotations",
    "Cityscapes": "_gtFine_labelTrainIds.png",
}
_CITYSCAPES_OBJECTS = "_gtFine_instanceIds.png"

_CATEGORIES = "panoptic_coco_categories.json"  # panopticapi's table of classes: no split

CocoFormat = Literal["panoptic", "instances"]


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
    named: bool = False  # by a labels.json; else the classes are those of the layout's data set
    painted: bool = True  # whether the colours are the data set's own, or were made here

    @property
    def images(self) -> Path:
        """The folder that all images are below."""
        return self.root / ("leftImg8bit" if self.kind == "Cityscapes" else "images")

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
        raise no_folder(root)
    if (root / "leftImg8bit").is_dir():
        if not (root / "gtFine").is_dir():
            raise DataError(
                f"{root} has leftImg8bit/ but no gtFine/: unpack Cityscapes' labels too"
            )
        return Layout(root, "Cityscapes", CITYSCAPES19)
    if is_coco(root):
        raise DataError(
            f"{root} holds single objects, in COCO's formats: semantic segmentation learns from "
            f"images/ and labels/{_conversion(root)}"
        )
    if not (root / "images").is_dir():
        inner = [path.parent for path in sorted(root.glob("*/images")) if path.is_dir()]
        hint = f"; did you mean {inner[0]}?" if inner else ""
        raise DataError(
            f"{root} has no folder images/: a data folder has images/ and labels/ (or annotations/ "
            f"as ADE20K has, or leftImg8bit/ and gtFine/ as Cityscapes has){hint}"
            + _conversion(root)
        )
    names = root / "labels.json"
    if (root / "labels").is_dir():
        if not names.exists():
            raise _labels_error(
                f"{names} is not there; a data folder needs a labels.json with class_names"
                + _conversion(root)
            )
        return Layout(root, "knet-deploy", *_own_labels(names))
    if (root / "annotations").is_dir():
        return Layout(root, "ADE20K", *(_own_labels(names) if names.exists() else (ADE20K,)))
    raise DataError(
        f"{root} has no folder labels/: a data folder has images/ and labels/ "
        f"(or annotations/, with ADE20K's values){_conversion(root)}"
    )


def no_folder(root: Path) -> DataError:
    """What to raise where a data folder should be and is none."""
    how = _conversion(root) if root.suffix.lower() == ".zip" and root.is_file() else ""
    return DataError(f"{root} is not a folder: --data wants one with images/ and labels/{how}")


def find_objects(root: Path) -> tuple[Layout, str, bool]:
    """The layout of a folder whose PNGs number single objects, what ``list_split`` finds those by,
    and whether they stand beside class maps. Raises DataError that says what is missing."""
    if (root / "leftImg8bit").is_dir():
        return find_layout(root), _CITYSCAPES_OBJECTS, False
    class_maps = any((root / name).is_dir() for name in ("labels", "annotations"))
    for name in ("instances",) if class_maps else ("instances", "masks"):
        if not (root / name).is_dir() or not (root / "images").is_dir():
            continue
        if class_maps:
            return find_layout(root), name, True
        if not (root / "labels.json").exists():
            raise DataError(
                f"{root} has {name}/ without class maps: say in labels.json what the objects are, "
                f'such as ["nucleus"]{_conversion(root)}'
            )
        return Layout(root, "knet-deploy", *_own_labels(root / "labels.json")), name, False
    beside = " beside its class maps" if class_maps else ", or masks/ of one class"
    raise DataError(
        f"{root} does not tell objects apart: it wants instances/{beside}, or panoptic_*.json or "
        "instances_*.json in COCO's formats, or Cityscapes' leftImg8bit/ and gtFine/"
        + _conversion(root)
    )


def _conversion(root: Path) -> str:
    """The end of an error: the command that converts the folder."""
    from knet_train.data.convert.formats import advice  # whose readers read these layouts too

    return advice(root)


def coco_files(root: Path) -> dict[CocoFormat, dict[str, Path]]:
    """The JSON files of a data folder, by format and by name of the split; empty where it is of
    another layout."""
    found: dict[CocoFormat, dict[str, Path]] = {"panoptic": {}, "instances": {}}
    for folder in (root, root / "annotations"):
        for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
            for kind, splits in found.items():
                if path.name.startswith(f"{kind}_") and path.name != _CATEGORIES:
                    splits[path.stem.removeprefix(f"{kind}_")] = path
    return {kind: splits for kind, splits in found.items() if splits}


def is_coco(root: Path) -> bool:
    """Whether it is a folder in COCO's formats; one with ``labels/`` is ours."""
    return not (root / "labels").is_dir() and bool(coco_files(root))


def split_names(layout: Layout) -> list[str]:
    """The splits that the folder itself has, by name."""
    if layout.kind == "Cityscapes":
        return sorted(
            folder.name
            for folder in entries(layout.root / "leftImg8bit")
            if folder.is_dir() and (layout.root / "gtFine" / folder.name).is_dir()
        )
    lists, images = layout.root / "split", entries(layout.root / "images")
    found = entries(lists) if lists.is_dir() else []
    named = {path.stem for path in found if path.suffix == ".txt"}
    folders = {path.name for path in images if path.is_dir()}
    flat = any(path.suffix.lower() in IMAGE_SUFFIXES for path in images if not path.is_dir())
    return sorted(named | folders | ({"all"} if flat else set()))


def list_split(layout: Layout, split: str, maps: str | None = None) -> Listing:
    """Find the pairs of a split: images with class maps, or with what ``find_objects`` says.
    Raises DataError when there is no such split."""
    known = split_names(layout)
    # The shares of a flat folder are no splits of its own: nothing to list twice.
    known += ["train", "val"] if "all" in known else []
    if split not in known:
        other = _SAME_SPLIT.get(split)
        if other not in known:
            has = ", ".join(sorted(set(known))) or "none"
            if (layout.root / "images" / split).is_symlink():
                raise DataError(f"{layout.root / 'images' / split} is a link to nothing: mend it")
            hint = f"split/{split}.txt or images/{split}/"
            if layout.kind == "Cityscapes":
                hint = f"leftImg8bit/{split}/ and gtFine/{split}/"
            raise DataError(f"{layout.root} has no split {split!r}; it has {has}: make {hint}")
        split = other
    find = _cityscapes if layout.kind == "Cityscapes" else _trees
    return find(layout.root, split, maps or _CLASS_MAPS[layout.kind])


def _trees(root: Path, split: str, maps: str) -> Listing:
    folder = root / maps
    images, problems = files_by_key(root / "images", IMAGE_SUFFIXES)
    masks, mask_problems = files_by_key(folder, (".png",))
    problems += mask_problems
    stems, mask_stems = keys_by_stem(images), keys_by_stem(masks)
    samples = []
    keys, unnamed = _keys(root, split, images, stems)
    problems += unnamed
    pairs = {key: partner(key, masks, stems, mask_stems) for key in images}
    for key, times in Counter(keys).items():
        name, label = PurePosixPath(key).name, pairs[key]
        if times > 1:
            problems.append(
                f"{root / 'split' / split}.txt names {key} more than once: take the others out"
            )
        if label is None:
            problems.append(
                f"{images[key]} has no label: expected a PNG named {key}.png in {folder}"
            )
        else:
            name = name if len(stems[name]) == 1 else key
            samples.append(Sample(name, images[key], masks[label]))
    paired = set(pairs.values())
    unused = tuple(path for key, path in masks.items() if key not in paired)
    return Listing(tuple(samples), tuple(problems), unused)


def partner(
    key: str,
    masks: Mapping[str, Path],
    stems: Mapping[str, Sequence[str]],
    mask_stems: Mapping[str, Sequence[str]],
) -> str | None:
    """The label of an image: at the same path, or, where both trees have the stem once, anywhere
    (labels may lie flat beside images in folders). ``stems`` are ``keys_by_stem`` of the images,
    ``mask_stems`` those of the labels ``masks``."""
    if key in masks:
        return key
    stem = PurePosixPath(key).name
    others = mask_stems.get(stem, [])
    return others[0] if len(stems[stem]) == len(others) == 1 else None


def _cityscapes(root: Path, split: str, maps: str) -> Listing:
    images = root / "leftImg8bit" / split
    labels = root / "gtFine" / split
    problems: list[str] = []
    below = [path for path in walk(labels, problems) if path.parent.parent == labels]
    found, numbers = (
        {path.name: path for path in below if path.name.endswith(suffix)} for suffix in (maps, _IDS)
    )
    if numbers and not found and maps == _CLASS_MAPS["Cityscapes"]:
        raise DataError(
            f"{labels} has *{_IDS} but no *{maps}, which hold the classes that are "
            f"scored{_conversion(root)}"
        )
    samples = []
    for path in walk(images, problems):
        if path.parent.parent != images or not path.name.endswith(_IMAGE):
            continue
        stem = path.name.removesuffix(_IMAGE)
        label = found.pop(stem + maps, None)
        if label is None:
            problems.append(f"{path} has no label: expected {stem}{maps} in {labels}")
        else:
            samples.append(Sample(stem, path, label))
    return Listing(tuple(samples), tuple(problems), tuple(sorted(found.values())))


def _keys(
    root: Path, split: str, images: dict[str, Path], stems: dict[str, list[str]]
) -> tuple[list[str], list[str]]:
    """The images of a split, and the lines of its list that name none."""
    listing = root / "split" / f"{split}.txt"
    if listing.is_file():
        try:
            lines = listing.read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{listing}: {error}; it wants one image a line, in UTF-8") from error
        keys, problems = [], []
        for line in filter(None, map(str.strip, lines)):
            found = _named(line, images, stems)
            if len(found) == 1:
                keys += found
            elif found:
                problems.append(
                    f"split {split!r} names {line}, which is the stem of {len(found)} images: "
                    f"name one by its path below images/, such as {found[0]}"
                )
            else:
                problems.append(
                    f"split {split!r} names {line}, which is not in {root / 'images'}: "
                    f"add the image, or take the line out of split/{split}.txt"
                )
        return keys, problems
    if (root / "images" / split).is_dir():
        return sorted(key for key in images if key.startswith(f"{split}/")), []
    flat = sorted(key for key in images if "/" not in key)
    match split:
        case "val":
            return flat[::10], []
        case "train":
            return [key for index, key in enumerate(flat) if index % 10], []
        case _:
            return flat, []


def _named(line: str, images: dict[str, Path], stems: dict[str, list[str]]) -> list[str]:
    """The images that a line of a split may mean: "a", "train/a", "train/a.jpg" and
    "images/train/a.jpg" are all right, "a" where no other image has this stem."""
    text = unicodedata.normalize("NFC", line.replace("\\", "/").removeprefix("./"))
    suffix = PurePosixPath(text).suffix
    plain = text.removesuffix(suffix) if suffix.lower() in IMAGE_SUFFIXES else text
    for name in (text, plain, plain.removeprefix("images/")):
        if name in images:
            return [name]
    return stems.get(text) or stems.get(plain, [])


def files_by_key(
    folder: Path, suffixes: Sequence[str], without: Collection[Path] = ()
) -> tuple[dict[str, Path], list[str]]:
    """The files with one of the suffixes, by their path below ``folder`` without it, but for those
    of ``without``; and, a line each, what is wrong there. Raises DataError."""
    found: dict[str, Path] = {}
    problems: list[str] = []
    for path in walk(folder, problems):
        if path.suffix.lower() in suffixes and path not in without:
            key = file_key(path, folder)
            if key in found:
                problems.append(f"{path} and {found[key]} share a name: rename one of them")
            found[key] = path
    return found, problems


def file_key(path: Path, folder: Path) -> str:
    """A file's path below ``folder``, without its suffix."""
    # A Mac writes "é" as two characters, and its zip files keep them.
    return unicodedata.normalize("NFC", path.relative_to(folder).with_suffix("").as_posix())


def keys_by_stem(keys: Iterable[str]) -> dict[str, list[str]]:
    """Keys by their last part."""
    found: dict[str, list[str]] = {}
    for key in keys:
        found.setdefault(PurePosixPath(key).name, []).append(key)
    return found


def _own_labels(path: Path) -> tuple[LabelMap, bool, bool]:
    """What ``Layout`` wants of a data set's own labels.json."""
    labels, painted, _ = _labels_json(path)
    if labels.num_classes > 255 or labels.ignore_index > 255:
        raise _labels_error(f"{path}: label PNGs are 8-bit, so values end at 255")
    return labels, True, painted
