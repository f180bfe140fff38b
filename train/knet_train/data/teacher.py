"""Soft labels from a bundle: what a teacher makes of images, as ``knet_train.data.soft_labels``
reads it. PyTorch takes no part."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_runtime.atomic import AtomicFile, check_folder
from knet_runtime.bundle.store import Bundle
from knet_runtime.drawing import encode_png
from knet_runtime.engines import open_engine
from knet_runtime.engines.base import Engine
from knet_runtime.errors import ConfigError, DataError, EngineError, OutputError, SourceError
from knet_runtime.labels import LabelMap
from knet_runtime.postprocess import cut_window
from knet_runtime.preprocess import fit_to_input
from knet_runtime.sources.images import IMAGE_SUFFIXES, read_image
from knet_runtime.types import Closeable, Rgb, Size
from knet_train.data.convert.selection import IGNORE, Selection, select
from knet_train.data.convert.source import VOID, Source
from knet_train.data.layouts import files_by_key
from knet_train.data.soft_labels import CLASS_NAMES

_MOST_CLASSES = 255  # beyond them, 8 bits may round every class of a pixel to 0


class TeacherOptions(NamedTuple):
    """How a teacher looks, and what of it is written.

    An image is seen at ``scales`` of the bundle's input size, with ``flip`` mirrored too; the
    probabilities of all views are averaged. The maps have the size ``map_size``, by default half of
    the input's. ``renamed`` are OLD=NEW: a class of the teacher becomes another, or a part of it;
    ``classes`` are the names after that which are written, in this order, by default all.
    """

    flip: bool = False
    scales: tuple[float, ...] = (1.0,)
    map_size: Size | None = None
    renamed: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


class Teacher(Closeable):
    """A semantic bundle that is opened for soft labels.

    Raises ConfigError for options that do not fit it, and what ``open_engine`` raises.
    """

    def __init__(self, bundle: Bundle, engine: str, options: TeacherOptions) -> None:
        manifest = bundle.manifest
        if manifest.task != "semantic":
            raise ConfigError(
                f"{bundle.path} is for {manifest.task} segmentation: soft labels are the class "
                "probabilities of a semantic network"
            )
        if not options.scales or min(options.scales) <= 0:
            raise ConfigError("--scales takes numbers above 0, such as 1,1.25")
        self.bundle, self.options = bundle, options
        self.selection = _selection(manifest.labels, options)
        height, width = manifest.input.size
        self.map_size = options.map_size or (max(1, height // 2), max(1, width // 2))
        self.looks = [_scaled(bundle, scale) for scale in options.scales]
        self._stack = ExitStack()
        self._engines: list[tuple[Bundle, Engine]] = []
        try:
            for look in self.looks:
                opened = self._stack.enter_context(open_engine(look, engine, "logits"))
                self._engines.append((look, opened))
        except BaseException:
            self.close()
            raise

    @property
    def labels(self) -> LabelMap:
        """The classes that are written."""
        return self.selection.labels

    @property
    def engine(self) -> str:
        """The name of the engine that runs."""
        return self._engines[0][1].name

    def probabilities(self, image: Rgb) -> NDArray[np.float32]:
        """Of an image uint8 [H, W, 3] RGB of any size: float32 [C, h, w] of ``map_size``, whose
        sum over the classes is 1 less what other classes of the teacher have. Raises EngineError.
        """
        views = [(image, False)]
        if self.options.flip:
            views.append((np.ascontiguousarray(image[:, ::-1]), True))
        found = []
        for look, engine in self._engines:
            for seen, mirrored in views:
                one = self._softmax(look, engine, seen)
                found.append(one[..., ::-1] if mirrored else one)
        mean = np.mean(found, axis=0)
        known = np.zeros((self.labels.num_classes, *self.map_size), np.float32)
        for number, target in enumerate(self.selection.table[:VOID].tolist()):
            if target != IGNORE:
                known[target] += mean[number]
        return known

    def _softmax(self, look: Bundle, engine: Engine, image: Rgb) -> NDArray[np.float32]:
        """The teacher's own probabilities [N, h, w] of one view."""
        fitted, geometry = fit_to_input(image, look.manifest.input)
        (name,) = (spec.name for spec in look.graph(engine.kind).outputs)
        try:
            logits = cut_window(engine.infer(fitted[None])[name][0], geometry)
        except ValueError as error:
            raise EngineError(f"{engine.name}: {error}; check it with verify") from error
        size = (self.map_size[1], self.map_size[0])
        planes = [cv2.resize(one, size, interpolation=cv2.INTER_LINEAR) for one in logits]
        scores = np.stack(planes) - np.max(planes, axis=0)
        powers = np.exp(scores)
        found = np.asarray(powers / powers.sum(0), np.float32)
        if np.isnan(found).any():
            raise EngineError(f"{engine.name}: logits hold NaN: check it with verify")
        return found

    def about(self) -> bytes:
        """The ``labels.json`` of a folder of these soft labels: their classes, and what they are
        of. Two runs may share a folder if it is equal."""
        labels, options = self.labels, self.options
        stated = {
            "class_names": labels.names,
            "palette_rgb": labels.palette,
            "ignore_index": labels.ignore_index,
            "teacher": {
                "bundle": self.bundle.model_id,
                "inputs": [look.manifest.input.size for look in self.looks],
                "flip": options.flip,
                "map_size": self.map_size,
                "map": options.renamed,
            },
        }
        return msgspec.json.format(msgspec.json.encode(stated)) + b"\n"

    def close(self) -> None:
        """Free the engines; a second call does nothing."""
        self._stack.close()


