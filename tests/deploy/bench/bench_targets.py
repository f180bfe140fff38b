"""What processes of the benchmark hold in these tests: they import it by this name."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import cv2
import numpy as np
from numpy.typing import NDArray

from knet_deploy.bench.report import TOTAL
from knet_deploy.bench.target import Facts
from knet_runtime.engines.hardware import cpu_budget
from knet_runtime.errors import EngineError


class Thing:
    """Does what can happen to a process; with ``fails`` it is not even made."""

    def __init__(self, fails: str = "") -> None:
        if fails:
            raise ValueError(f"{fails}\nand more")

    def threads(self) -> tuple[int, str, int]:
        return cpu_budget(), os.environ["OPENBLAS_NUM_THREADS"], cv2.getNumThreads()

    def fail(self) -> None:
        raise EngineError("no such frame")

    def die(self) -> None:
        os._exit(7)

    def hang(self) -> None:
        time.sleep(3600)

    def shout(self) -> int:
        print("not an answer", flush=True)  # noqa: T201
        os.write(1, b"nor this")
        return len(sys.stdin.read())

    def lock(self) -> None:
        self._lock = multiprocessing.get_context("spawn").RLock()

    def compiler(self) -> int:
        return subprocess.Popen(["sleep", "3600"]).pid


def compiled_by_eager(make: Callable[[], object]) -> object:
    """What ``make`` makes, with the backend of ``torch.compile`` that runs what was traced as it
    is."""
    import torch

    torch.compile = partial(torch.compile, backend="eager")
    return make()


def never() -> object:
    """Is not made before the deadline."""
    time.sleep(3600)
    return None


class Tiring:
    """A target that stops answering after so many frames."""

    facts = Facts("fp32", None, "a baseline")

    def __init__(self, frames: int) -> None:
        self._left = frames

    def segment(self, frame: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], dict[str, float]]:
        if not self._left:
            time.sleep(3600)
        self._left -= 1
        return np.zeros(frame.shape[:2], np.uint8), {"infer": 1.0, TOTAL: 1.0}
