"""One split of a folder of labelled objects, whatever the layout that it was found in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_runtime.errors import DataError
from knet_runtime.labels import LabelMap
from knet_runtime.sources.images import read_image
from knet_runtime.types import Task
from knet_train.data.census import names
from knet_train.data.truth import Truth


class SegmentSample(Protocol):
    """One image and its labels, not yet read. ``name`` is the only one of its kind in the split,
    ``stated`` the file that says how large the truth is."""

    @property
    def name(self) -> str: ...

    @property
    def image(self) -> Path: ...

    @property
    def stated(self) -> Path: ...

    def truth(self) -> Truth:
        """Read the labels; raises DataError."""
        ...


@dataclass(frozen=True)
class SegmentFolder:
    """One split; images are read on demand.

    ``layout`` is its name, ``file`` what the classes and objects are stated in, ``unmapped`` the
    names of the categories that no class has, ``stuff`` those that an instances file says are no
    things: they are background. ``problems`` say what is wrong with images that are not among the
    samples, a line each.
    """

    root: Path
    layout: str
    file: Path
    split: str
    labels: LabelMap
    task: Task
    samples: tuple[SegmentSample, ...]
    problems: tuple[str, ...]
    unmapped: tuple[str, ...] = ()
    stuff: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[NDArray[np.uint8], Truth]:
        """Image uint8 [H, W, 3] RGB and its truth.

        Raises DataError when sizes differ or a label is not readable, and SourceError when the
        image is not.
        """
        sample = self.samples[index]
        image, truth = read_image(sample.image), self.read_truth(index)
        (height, width), (own_height, own_width) = image.shape[:2], truth.void.shape
        if (height, width) != (own_height, own_width):
            raise DataError(
                f"{sample.image} is {width}×{height} but {sample.stated} has "
                f"{own_width}×{own_height}: labels are never resized, mend one of the two"
            )
        return image, truth

    def read_truth(self, index: int) -> Truth:
        """The truth of an image; raises DataError."""
        return self.samples[index].truth()

    def summary(self) -> str | None:
        """What is left out, in words; None where nothing is."""
        said = []
        if self.unmapped:
            shown = names(list(self.unmapped))
            said.append(f"ignored, as no class of labels.json has them: {shown}")
        if self.stuff:
            said.append(f"background, as isthing is 0: {names(list(self.stuff))}")
        return f"{self.file.name}: {'; '.join(said)}" if said else None


def task_labels(labels: LabelMap, task: Task, file: Path) -> LabelMap:
    """The classes that a task tells apart: in task "instance" only things. Raises DataError, which
    names the ``file`` that states them, where there is none."""
    if task != "instance":
        return labels
    if not labels.things:
        raise DataError(
            f"{file} has no thing: task instance finds objects, so name the classes whose objects "
            "are told apart"
        )
    things = tuple(labels.names[index] for index in labels.things)
    palette = tuple(labels.palette[index] for index in labels.things)
    return msgspec.structs.replace(
        labels, names=things, palette=palette, things=tuple(range(len(things)))
    )
