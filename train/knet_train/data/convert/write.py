"""Convert a folder of a foreign format: this project's layout appears whole, or not at all."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from knet_runtime.atomic import AtomicFolder, output_error
from knet_runtime.errors import ConfigError, DataError, OutputError
from knet_runtime.types import Task
from knet_train.data.convert.archive import unpack_zip
from knet_train.data.convert.formats import Match, choose
from knet_train.data.convert.selection import IGNORE, Selection, select
from knet_train.data.convert.source import Item, Source
from knet_train.data.convert.splits import divide
from knet_train.data.dataset import shown_size
from knet_train.data.files import place_file

_WORKERS = 8  # images in memory at a time


@dataclass(frozen=True)
class Options:
    """What a conversion is to make: see ``select`` for ``classes`` and ``renamed``, ``divide`` for
    ``shares``. With ``link``, images are links to those of the source. Of another task than
    "semantic", objects are written too."""

    classes: Sequence[str] = ()
    renamed: Sequence[str] = ()
    shares: Sequence[float] | None = None
    link: bool = False
    task: Task = "semantic"


class ClassShare(NamedTuple):
    """How often a class was written; ``objects`` is 0 for stuff, and for task "semantic"."""

    name: str
    pixels: int
    images: int
    objects: int


class Converted(NamedTuple):
    """What was written, or, where there are ``problems``, was not: a line for each."""

    splits: dict[str, int]
    divided: str  # how, in words
    classes: tuple[ClassShare, ...]
    void: int  # pixels
    left_out: tuple[str, ...]
    problems: tuple[str, ...]


class Opened(NamedTuple):
    """A source that was recognised and listed, and nothing of it read yet but its lists."""

    match: Match
    source: Source
    scratch: Path


@contextmanager
def open_source(path: Path, format_name: str | None = None) -> Iterator[Opened]:
    """Recognise a folder or ZIP file, and list it; what is unpacked for that vanishes at the end.

    Raises DataError.
    """
    with tempfile.TemporaryDirectory(prefix="knet-convert-") as temporary:
        root, scratch = path, Path(temporary) / "scratch"
        if path.is_file() and path.suffix.lower() == ".zip":
            root = Path(temporary) / path.stem
            root.mkdir()
            unpack_zip(path, root)
        elif not path.is_dir():
            raise DataError(f"{path} is no folder and no .zip file: name what is to be converted")
        match = choose(root, format_name)
        source = match.format.read(match.root, scratch)
        if not source.items:
            more = f": {source.left_out[0]}" if source.left_out else ""
            raise DataError(f"{path} has no labelled image{more}")
        yield Opened(match, source, Path(temporary))


def check_options(out: Path, options: Options, path: Path) -> None:
    """Refuse beforehand what could not be written. Raises ConfigError and OutputError."""
    if os.path.lexists(out):
        raise OutputError(f"{out} is there already: name another folder, or remove it")
    if options.link and path.is_file():
        raise ConfigError(f"--link: {path} is a ZIP file, whose images are unpacked: leave it out")


def convert(
    opened: Opened, out: Path, options: Options, on_image: Callable[[], None] = lambda: None
) -> Converted:
    """Write ``images/SPLIT/``, ``labels/SPLIT/``, ``labels.json`` and, but for task "semantic",
    ``instances/SPLIT/`` into the new folder ``out``.

    Where an image or its labels cannot be used, ``problems`` says so and nothing is written. Raises
    ConfigError, DataError and OutputError.
    """
    source = opened.source
    selection = select(source, options.classes, options.renamed)
    if options.task != "semantic" and not selection.labels.things:
        raise DataError(
            f"{opened.match.format.title} tells no objects apart here, which task {options.task} "
            "learns from: leave --task out"
        )
    splits, divided = divide(source.items, options.shares)
    problems = _shared(splits)
    counts = _Counts(selection)
    try:
        with AtomicFolder(out) as folder, ThreadPoolExecutor(_WORKERS) as pool:
            writer = _Writer(folder.path, opened.scratch, selection, options)
            try:
                jobs = [(item, splits[item]) for item in source.items] if not problems else []
                for result in pool.map(writer.write, jobs):
                    on_image()
                    if isinstance(result, str):
                        problems.append(result)
                    else:
                        counts.add(*result)
            finally:
                pool.shutdown(cancel_futures=True)  # after Ctrl-C nothing more is read
            if not problems:
                _write_labels(folder.path / "labels.json", selection, options.task)
                folder.commit()
    except OSError as error:
        raise output_error(out, error) from error
    left = list(source.left_out)
    if counts.hidden:
        left.append(f"{counts.hidden} objects without a pixel of their own: others cover them")
    if selection.dropped:
        left.append(f"classes that become 'not labelled': {', '.join(selection.dropped)}")
    return Converted(
        dict(sorted(Counter(splits.values()).items())),
        divided,
        counts.shares(),
        counts.void,
        tuple(left),
        tuple(problems),
    )


def _shared(splits: dict[Item, str]) -> list[str]:
    """The images that would get one name."""
    taken: dict[tuple[str, str], Item] = {}
    problems = []
    for item, split in splits.items():
        other = taken.setdefault((split, item.name), item)
        if other is not item:
            problems.append(
                f"{item.image} and {other.image} would both be {item.name} of {split}: rename one "
                "of them, and its labels"
            )
    return problems


class _Written(NamedTuple):
    pixels: NDArray[np.int64]  # of each value of the label, [256]
    objects: NDArray[np.int64]  # of each class, [N]
    hidden: int


class _Writer:
    def __init__(self, root: Path, scratch: Path, selection: Selection, options: Options) -> None:
        self.root, self.scratch, self.selection = root, scratch, selection
        self.link, self.numbered = options.link, options.task != "semantic"

    def write(self, job: tuple[Item, str]) -> _Written | str:
        """Write one image and its labels; what is wrong with it, where it cannot be used."""
        item, split = job
        try:
            size = shown_size(item.image)
            drawing = item.draw(size)
            if drawing.classes.shape != size:
                height, width = drawing.classes.shape
                raise DataError(
                    f"{item.label} is {width}×{height} but its image {item.image} is "
                    f"{size[1]}×{size[0]}: labels are never resized, fix the file"
                )
        except DataError as error:
            return str(error)
        label = self.selection.table[drawing.classes]  # VOID, -1, is its last entry
        self._save("labels", split, item, label)
        objects = np.zeros(self.selection.labels.num_classes, np.int64)
        if self.numbered and drawing.objects is not None:
            is_thing = np.isin(label, self.selection.labels.things)
            numbers = np.where(is_thing, drawing.objects, 0).astype(np.uint16)
            self._save("instances", split, item, numbers)
            pairs = np.unique(label[numbers > 0].astype(np.int64) << 16 | numbers[numbers > 0])
            objects = np.bincount(pairs >> 16, minlength=len(objects))
        target = self.root / "images" / split / f"{item.name}{item.image.suffix.lower()}"
        link = self.link and not item.image.is_relative_to(self.scratch)
        place_file(item.image, target, link=link)
        return _Written(np.bincount(label.ravel(), minlength=256), objects, drawing.hidden)

    def _save(self, kind: str, split: str, item: Item, values: NDArray[np.generic]) -> None:
        path = self.root / kind / split / f"{item.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path)


class _Counts:
    """What was written so far."""

    def __init__(self, selection: Selection) -> None:
        self.names = selection.labels.names
        self.pixels = np.zeros(256, np.int64)
        self.images = np.zeros(256, np.int64)
        self.objects = np.zeros(len(self.names), np.int64)
        self.hidden = 0

    def add(self, pixels: NDArray[np.int64], objects: NDArray[np.int64], hidden: int) -> None:
        self.pixels += pixels
        self.images += pixels > 0
        self.objects += objects
        self.hidden += hidden

    @property
    def void(self) -> int:
        return int(self.pixels[IGNORE])

    def shares(self) -> tuple[ClassShare, ...]:
        rows = zip(
            self.names,
            self.pixels.tolist(),
            self.images.tolist(),
            self.objects.tolist(),
            strict=False,
        )
        return tuple(ClassShare(*row) for row in rows)


def _write_labels(path: Path, selection: Selection, task: Task) -> None:
    labels = selection.labels
    content: dict[str, object] = {
        "class_names": labels.names,
        "palette_rgb": labels.palette,
        "ignore_index": IGNORE,
    }
    if task != "semantic":
        content["things"] = [labels.names[number] for number in labels.things]
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")