class Written(NamedTuple):
    """What ``write_soft_labels`` did; ``problems`` say which images could not be read."""

    written: int
    kept: int  # which were there already
    problems: tuple[str, ...]


def find_images(source: Path, out: Path) -> dict[str, Path]:
    """The images below the folder ``source``, or that image alone, by the names that their soft
    labels will have in ``out``. Raises DataError."""
    if source.is_file():
        return {source.stem: source}
    if not source.is_dir():
        raise DataError(f"{source} is neither a folder of images nor an image")
    images, problems = files_by_key(source, IMAGE_SUFFIXES)
    inside = out.resolve()
    images = {key: path for key, path in images.items() if inside not in path.resolve().parents}
    if problems:
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise DataError(problems[0] + more)
    if not images:
        raise DataError(f"{source} has no image: soft labels are of PNG, JPEG, BMP, TIFF or WebP")
    return images


def write_soft_labels(
    teacher: Teacher,
    images: dict[str, Path],
    out: Path,
    on_image: Callable[[], None] = lambda: None,
) -> Written:
    """Write ``out/NAME.png`` for every image, and ``labels.json``. What is there already is kept:
    the same call continues one that was stopped.

    Raises OutputError where ``out`` has soft labels of another teacher or other options, or cannot
    be written; EngineError.
    """
    check_folder(out)
    about, stated = teacher.about(), out / CLASS_NAMES
    try:
        before = stated.read_bytes() if stated.exists() else about
    except OSError as error:
        raise OutputError(f"cannot read {stated}: {error.strerror}; pass another --out") from error
    if before != about:
        raise OutputError(
            f"{out} holds soft labels of another teacher, or with other options ({stated.name} "
            "says which): pass another --out"
        )
    AtomicFile(stated).write(about)
    written = kept = 0
    problems = []
    for key, path in images.items():
        target = out / f"{key}.png"
        if target.exists():
            kept += 1
        else:
            try:
                values = encode_probabilities(teacher.probabilities(read_image(path)))
            except SourceError as error:
                problems.append(str(error))
            else:
                AtomicFile(target).write(encode_png(values))
                written += 1
        on_image()
    return Written(written, kept, tuple(problems))


def encode_probabilities(found: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Probabilities float32 [C, h, w] -> uint8 [C·h, w], the maps one below the other. A pixel of
    which these classes have less than half is of something else: it gets no soft label.

    >>> encode_probabilities(np.array([[[0.25, 0.1]], [[0.75, 0.3]]], np.float32)).tolist()
    [[64, 0], [191, 0]]
    """
    values = np.rint(255 * found).astype(np.uint8)
    values[:, found.sum(0) < 0.5] = 0
    return values.reshape(-1, values.shape[2])


def _selection(labels: LabelMap, options: TeacherOptions) -> Selection:
    things = frozenset(labels.names[index] for index in labels.things)
    palette: dict[str, Any] = dict(zip(labels.names, labels.palette, strict=True))
    source = Source(labels.names, (), things, palette)
    found = select(source, options.classes, options.renamed)
    if found.labels.num_classes > _MOST_CLASSES:
        raise ConfigError(
            f"there are more than {_MOST_CLASSES} classes: choose some with --classes"
        )
    return found


def _scaled(bundle: Bundle, scale: float) -> Bundle:
    """The bundle at a scale of its input size, rounded to a size that it takes."""
    spec = bundle.manifest.input
    step = spec.multiple if spec.sizes is None else spec.sizes.multiple
    height, width = (max(1, round(side * scale / step)) * step for side in spec.size)
    try:
        return bundle.with_input_size((height, width))
    except ConfigError as error:
        raise ConfigError(f"--scales {scale:g}: {error}") from error


def parse_scales(text: str) -> tuple[float, ...]:
    """ "1,1.25" as numbers. Raises ConfigError."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--scales is {text!r}: write numbers, such as 1,1.25") from error
