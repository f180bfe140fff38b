"""Which images are of one drive, or sequence: frames of one recording are alike, so that a score on
some of them says little where others were learnt."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from knet_runtime.errors import DataError
from knet_train.data.census import names
from knet_train.data.dataset import LabelledFolder
from knet_train.data.segment_folder import SegmentFolder

Folder = TypeVar("Folder", bound=LabelledFolder | SegmentFolder)

# What exports add to the name of one image: Roboflow's copies, the number of a frame.
_COPY = re.compile(r"_(jpe?g|png)\.rf\.[0-9a-z]+$", re.I)
_NUMBER = re.compile(r"([\s_.-]+(f|frame))?[\s_.(-]*\d+\)?$", re.I)


def sequence(name: str) -> str:
    """What the names of the frames of one sequence share: the name without its number.

    >>> sequence("0006R0_f00930"), sequence("clip-a (12)"), sequence("front_0001_png.rf.5b7d")
    ('0006R0', 'clip-a', 'front')
    """
    return _NUMBER.sub("", _COPY.sub("", name))


def drive(image: Path) -> str:
    """The drive that an image is of: its ``sequence``, or its folder where names are numbers.

    >>> drive(Path("images/train/0006R0_f00930.png")), drive(Path("north/000017.jpg"))
    ('0006R0', 'north')
    """
    return sequence(image.stem) or image.parent.name


def divide(folder: Folder, drives: Collection[str]) -> tuple[Folder, Folder]:
    """The folder without the images of these drives, and these images alone. Raises DataError for
    a drive that has no image, or where no other has any."""
    of = [drive(sample.image) for sample in folder.samples]
    counts = Counter(of)
    for name in drives:
        if name not in counts:
            raise DataError(
                f"data.leave_out names {name!r}, of which split {folder.split!r} of {folder.root} "
                f"has no image; its drives are {_counted(counts)}"
            )
    if set(drives) == set(counts):
        raise DataError(
            f"data.leave_out names every drive of split {folder.split!r} of {folder.root}, and "
            "nothing is left to learn from: name fewer"
        )
    kept: Sequence[bool] = [name not in drives for name in of]
    return _only(folder, kept), _only(folder, [not one for one in kept])


def _only(folder: Folder, which: Sequence[bool]) -> Folder:
    samples: Any = tuple(itertools.compress(folder.samples, which))
    return replace(folder, samples=samples)


def _counted(counts: Counter[str]) -> str:
    return names([f"{name} ({counts[name]} images)" for name in sorted(counts)])
