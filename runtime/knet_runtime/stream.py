"""The run: frames from a source, through a segmenter, into sinks, with every stage timed."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from knet_runtime.errors import KnetError, OutputError
from knet_runtime.frames import Frame, Source
from knet_runtime.pending import Keep, output_error
from knet_runtime.sinks import Sink

if TYPE_CHECKING:
    from knet_runtime.segmenter import Mask

_log = logging.getLogger(__name__)

Segment = Callable[[NDArray[np.uint8]], "Mask"]
"""What a ``Segmenter`` is to this module: uint8 [H, W, 3] RGB to a mask of that size."""

_REMEMBERED = 10_000


@dataclass(frozen=True)
class StageTiming:
    """Milliseconds per frame that one stage took."""

    median: float
    p95: float


@dataclass(frozen=True)
class RunSummary:
    """What a run did: frames written, wall-clock seconds, and times by stage, in order.

    The stages are "read", those of ``Mask.timings``, and "write"; their numbers come from the last
    10,000 frames, so that a camera can run for months.
    """

    frames: int
    seconds: float
    stages: dict[str, StageTiming]

    @property
    def fps(self) -> float:
        """Frames per second over the whole run; 0 without frames."""
        return self.frames / self.seconds if self.frames else 0.0


def segment(source: Source, segmenter: Segment) -> Iterator[tuple[Frame, Mask]]:
    """Each frame of the source with its mask, in order, one at a time."""
    for frame in source:
        yield frame, segmenter(frame.image)


def run(
    source: Source,
    segmenter: Segment,
    sinks: Sequence[Sink],
    *,
    on_frame: Callable[[Frame, Mask], None] | None = None,
    max_frames: int | None = None,
) -> RunSummary:
    """Segment the source and hand every frame to every sink; all sinks are closed at the end.

    They are closed as "complete" at the source's end, after ``max_frames``, and on Ctrl-C
    (KeyboardInterrupt, raised again), and as "partial" after any other exception, raised again.
    A sink that fails keeps no other from being closed. ``on_frame`` is called after the sinks have
    a frame. The source stays open: whoever opened it closes it.

    Raises SourceError and BackendError as they come, and OutputError when a sink fails or would
    write over the source or another sink.
    """
    with _closing(sinks):
        _check_paths(source, sinks)
        clock = _StageClock()
        count = 0
        began = perf_counter()
        frames = iter(source)
        while max_frames is None or count < max_frames:
            asked = perf_counter()
            frame = next(frames, None)
            if frame is None:
                break
            clock.add("read", 1000 * (perf_counter() - asked))
            mask = segmenter(frame.image)
            for stage, value in mask.timings.items():
                clock.add(stage, value)
            started = perf_counter()
            _write(frame, mask, sinks)
            clock.add("write", 1000 * (perf_counter() - started))
            count += 1
            if on_frame is not None:
                on_frame(frame, mask)
        return RunSummary(count, perf_counter() - began, clock.summary())


def _write(frame: Frame, mask: Mask, sinks: Sequence[Sink]) -> None:
    for sink in sinks:
        try:
            sink.write(frame, mask)
        except OSError as error:
            raise output_error(sink.path, error) from error


@contextmanager
def _closing(sinks: Sequence[Sink]) -> Iterator[None]:
    """Close each sink once, whatever happened inside; what happened first is what is raised."""
    keep: Keep = "partial"
    done = False
    try:
        yield
        keep, done = "complete", True
    except KeyboardInterrupt:
        keep = "complete"
        raise
    finally:
        failures = []
        for sink in sinks:
            try:
                sink.close(keep)
            except BaseException as error:  # a second Ctrl-C too must not leave sinks open
                failures.append(_as_raised(sink, error))
        for failure in failures[1 if done else 0 :]:
            _log.error("while closing: %s", failure)
        if done and failures:
            raise failures[0]


def _as_raised(sink: Sink, error: BaseException) -> BaseException:
    if isinstance(error, KnetError) or not isinstance(error, Exception):
        return error
    return output_error(sink.path, error)


def _check_paths(source: Source, sinks: Sequence[Sink]) -> None:
    """Refuse to write over what is read, or into one place twice."""
    taken = set()
    if source.info.path is not None:
        read = source.info.path.resolve()
        # Masks have the images' own names: in their folder they would replace them.
        taken = {read, read.parent} if source.info.kind == "image" else {read}
    for sink in sinks:
        place = sink.path.resolve()
        if place in taken:
            raise OutputError(
                f"{sink.path}: is read from, or written to by another output; choose another place"
            )
        taken.add(place)


class _StageClock:
    def __init__(self) -> None:
        self._values: dict[str, deque[float]] = {}

    def add(self, stage: str, milliseconds: float) -> None:
        self._values.setdefault(stage, deque(maxlen=_REMEMBERED)).append(milliseconds)

    def summary(self) -> dict[str, StageTiming]:
        return {
            stage: StageTiming(*(float(p) for p in np.percentile(list(values), (50, 95))))
            for stage, values in self._values.items()
        }
