"""COCO's two formats of labelled objects: ``panoptic_SPLIT.json`` beside a folder of PNGs, and
``instances_SPLIT.json``.

The files lie in the data folder or in its ``annotations/``; the pictures in a folder named like the
split, in ``images/``, or where ``file_name`` says. Annotations go with images by ``image_id``,
whatever their order. A split may be named without its year (``val`` for ``val2017``).

Classes and things (``isthing``; where it is not stated, every category is one) are the JSON's
categories, unless a ``labels.json`` chooses: there a class is the category of its name, or those
that ``"map"`` lists for it. What is mapped to no class is void: it counts neither as an object nor
as background. So is a category ``__ignore__``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from knet_runtime.errors import ConfigError, DataError
from knet_runtime.labels import Colour, LabelMap, distinct_palette
from knet_runtime.types import Task
from knet_train.data.census import names
from knet_train.data.label_files import UNREADABLE
from knet_train.data.layouts import COCO, COCO_THINGS, CocoFormat, class_sources, coco_files
from knet_train.data.regions import Region, region, run_lengths
from knet_train.data.segment_folder import SegmentFolder, task_labels
from knet_train.data.truth import IGNORED, Truth, from_map, layered


class _Image(msgspec.Struct):
    id: int | str
    file_name: str
    height: int
    width: int


class _Category(msgspec.Struct):
    id: int
    name: str
    isthing: int = 1
    color: Colour | None = None


class _Segment(msgspec.Struct):
    id: int
    category_id: int
    iscrowd: int = 0


class _PanopticAnnotation(msgspec.Struct):
    image_id: int | str
    file_name: str
    segments_info: list[_Segment]


class _Annotation(msgspec.Struct):
    image_id: int | str
    category_id: int
    segmentation: msgspec.Raw
    id: int | str | None = None
    iscrowd: int = 0


class _Panoptic(msgspec.Struct):
    images: list[_Image]
    categories: list[_Category]
    annotations: list[_PanopticAnnotation]


class _Instances(msgspec.Struct):
    images: list[_Image]
    categories: list[_Category]
    annotations: list[_Annotation]


@dataclass(frozen=True)
class _Source:
    """One JSON file, and what its categories are to a task: ``classes`` is the class of each
    category id, None for what is void; a category that is missing there is background, as stuff is
    in task "instance"."""

    file: Path
    task: Task
    classes: dict[int, int | None]


@dataclass(frozen=True)
class PanopticSample:
    """One image, its PNG of ids and what the JSON says of them, not yet read."""

    name: str
    image: Path
    size: tuple[int, int]  # height, width
    png: Path
    segments: tuple[_Segment, ...]
    source: _Source

    @property
    def stated(self) -> Path:
        return self.source.file

    def truth(self) -> Truth:
        """The truth; raises DataError."""
        png, source = self.png, self.source
        try:
            with Image.open(png) as opened:
                if opened.mode != "RGB":
                    raise DataError(
                        f"{png} is a {opened.mode} image: COCO's panoptic PNGs are RGB, whose id "
                        "is R + 256 G + 65536 B"
                    )
                pixels = np.asarray(opened, np.uint32)
        except UNREADABLE as error:
            raise DataError(f"cannot read {png}: {error}; write the PNG again") from error
        if pixels.shape[:2] != self.size:
            raise DataError(
                f"{png} is {pixels.shape[1]}×{pixels.shape[0]} but its image is "
                f"{self.size[1]}×{self.size[0]}: labels are never resized, fix the file"
            )
        values = (pixels * np.array([1, 1 << 8, 1 << 16], np.uint32)).sum(-1, dtype=np.uint32)
        known = [
            (one.id, source.classes.get(one.category_id, -1), bool(one.iscrowd))
            for one in self.segments
        ]
        truth, strange = from_map(values, known)
        if strange:
            raise DataError(
                f"{png} holds the id {strange[0]}, which {source.file.name} has no segment for: "
                "they are of two versions, fetch both again"
            )
        return truth if source.task == "panoptic" else _without_background(truth)


@dataclass(frozen=True)
class InstancesSample:
    """One image and its annotations, not yet decoded."""

    name: str
    image: Path
    size: tuple[int, int]  # height, width
    objects: tuple[_Annotation, ...]
    source: _Source

    @property
    def stated(self) -> Path:
        return self.source.file

    def truth(self) -> Truth:
        """The truth; raises DataError."""
        void = np.zeros(self.size, np.bool_)
        truth = layered(self._regions(void), self.size, void)
        if self.source.task == "panoptic":  # what no object covers was not labelled at all
            void |= (truth.ids == 0).all(0)
        return truth

    def _regions(self, void: NDArray[np.bool_]) -> Iterator[tuple[int, bool, Region]]:
        """The regions of classes; those of what is void are drawn there."""
        classes = self.source.classes
        for rank, found in enumerate(self.objects):
            if found.category_id not in classes:
                continue
            class_id = classes[found.category_id]
            own = region(self._run_lengths(found, rank), self.size)
            if class_id is None:
                void[own.place] |= own.mask
            else:
                yield class_id, bool(found.iscrowd), own

    def _run_lengths(self, found: _Annotation, rank: int) -> list[int]:
        try:
            return run_lengths(msgspec.json.decode(found.segmentation), self.size)
        except DataError as error:
            number = f"annotation {found.id if found.id is not None else f'number {rank + 1}'}"
            raise DataError(f"{self.source.file}: {number} of {self.name} {error}") from error


def _without_background(truth: Truth) -> Truth:
    """A panoptic truth of things and of class -1, which is background, not void."""
    keep = [number for number, class_id in enumerate(truth.classes, 1) if class_id >= 0]
    table = np.zeros(len(truth.classes) + 1, np.uint16)
    table[keep] = np.arange(1, len(keep) + 1)
    crowds = frozenset(int(table[number]) for number in truth.crowds if table[number])
    classes = tuple(truth.classes[number - 1] for number in keep)
    return Truth(table[truth.ids], classes, crowds, truth.void)


def coco_formats(task: Task) -> tuple[CocoFormat, CocoFormat]:
    """The two formats, that which goes with the task first."""
    return ("panoptic", "instances") if task == "panoptic" else ("instances", "panoptic")


def list_coco(root: Path, split: str, task: Task) -> SegmentFolder:
    """The images and objects of a split, of whichever format goes with the task where both are
    there. Raises DataError where nothing can be listed."""
    files = coco_files(root)
    kind = next(one for one in coco_formats(task) if one in files)
    name = _split_name(root, split, files[kind])
    return open_coco(root, files[kind][name], name, kind, task)


def _split_name(root: Path, split: str, files: dict[str, Path]) -> str:
    if split in files:
        return split
    alike = [name for name in files if re.fullmatch(rf"(.*_)?{re.escape(split)}\d*", name)]
    if len(alike) == 1:
        return alike[0]
    has = ", ".join(alike or files)
    raise DataError(
        f"{root} has {'several splits' if alike else 'no split'} {split!r}; it has {has}: name one "
        "with data.train_split or data.val_split"
    )


def open_coco(root: Path, file: Path, split: str, kind: CocoFormat, task: Task) -> SegmentFolder:
    """The images and objects of one JSON file, whatever its name. Raises DataError where nothing
    can be listed."""
    try:
        content = msgspec.json.decode(
            file.read_bytes(), type=_Panoptic if kind == "panoptic" else _Instances
        )
    except (OSError, msgspec.DecodeError) as error:
        raise DataError(f"{file}: {error}; it wants COCO's {kind} format") from error
    problems: list[str] = []
    for what, ids in (
        ("category", [one.id for one in content.categories]),
        ("image", [one.id for one in content.images]),
    ):
        problems += _doubled(file, what, ids)
    labels, classes, unmapped, stuff = _classes(root, file, content.categories, task)
    known = {one.id for one in content.images}
    strange = [one.image_id for one in content.annotations if one.image_id not in known]
    if strange:
        problems.append(
            f"{file}: {len(strange)} annotations are of images that it does not list, such as "
            f"image_id {strange[0]}: take them out, or list the images"
        )
    if not content.annotations:
        raise DataError(f"{file} has no annotations: nothing can be learnt or scored")
    source = _Source(file, task, classes)
    samples: Sequence[PanopticSample | InstancesSample]
    if isinstance(content, _Panoptic):
        samples = _panoptic_samples(root, source, split, content, problems)
    else:
        samples = _instance_samples(root, source, split, content, problems)
    return SegmentFolder(
        root,
        f"COCO {kind}",
        file,
        split,
        labels,
        task,
        tuple(samples),
        tuple(problems),
        unmapped,
        stuff if kind == "instances" else (),
    )


def _doubled(file: Path, what: str, ids: Sequence[int | str]) -> list[str]:
    twice = [value for value, times in Counter(ids).items() if times > 1]
    if not twice:
        return []
    return [f"{file}: {what} id {twice[0]} is there more than once: give each its own"]


def _classes(
    root: Path, file: Path, categories: Sequence[_Category], task: Task
) -> tuple[LabelMap, dict[int, int | None], tuple[str, ...], tuple[str, ...]]:
    """The label map, the class of each category, and the names of what has none, and of what is
    background."""
    found = [one.name for one in categories]
    if not categories:
        raise DataError(f"{file} has no categories: nothing says what its objects are")
    if twice := [name for name, times in Counter(found).items() if times > 1]:
        raise DataError(f"{file}: {len(twice)} categories share a name, such as {twice[0]!r}")
    path = root / "labels.json"
    if path.exists():
        labels, sources = class_sources(path)
    else:
        # In task "instance" stuff is no class, but the background that it is.
        chosen = [
            one for one in categories if (one.isthing or task == "panoptic") and one.name != IGNORED
        ]
        labels, sources = _own_labels(file, chosen), {}
    own = task_labels(labels, task, path if path.exists() else file)
    stuff = set(labels.names) - set(own.names)
    labels = own
    meant = {
        source.casefold(): name
        for name in (*labels.names, *stuff)
        for source in sources.get(name, (name,))
    }
    absent = sorted(set(meant) - {name.casefold() for name in found})
    if len(absent) == len(meant):
        raise DataError(
            f"{path} names none of the categories of {file.name} ({names(found)}): use "
            'their names, or list them per class under "map"'
        )
    classes: dict[int, int | None] = {}
    unmapped, background = [], []
    for one in categories:
        name = meant.get(one.name.casefold())
        if name in stuff or (name is None and task == "instance" and not one.isthing):
            background.append(one.name)
            continue
        if name is None:
            unmapped.append(one.name)
        classes[one.id] = None if name is None else labels.names.index(name)
    return labels, classes, tuple(unmapped), tuple(background)


def _own_labels(file: Path, categories: Sequence[_Category]) -> LabelMap:
    found = tuple(one.name for one in categories)
    for published in (COCO, COCO_THINGS):
        if found == published.names:
            return published
    colours = [one.color for one in categories if one.color is not None]
    palette = tuple(colours) if len(colours) == len(found) else distinct_palette(len(found))
    things = tuple(index for index, one in enumerate(categories) if one.isthing)
    try:
        return LabelMap(found, palette, 255 if len(found) <= 255 else 65535, things)
    except (ValueError, ConfigError) as error:
        raise DataError(f"{file}: {error}") from error


def _panoptic_samples(
    root: Path, source: _Source, split: str, content: _Panoptic, problems: list[str]
) -> list[PanopticSample]:
    file = source.file
    problems += _doubled(file, "annotation of image", [one.image_id for one in content.annotations])
    categories = {one.id for one in content.categories}
    annotations = {one.image_id: one for one in content.annotations}
    folders = (file.with_suffix(""), file.parent, root / file.stem, root)
    samples = []
    for image, path in _images(root, file, split, content.images, problems):
        found = annotations.get(image.id)
        if found is None:
            problems.append(f"{file}: image {image.file_name} has no annotation: take it out")
            continue
        png = _first(folders, found.file_name)
        if png is None:
            problems.append(f"{folders[0] / found.file_name} is not there: fetch the panoptic PNGs")
            continue
        wrong = _doubled(file, f"in {found.file_name} segment", [s.id for s in found.segments_info])
        strange = [s for s in found.segments_info if s.category_id not in categories]
        wrong += _no_category(file, image, [s.category_id for s in strange])
        problems += wrong
        if not wrong:
            size = image.height, image.width
            segments = tuple(found.segments_info)
            samples.append(PanopticSample(_name(image), path, size, png, segments, source))
    return samples


def _instance_samples(
    root: Path, source: _Source, split: str, content: _Instances, problems: list[str]
) -> list[InstancesSample]:
    file = source.file
    ids = [one.id for one in content.annotations if one.id is not None]
    problems += _doubled(file, "annotation", ids)
    categories = {one.id for one in content.categories}
    objects: dict[int | str, list[_Annotation]] = {}
    for one in content.annotations:
        objects.setdefault(one.image_id, []).append(one)
    samples = []
    for image, path in _images(root, file, split, content.images, problems):
        own = objects.get(image.id, [])
        strange = [one.category_id for one in own if one.category_id not in categories]
        problems += _no_category(file, image, strange)
        if not strange:
            size = image.height, image.width
            samples.append(InstancesSample(_name(image), path, size, tuple(own), source))
    return samples


def _no_category(file: Path, image: _Image, strange: list[int]) -> list[str]:
    if not strange:
        return []
    return [f"{file}: {image.file_name} has category_id {strange[0]}, which is no category of it"]


def _name(image: _Image) -> str:
    return Path(image.file_name).with_suffix("").as_posix()


def _images(
    root: Path, file: Path, split: str, images: Sequence[_Image], problems: list[str]
) -> Iterator[tuple[_Image, Path]]:
    """The images that are there; the others go to ``problems``, together."""
    last = split.rpartition("_")[2]
    folders = [
        folder / name
        for folder in (root / "images", root)
        for name in dict.fromkeys((split, last, ""))
    ]
    missing = []
    for image in images:
        path = _first(folders, image.file_name)
        if path is None:
            missing.append(image.file_name)
        elif image.height < 1 or image.width < 1:
            problems.append(f"{file}: {image.file_name} is {image.width}×{image.height}")
        else:
            yield image, path
    if missing:
        problems.append(
            f"{file} lists {len(missing)} images that are not there, such as {missing[0]}: put "
            f"them into {root / last} or {root / 'images'}"
        )


def _first(folders: Sequence[Path], name: str) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)
