"""The dataset doctor for labelled objects: what ``check`` is for class maps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from knet_runtime.errors import DataError, SourceError
from knet_runtime.types import Task
from knet_train.data.census import names
from knet_train.data.check import WORKERS, ClassCount, DataReport, ImageSize
from knet_train.data.coco import SegmentFolder, list_segments
from knet_train.data.layouts import coco_files
from knet_train.data.truth import Truth


def survey_segments(root: Path, split: str | None, task: Task | None) -> list[SegmentFolder]:
    """The splits of a folder in COCO's formats as ``task`` sees them: by default "panoptic" where
    there is panoptic truth. Raises DataError when nothing can be listed."""
    files = coco_files(root)
    task = task or ("panoptic" if "panoptic" in files else "instance")
    kind = next(iter(files) if task == "panoptic" else reversed(files))
    return [list_segments(root, name, task) for name in ([split] if split else files[kind])]


def check_segments(
    folders: Sequence[SegmentFolder], on_image: Callable[[], None] = lambda: None
) -> DataReport:
    """Read every image, several at a time; nothing is kept of one but its counts."""
    first = folders[0]
    labels = first.labels
    problems = [line for folder in folders for line in folder.problems]
    warnings = list(dict.fromkeys(filter(None, (folder.summary() for folder in folders))))
    pixels, images, objects = np.zeros((3, labels.num_classes), np.int64)
    sizes: Counter[tuple[int, int]] = Counter()
    ignored = empty = 0
    for folder in folders:
        if folder.labels != labels:
            problems.append(f"{folder.file} has other categories than {first.file.name}")
            continue
        with ThreadPoolExecutor(WORKERS) as pool:
            try:
                for found in pool.map(lambda i, f=folder: _read(f, i), range(len(folder))):
                    on_image()
                    if isinstance(found, str):
                        problems.append(found)
                        continue
                    sizes[found.size] += 1
                    ignored += found.void
                    empty += not found.objects.any() and not found.pixels.any()
                    pixels += found.pixels
                    images += found.pixels > 0
                    objects += found.objects
            finally:
                pool.shutdown(cancel_futures=True)  # after Ctrl-C nothing more is read
    absent = [name for name, count in zip(labels.names, images, strict=True) if not count]
    if absent:
        warnings.append(f"no image has {names(absent)}")
    if empty:
        warnings.append(f"{empty} images have nothing of any class")
    things = set(labels.things)
    return DataReport(
        root=str(first.root),
        layout=f"COCO {'panoptic' if first.file.name.startswith('panoptic') else 'instances'}",
        splits={folder.split: len(folder) for folder in folders},
        images=sum(map(len, folders)),
        sizes=tuple(ImageSize(*size, times) for size, times in sizes.most_common()),
        classes=tuple(
            ClassCount(
                name,
                int(pixels[index]),
                int(images[index]),
                int(objects[index]) if index in things else None,
            )
            for index, name in enumerate(labels.names)
        ),
        labelled_pixels=int(pixels.sum()),
        ignored_pixels=ignored,
        outside=(),
        problems=tuple(problems),
        warnings=tuple(warnings),
    )


class _Counts:
    """What one image holds; where objects overlap, each has all of its pixels."""

    def __init__(self, truth: Truth, classes: int) -> None:
        self.size = truth.void.shape
        self.void = int(np.count_nonzero(truth.void))
        areas = np.bincount(truth.ids.ravel(), minlength=len(truth.classes) + 1)[1:]
        self.pixels: NDArray[np.int64] = np.zeros(classes, np.int64)
        np.add.at(self.pixels, list(truth.classes), areas)
        single = [c for id_, c in enumerate(truth.classes, 1) if id_ not in truth.crowds]
        self.objects = np.bincount(single, minlength=classes)


def _read(folder: SegmentFolder, index: int) -> _Counts | str:
    try:
        return _Counts(folder.read(index)[1], folder.labels.num_classes)
    except (DataError, SourceError) as error:
        return str(error)
