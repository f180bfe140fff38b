"""Pascal VOC's tree, which CVAT's "segmentation mask" and labelme2voc write too."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from knet_runtime.colours import Colour
from knet_runtime.errors import DataError
from knet_runtime.sources.images import IMAGE_SUFFIXES
from knet_train.data.convert.class_files import Classes, read_classes
from knet_train.data.convert.label_images import Coding, numbered, numbers_of
from knet_train.data.convert.source import (
    BACKGROUND,
    VOID,
    Drawing,
    Item,
    Size,
    Source,
    read_text,
    some,
    split_of,
)
from knet_train.data.files import entries, walk

# In the order of the development kit (VOCcode/VOCinit.m); 255 is void.
_NAMES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair"),
    *("cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
_VOID_COLOUR: Colour = (224, 224, 192)  # of value 255 in VOC's palette
_MASKS, _OBJECTS = "SegmentationClass", "SegmentationObject"


def is_voc(root: Path) -> str | None:
    """Why it is a tree of Pascal VOC's; None where it is none."""
    for name in (_MASKS, "SegmentationClassPNG"):
        if (root / name).is_dir():
            return f"{name}/" + (" and labelmap.txt" if (root / "labelmap.txt").is_file() else "")
    return None


def read_voc(root: Path, _: Path) -> Source:
    """Class masks by the palette of ``labelmap.txt``, by the names of ``class_names.txt``, or by
    VOC's own 21 classes; objects where all images have them; splits of ``ImageSets``."""
    masks = root / (_MASKS if (root / _MASKS).is_dir() else "SegmentationClassPNG")
    problems: list[str] = []
    images: dict[str, Path] = {}
    for path in walk(root, problems):
        below = path.relative_to(root).parts[0]
        if path.suffix.lower() in IMAGE_SUFFIXES and not below.startswith("Segmentation"):
            place = path.relative_to(root / below) if below in ("JPEGImages", "images") else path
            if images.setdefault(place.with_suffix("").as_posix(), path) != path:
                raise DataError(
                    f"{path} and {images[place.with_suffix('').as_posix()]} share a name: rename "
                    "one of them and its mask"
                )
    classes = _classes(root)
    splits = _splits(root)
    items, missing = [], []
    numbered_all = True
    for path in walk(masks, problems):
        if path.suffix.lower() != ".png":
            continue
        name = path.relative_to(masks).with_suffix("").as_posix()
        image = images.get(name) or images.get(path.stem)
        if image is None:
            missing.append(path.name)
            continue
        objects = root / _OBJECTS / path.relative_to(masks)
        numbered_all &= objects.is_file()
        draw = partial(_draw, path, objects, classes.coding)
        items.append(Item(name, image, path, draw, splits.get(name)))
    if not items and missing:
        raise DataError(
            f"{masks} has {len(missing)} masks, but no image goes with them: put the images into "
            f"{root / 'JPEGImages'} (CVAT exports them with 'Save images')"
        )
    things = [name for name in classes.names if name != BACKGROUND]
    unlabelled = len(images) - len(items)
    left = [f"{unlabelled} images without a mask in {masks.name}/"] if unlabelled > 0 else []
    left += some(missing, "masks without an image")
    return Source(
        classes.names,
        tuple(items),
        frozenset(things if numbered_all else ()),
        classes.palette,
        (*problems, *left),
    )


def _classes(root: Path) -> Classes:
    for name in ("labelmap.txt", "class_names.txt"):
        if (root / name).is_file():
            found = read_classes(root / name)
            names = tuple(BACKGROUND if one == "_background_" else one for one in found.names)
            return found._replace(names=names)
    palette = _colours(len(_NAMES))
    colours = {_VOID_COLOUR: VOID, **{colour: n for n, colour in enumerate(palette)}}
    named = dict(zip(_NAMES, palette, strict=True))
    return Classes(_NAMES, Coding(numbers_of(len(_NAMES)), colours), named)


def _colours(count: int) -> tuple[Colour, ...]:
    """VOC's colours of the values 0, 1, …: the bits of a value in turn are the highest bits of red,
    green and blue, then the next ones."""
    colours = []
    for value in range(count):
        colour = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                colour[channel] |= ((value >> (3 * bit + channel)) & 1) << (7 - bit)
        colours.append((colour[0], colour[1], colour[2]))
    return tuple(colours)


def _splits(root: Path) -> dict[str, str | None]:
    """The split of each name that ImageSets lists; ``trainval`` says nothing."""
    found: dict[str, str | None] = {}
    folder = root / "ImageSets" / "Segmentation"
    for path in entries(folder) if folder.is_dir() else ():
        split = split_of(path.stem)
        if path.suffix == ".txt" and split is not None:
            found |= {line.strip(): split for line in read_text(path).splitlines()}
    return found


def _draw(path: Path, objects: Path, coding: Coding, _: Size) -> Drawing:
    classes = coding.classes(path)
    if not objects.is_file():
        return Drawing(classes)
    numbers = numbered(objects, (0, 255, (224 << 16) | (224 << 8) | 192))
    if numbers.shape != classes.shape:
        raise DataError(f"{objects} is of another size than {path}: export both again")
    return Drawing(classes, numbers)
