"""What is timed: a target makes a class map of a frame and says what its stages took.

``WorkerTarget`` holds one in its own process: it feeds it frames from files, and times it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Protocol

import msgspec
import numpy as np

from knet_deploy.bench.report import TOTAL
from knet_runtime.engines import default_graph, engine_spec
from knet_runtime.errors import EngineError
from knet_runtime.pipeline import Feed, run
from knet_runtime.segmenter import Segmenter
from knet_runtime.sources import open_source
from knet_runtime.types import ClassMap, Rgb


class Facts(msgspec.Struct, frozen=True):
    """What a row is a row of.

    ``graph`` is the SHA-256 of what is run, None where it is no file; ``unverified_reason`` says
    why it is not proven right, None if verify has passed it on this engine and device; ``note`` is
    what else a reader must know.
    """

    precision: str
    graph: str | None
    unverified_reason: str | None
    note: str = ""


class BenchTarget(Protocol):
    """Opened and warm when it has been made; used by one thread."""

    @property
    def facts(self) -> Facts: ...

    def segment(self, frame: Rgb) -> tuple[ClassMap, dict[str, float]]:
        """The class map [H, W] of a uint8 [H, W, 3] RGB frame, at its size, and milliseconds per
        stage; ``TOTAL`` is the whole from frame to class map, "draw" is not in it."""


def stage_times(began: float, **ends: float) -> dict[str, float]:
    """Milliseconds of stages that follow each other, and ``TOTAL``: ``ends`` says when each one
    ended, in seconds, as ``began`` when the first began."""
    times, before = {}, began
    for stage, end in ends.items():
        times[stage] = 1000 * (end - before)
        before = end
    return {**times, TOTAL: 1000 * (before - began)}


class BundleTarget:
    """A bundle on one of our engines, by the runtime's own ``Segmenter`` and pipeline."""

    def __init__(self, bundle: Path, engine: str) -> None:
        self._segmenter = Segmenter(bundle, engine)

    @property
    def facts(self) -> Facts:
        """See ``BenchTarget``."""
        segmenter = self._segmenter
        bundle = segmenter.bundle
        graph = bundle.graph(default_graph(bundle, segmenter.engine))
        record = bundle.manifest.files[graph.path]
        note = "" if graph.kind == "logits" else "class map in the graph"
        # Some engines compute a graph in another precision: the row says what is computed.
        precision = engine_spec(segmenter.engine).computes.get(graph.precision, graph.precision)
        return Facts(precision, record.sha256, segmenter.unverified_reason, note)

    def segment(self, frame: Rgb) -> tuple[ClassMap, dict[str, float]]:
        """See ``BenchTarget``."""
        began = perf_counter()
        found = self._segmenter(frame)
        mapped = perf_counter()
        found.overlay(frame)
        drawn = perf_counter()
        whole = {TOTAL: 1000 * (mapped - began), "draw": 1000 * (drawn - mapped)}
        return found.class_map, {**found.timings, **whole}

    def file_to_file(self, videos: list[Path], folder: Path) -> tuple[int, float]:
        """Segment these files at once, each to an overlay in ``folder``: frames, and seconds."""
        from knet_runtime.sinks import OverlayVideo

        with ExitStack() as stack:
            sources = [stack.enter_context(open_source(video)) for video in videos]
            feeds = [
                Feed(source, [OverlayVideo(folder / f"{number}.mp4", source.info)], f"{number}")
                for number, source in enumerate(sources)
            ]
            began = perf_counter()
            summary = run(feeds, self._segmenter, warm_up=False)
            return summary.frames, perf_counter() - began


class WorkerTarget:
    """Makes a target and its first class map: what that takes is its start-up.

    A folder of frames holds uint8 [H, W, 3] arrays as ``000.npy``, ``001.npy``. Each is read just
    before its turn, as a decoded frame would come, so that frames do not count as memory.
    """

    def __init__(self, make: Callable[[], BenchTarget], frames: Path) -> None:
        self._target = make()
        self._target.segment(np.load(_arrays(frames)[0]))

    def facts(self) -> Facts:
        """See ``BenchTarget``."""
        return self._target.facts

    def maps(self, frames: Path, out: Path) -> None:
        """Write the class maps of ``frames`` into the folder ``out``, by the same names."""
        out.mkdir(parents=True)
        for file in _arrays(frames):
            class_map, _ = self._target.segment(np.load(file))
            np.save(out / file.name, class_map)

    def measure(self, frames: Path) -> dict[str, list[float]]:
        """Milliseconds of each stage for each frame."""
        samples: dict[str, list[float]] = {}
        for file in _arrays(frames):
            _, times = self._target.segment(np.load(file))
            for stage, time in times.items():
                samples.setdefault(stage, []).append(time)
        return samples

    def file_to_file(self, videos: list[Path], folder: Path) -> tuple[int, float]:
        """See ``BundleTarget``. Raises EngineError for another target: it has no pipeline."""
        if not isinstance(self._target, BundleTarget):
            raise EngineError("it has no pipeline")
        return self._target.file_to_file(videos, folder)


def _arrays(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.npy"))


def agreement(reference: Path, other: Path) -> float:
    """The share (0 … 1) of pixels that two folders of class maps give the same class."""
    equal = count = 0
    for file in _arrays(reference):
        one, two = np.load(file), np.load(other / file.name)
        equal += int(np.count_nonzero(one == two))
        count += one.size
    return equal / count
