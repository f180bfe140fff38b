"""A contestant at its place: fed frames from files, one at a time, and timed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from knet_runtime.bench.contestant import Contestant, Engine, Facts
from knet_runtime.errors import BackendError


class Stand:
    """Makes a contestant and its first mask: what that takes is its start-up.

    A folder of frames holds uint8 [H, W, 3] arrays as ``000.npy``, ``001.npy``. Each is read just
    before its turn, as a decoded frame would come, so that frames do not count as memory.
    """

    def __init__(self, make: Callable[[], Contestant], frames: Path) -> None:
        self._contestant = make()
        self._contestant.segment(np.load(_files(frames)[0]))

    def facts(self) -> Facts:
        """See ``Contestant``."""
        return self._contestant.facts

    def maps(self, frames: Path, out: Path) -> None:
        """Write the class maps of ``frames`` into the folder ``out``, by the same names."""
        out.mkdir(parents=True)
        for file in _files(frames):
            classes, _ = self._contestant.segment(np.load(file))
            np.save(out / file.name, classes)

    def lap(self, frames: Path) -> dict[str, list[float]]:
        """Milliseconds of each stage for each frame."""
        samples: dict[str, list[float]] = {}
        for file in _files(frames):
            _, times = self._contestant.segment(np.load(file))
            for stage, time in times.items():
                samples.setdefault(stage, []).append(time)
        return samples

    def file_to_file(self, videos: list[Path], folder: Path) -> tuple[int, float]:
        """See ``Engine``; only ours have a pipeline."""
        if not isinstance(self._contestant, Engine):
            raise BackendError("it has no pipeline")
        return self._contestant.file_to_file(videos, folder)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.npy"))


def agreement(ours: Path, theirs: Path) -> float:
    """The share (0 … 1) of pixels that two folders of class maps give the same class."""
    equal = count = 0
    for file in _files(ours):
        one, other = np.load(file), np.load(theirs / file.name)
        equal += int(np.count_nonzero(one == other))
        count += one.size
    return equal / count
