"""Who takes part: something that makes a class map of a frame and says what its stages took.

A contestant at its place: fed frames from files, one at a time, and timed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_deploy.bench.report import TOTAL
from knet_runtime.bundle.store import open_bundle
from knet_runtime.drawing import blend
from knet_runtime.engines import default_graph, engine_spec
from knet_runtime.errors import EngineError
from knet_runtime.pipeline.pipeline import Feed, run
from knet_runtime.segmenter import Segmenter
from knet_runtime.sources.open import open_source
from knet_runtime.types import ClassMap


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

    def segment(self, frame: NDArray[np.uint8]) -> tuple[ClassMap, dict[str, float]]:
        """The class map [H, W] of a uint8 [H, W, 3] RGB frame, at its size, and milliseconds per
        stage; ``TOTAL`` is the whole from frame to class map, "draw" is not in it."""


def stage_times(begun: float, **ends: float) -> dict[str, float]:
    """Milliseconds of stages that follow each other, and ``TOTAL``: ``ends`` says when each one
    ended, in seconds, as ``begun`` when the first began."""
    times, before = {}, begun
    for stage, end in ends.items():
        times[stage] = 1000 * (end - before)
        before = end
    return {**times, TOTAL: 1000 * (before - begun)}


class BundleTarget:
    """One of our engines with a bundle, through the runtime's own front door."""

    def __init__(self, bundle: Path, engine: str, size: tuple[int, int] | None = None) -> None:
        opened = open_bundle(bundle)
        self._segmenter = Segmenter(
            opened if size is None else opened.with_input_size(size), engine
        )

    @property
    def facts(self) -> Facts:
        segmenter = self._segmenter
        bundle = segmenter.bundle
        graph = bundle.graph(default_graph(bundle, segmenter.engine))
        record = bundle.manifest.files[graph.path]
        note = "" if graph.kind == "logits" else "class map in the graph"
        # Some engines compute a graph in another precision: the row says what is computed.
        precision = engine_spec(segmenter.engine).computes.get(graph.precision, graph.precision)
        return Facts(precision, record.sha256, segmenter.unverified_reason, note)

    def segment(self, frame: NDArray[np.uint8]) -> tuple[ClassMap, dict[str, float]]:
        started = perf_counter()
        mask = self._segmenter(frame)
        mapped = perf_counter()
        blend(frame, mask.class_map, mask.labels, 0.5)
        drawn = perf_counter()
        times = {**mask.timings, TOTAL: 1000 * (mapped - started), "draw": 1000 * (drawn - mapped)}
        return mask.class_map, times

    def file_to_file(self, videos: list[Path], folder: Path) -> tuple[int, float]:
        """Segment these files at once, each to an overlay in ``folder``: frames, and seconds."""
        from knet_runtime.sinks import OverlayVideo

        sources = [open_source(video) for video in videos]
        try:
            feeds = [
                Feed(source, [OverlayVideo(folder / f"{number}.mp4", source.info)], f"{number}")
                for number, source in enumerate(sources)
            ]
            started = perf_counter()
            summary = run(feeds, self._segmenter, warm_up=False)
            return summary.frames, perf_counter() - started
        finally:
            for source in sources:
                source.close()


class WorkerTarget:
    """Makes a contestant and its first mask: what that takes is its start-up.

    A folder of frames holds uint8 [H, W, 3] arrays as ``000.npy``, ``001.npy``. Each is read just
    before its turn, as a decoded frame would come, so that frames do not count as memory.
    """

    def __init__(self, make: Callable[[], BenchTarget], frames: Path) -> None:
        self._contestant = make()
        self._contestant.segment(np.load(_files(frames)[0]))

    def facts(self) -> Facts:
        """See ``BenchTarget``."""
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
        """See ``BundleTarget``; only ours have a pipeline."""
        if not isinstance(self._contestant, BundleTarget):
            raise EngineError("it has no pipeline")
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
