"""The dataset doctor for labelled objects: what ``check`` is for class maps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from knet_runtime.errors import DataError, SourceError
from knet_runtime.preprocess import keep_ratio_size
from knet_runtime.types import Task
from knet_train.config import Config, DataConfig
from knet_train.data.census import MUCH, names
from knet_train.data.check import (
    WORKERS,
    ClassCount,
    DataReport,
    ImageSize,
    ObjectCount,
    leaks,
    some,
)
from knet_train.data.segment_folder import SegmentFolder, SegmentSample
from knet_train.data.segments import list_segments, segment_splits
from knet_train.data.truth import Truth
from knet_train.segment_loss import STRIDE


def survey_segments(root: Path, split: str | None, task: Task) -> list[SegmentFolder]:
    """One split of a folder as ``task`` sees it, or all that there are. Raises DataError when
    nothing can be listed."""
    found = [split] if split else segment_splits(root, task)
    folders = [list_segments(root, name, task) for name in found]
    if not any(folder.samples or folder.problems for folder in folders):
        raise DataError(f"{root} has no image in {', '.join(found) or 'any split'}: add some")
    return folders


def check_segments(
    folders: Sequence[SegmentFolder], config: Config, on_image: Callable[[], None] = lambda: None
) -> tuple[DataReport, SegmentFolder]:
    """Read every image, several at a time; the report, and the images without a fault. Objects are
    judged by the size that ``config`` trains at, and by its kernels.

    Nothing is kept of an image but its counts.
    """
    first = folders[0]
    labels, things = first.labels, set(first.labels.things)
    problems = [line for folder in folders for line in folder.problems]
    warnings = [line for folder in folders if (line := folder.summary())]
    members: dict[tuple[Path, Path], list[SegmentFolder]] = {}
    samples: dict[tuple[Path, Path], SegmentSample] = {}
    for folder in folders:
        if folder.labels != labels:
            problems.append(f"{folder.file} has other categories than {first.file.name}")
            continue
        for sample in folder.samples:
            members.setdefault((sample.image, sample.stated), []).append(folder)
            samples[sample.image, sample.stated] = sample
    every = replace(first, samples=tuple(samples.values()))
    whole = _Counts(labels.num_classes)
    splits = {folder.split: _Counts(labels.num_classes) for folder in folders}
    sizes: Counter[tuple[int, int]] = Counter()
    good: list[SegmentSample] = []
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            readings = pool.map(lambda index: _read(every, index, config.data), range(len(every)))
            for key, found in zip(samples, readings, strict=True):
                on_image()
                if isinstance(found, str):
                    problems.append(found)
                    continue
                good.append(samples[key])
                sizes[found.size] += 1
                for counts in (whole, *(splits[folder.split] for folder in members[key])):
                    counts.add(found, samples[key].name)
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C nothing more is read
    listed = {
        folder.split: [
            one.image.as_posix().removeprefix(f"{first.root}/") for one in folder.samples
        ]
        for folder in folders
    }
    report = DataReport(
        root=str(first.root),
        layout=first.layout,
        splits={folder.split: len(folder) for folder in folders},
        images=len(samples),
        sizes=tuple(ImageSize(*size, times) for size, times in sizes.most_common()),
        classes=tuple(
            ClassCount(
                name,
                int(whole.pixels[index]),
                int(whole.images[index]),
                int(whole.objects[index]) if index in things else None,
            )
            for index, name in enumerate(labels.names)
        ),
        labelled_pixels=int(whole.pixels.sum()),
        ignored_pixels=whole.void,
        outside=(),
        problems=tuple(dict.fromkeys(problems)),
        warnings=(
            *dict.fromkeys(warnings),
            *leaks(listed),
            *(_doubts(first, whole, splits, config) if good else ()),
        ),
        objects=ObjectCount(
            objects=int(whole.objects.sum()),
            crowds=int(whole.crowds.sum()),
            most=max(whole.many.values(), default=0),
            vanishing=int(whole.vanishing.sum()),
            judged_by=config.preset,
        ),
    )
    return report, replace(every, samples=tuple(good))


def _doubts(
    first: SegmentFolder, whole: _Counts, splits: dict[str, _Counts], config: Config
) -> list[str]:
    """What to look at, a line each."""
    labels, kernels = first.labels, config.model.kernels
    seen = whole.images > 0
    lines = []
    if absent := [name for name, there in zip(labels.names, seen, strict=True) if not there]:
        lines.append(f"no image has {names(absent)}")
    crowds = [labels.names[i] for i in labels.things if seen[i] and not whole.objects[i]]
    if crowds:
        lines.append(f"there is no single object of {names(crowds)}, only crowds")
    for split, counts in splits.items():
        missing = seen & (counts.images == 0)
        if counts.total and missing.any():
            lacks = [labels.names[index] for index in np.flatnonzero(missing)]
            lines.append(f"split {split} has no {names(lacks)}")
        if counts.void >= MUCH * max(1, counts.total):
            share = 100 * counts.void / counts.total
            lines.append(f"split {split}: {share:.1f} % of the pixels are void, which is ignored")
    lines += some(whole.empty, "images have nothing of any class")
    if small := int(whole.vanishing.sum()):
        share = 100 * small / int(whole.objects.sum())
        worst = [labels.names[i] for i in np.argsort(-whole.vanishing) if whole.vanishing[i]]
        lines.append(
            f"{small} objects ({share:.1f} %) have no pixel at a quarter of the size that "
            f"{config.preset} trains at, so it learns nothing of them: {names(worst)}; raise "
            "data.eval_size and data.crop, or data.eval_scale"
        )
    if over := [name for name, count in whole.many.items() if count > kernels]:
        most = max(whole.many.values())
        (shown,) = some(over, "images")
        lines.append(
            f"{shown} have more objects, up to {most}, than {config.preset} has kernels, "
            f"{kernels}: raise model.kernels, or the rest is never found"
        )
    return lines


@dataclass(frozen=True)
class _Found:
    """What one image holds; where objects overlap, each has all of its pixels. Arrays are by
    class; ``vanishing`` are objects of which training would see no pixel."""

    size: tuple[int, int]
    void: int
    pixels: NDArray[np.int64]
    objects: NDArray[np.int64]
    crowds: NDArray[np.int64]
    vanishing: NDArray[np.int64]


@dataclass
class _Counts:
    """The sum over images; ``many`` is how many objects each has."""

    classes: int
    total: int = 0
    void: int = 0
    many: dict[str, int] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pixels, self.objects, self.crowds, self.vanishing, self.images = np.zeros(
            (5, self.classes), np.int64
        )

    def add(self, found: _Found, name: str) -> None:
        self.total += found.size[0] * found.size[1]
        self.void += found.void
        self.pixels += found.pixels
        self.images += found.pixels > 0
        self.objects += found.objects
        self.crowds += found.crowds
        self.vanishing += found.vanishing
        self.many[name] = int(found.objects.sum())
        if not found.pixels.any():
            self.empty.append(name)


def _read(folder: SegmentFolder, index: int, data: DataConfig) -> _Found | str:
    try:
        truth = folder.read(index)[1]
    except (DataError, SourceError) as error:
        return str(error)
    size = truth.void.shape[0], truth.void.shape[1]
    count, things = folder.labels.num_classes, folder.labels.things
    classes = np.array(truth.classes, np.int64)
    areas = np.bincount(truth.ids.ravel(), minlength=len(classes) + 1)[1:]
    pixels = np.zeros(count, np.int64)
    np.add.at(pixels, classes, areas)
    crowd = np.isin(np.arange(1, len(classes) + 1), list(truth.crowds))
    single = np.isin(classes, things) & ~crowd
    left = np.zeros(len(classes) + 1, np.bool_)
    left[_learnt(truth, data)] = True
    return _Found(
        size,
        int(np.count_nonzero(truth.void)),
        pixels,
        *(
            np.bincount(classes[which], minlength=count)
            for which in (single, crowd, single & ~left[1:])
        ),
    )


def _learnt(truth: Truth, data: DataConfig) -> NDArray[np.uint16]:
    """The pixels of segments that training at scale 1 compares masks at: the four in the middle of
    each cell at a quarter of the size (see ``knet_train.data.targets``)."""
    size = truth.void.shape[0], truth.void.shape[1]
    if data.eval_mode == "keep_ratio":
        seen = keep_ratio_size(size, data.eval_scale)
    else:
        factor = min(whole / side for whole, side in zip(data.eval_size, size, strict=True))
        seen = max(1, round(size[0] * factor)), max(1, round(size[1] * factor))
    rows, columns = (
        (2 * np.flatnonzero(np.isin(np.arange(new) % STRIDE, (1, 2))) + 1) * old // (2 * new)
        for new, old in zip(seen, size, strict=True)
    )
    return truth.ids[:, rows][:, :, columns]
