"""Data sets of streets, as they are published: Cityscapes, Mapillary Vistas and BDD100K."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from knet_runtime.errors import DataError
from knet_runtime.labels import Colour
from knet_train.data.convert.label_images import Coding, numbers_of, read_pixels
from knet_train.data.convert.source import (
    VOID,
    Drawing,
    Item,
    Size,
    Source,
    read_json,
    some,
    split_of,
)
from knet_train.data.files import entries, walk
from knet_train.data.layouts import CITYSCAPES19
from knet_train.data.object_maps import CITYSCAPES_LABELS

_IMAGE, _IDS, _OBJECTS = "_leftImg8bit.png", "_gtFine_labelIds.png", "_gtFine_instanceIds.png"
_TRAIN_IDS = "_gtFine_labelTrainIds.png"
_MOST_LABEL = 33  # Cityscapes' last label; -1, the licence plate, is 255 in 8 bits
_MAPILLARY_CONFIG = "config_*.json"


def is_cityscapes(root: Path) -> str | None:
    """Why it is a Cityscapes tree; None where it is none."""
    if (root / "leftImg8bit").is_dir() and (root / "gtFine").is_dir():
        return "leftImg8bit/ and gtFine/"
    return None


def read_cityscapes(root: Path, _: Path) -> Source:
    """The 19 scored classes out of ``*_labelIds.png`` or ``*_labelTrainIds.png``, and the objects
    of ``*_instanceIds.png`` (value 1000 · label + object) where these are there."""
    problems: list[str] = []
    masks = {path.name: path for path in walk(root / "gtFine", problems)}
    by_label = dict.fromkeys((*range(_MOST_LABEL + 1), 255), VOID)
    by_label |= {label: n for n, label in enumerate(CITYSCAPES_LABELS)}
    items, alone = [], []
    for path in walk(root / "leftImg8bit", problems):
        place = path.relative_to(root / "leftImg8bit")
        if not path.name.endswith(_IMAGE) or len(place.parts) < 2:
            continue
        stem = path.name.removesuffix(_IMAGE)
        objects = masks.get(stem + _OBJECTS)
        if objects is not None:
            label = objects
            draw: Callable[[Size], Drawing] = partial(_cityscapes_objects, objects, by_label)
        elif (found := masks.get(stem + _IDS)) is not None:
            label, draw = found, partial(Coding(by_label).draw, found)
        elif (found := masks.get(stem + _TRAIN_IDS)) is not None:
            label, draw = found, partial(Coding(numbers_of(19)).draw, found)
        else:
            alone.append(path.name)
            continue
        name = (Path(*place.parts[1:-1]) / stem).as_posix()
        items.append(Item(name, path, label, draw, split_of(place.parts[0])))
    things = [CITYSCAPES19.names[n] for n in CITYSCAPES19.things]
    numbered = all(item.label.name.endswith(_OBJECTS) for item in items)
    return Source(
        CITYSCAPES19.names,
        tuple(items),
        frozenset(things) if numbered else frozenset(),
        dict(zip(CITYSCAPES19.names, CITYSCAPES19.palette, strict=True)),
        (*problems, *some(alone, "images without a label in gtFine/")),
    )


def _cityscapes_objects(path: Path, by_label: dict[int, int], _: Size) -> Drawing:
    values = read_pixels(path)
    if values.ndim != 2:
        raise DataError(f"{path} is no image of one channel: fetch Cityscapes' labels again")
    alone = values < 1000
    table = np.full(65536, VOID, np.int16)
    table[list(by_label)] = list(by_label.values())
    labels = np.where(alone, values, values // 1000)
    if strange := sorted({*np.unique(labels).tolist()} - {*by_label}):
        raise DataError(f"{path} holds label {strange[0]}, which Cityscapes does not have")
    # An object is known by its label too: numbers begin anew for each.
    inverse = np.unique(np.where(alone, 0, values), return_inverse=True)[1]
    numbers = inverse.reshape(values.shape) + int(not alone.any())
    return Drawing(table[labels], numbers.astype(np.uint16))


class _MapillaryLabel(msgspec.Struct):
    readable: str
    color: Colour
    instances: bool = False


class _MapillaryConfig(msgspec.Struct):
    labels: list[_MapillaryLabel]


def is_mapillary(root: Path) -> str | None:
    """Why it is a tree of Mapillary Vistas; None where it is none."""
    for name in ("training", "validation"):
        if (root / name / "images").is_dir() and list(root.glob(_MAPILLARY_CONFIG)):
            return f"{name}/images/ and {_MAPILLARY_CONFIG}"
    return None


def read_mapillary(root: Path, _: Path) -> Source:
    """Vistas of the newest version that the folder has: labels by number, objects in 16-bit PNGs
    of value 256 · label + object. "Unlabeled" is void."""
    config = sorted(root.glob(_MAPILLARY_CONFIG))[-1]
    version = config.stem.removeprefix("config_")
    labels = read_json(config, _MapillaryConfig).labels
    names = tuple(label.readable for label in labels)
    if len(set(names)) < len(names):
        raise DataError(f"{config} has a label twice: fetch the file again")
    classes = tuple(name for name in names if name.casefold() != "unlabeled")
    values = {n: classes.index(name) if name in classes else VOID for n, name in enumerate(names)}
    items, alone = [], []
    problems: list[str] = []
    numbered = True
    for split in ("training", "validation", "testing"):
        base = root / split
        # The first version's folders have no version's name in early downloads.
        masks = base / version if (base / version).is_dir() else base
        for path in walk(base / "images", problems) if (base / "images").is_dir() else ():
            label = masks / "labels" / f"{path.stem}.png"
            objects = masks / "instances" / label.name
            if not label.is_file():
                if split != "testing":
                    alone.append(path.name)
                continue
            numbered &= objects.is_file()
            draw = partial(_mapillary, label, objects, Coding(values))
            items.append(Item(path.stem, path, label, draw, split_of(split)))
    return Source(
        classes,
        tuple(items),
        frozenset(label.readable for label in labels if label.instances and numbered),
        {label.readable: label.color for label in labels},
        (*problems, *some(alone, f"images without a label in {version}/labels/")),
    )


def _mapillary(label: Path, objects: Path, coding: Coding, _: Size) -> Drawing:
    classes = coding.classes(label)
    if not objects.is_file():
        return Drawing(classes)
    values = read_pixels(objects)
    if values.shape != classes.shape:
        raise DataError(f"{objects} is of another size than {label}: fetch both again")
    # Labels without objects of their own have the number 0; as things they'd be crowds.
    inverse = np.unique(values, return_inverse=True)[1]
    return Drawing(classes, (inverse.reshape(values.shape) + 1).astype(np.uint16))


_BDD = (
    (Path("images/10k"), Path("labels/sem_seg/masks"), ".png"),
    (Path("seg/images"), Path("seg/labels"), "_train_id.png"),
)


def is_bdd100k(root: Path) -> str | None:
    """Why it is a tree of BDD100K; None where it is none."""
    for images, masks, _ in _BDD:
        if (root / images).is_dir() and (root / masks).is_dir():
            return f"{images.as_posix()}/ and {masks.as_posix()}/"
    return None


def read_bdd100k(root: Path, _: Path) -> Source:
    """The 10k images with semantic masks, whose values are Cityscapes' train ids."""
    images, masks, end = next(one for one in _BDD if (root / one[1]).is_dir())
    items, alone = [], []
    problems: list[str] = []
    for folder in entries(root / images):
        for path in walk(folder, problems) if folder.is_dir() else ():
            label = root / masks / folder.name / f"{path.stem}{end}"
            if label.is_file():
                draw = partial(Coding(numbers_of(19)).draw, label)
                items.append(Item(path.stem, path, label, draw, split_of(folder.name)))
            elif folder.name != "test":
                alone.append(path.name)
    palette = dict(zip(CITYSCAPES19.names, CITYSCAPES19.palette, strict=True))
    lines = some(alone, f"images without a mask in {masks.as_posix()}/")
    return Source(CITYSCAPES19.names, tuple(items), palette=palette, left_out=(*problems, *lines))
