"""The contest itself: every contestant in its process, in turns, and what came out of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_deploy.bench.machine import (
    Limits,
    LimitsProbe,
    Meter,
    gpu_memory_used,
    gpu_meter,
    processor_meter,
)
from knet_deploy.bench.media import Media, write_video
from knet_deploy.bench.process import BenchProcess, Deadlines
from knet_deploy.bench.report import (
    PAUSE,
    TOTAL,
    Failure,
    FileRow,
    Measurement,
    MediaRow,
    Row,
    interleave,
    joules_per_frame,
    stages,
)
from knet_deploy.bench.target import BenchTarget, Facts, WorkerTarget, agreement
from knet_runtime.errors import EngineError

if TYPE_CHECKING:
    from knet_export.graph.cost import Cost

_MEDIA, _FILES = "file", "files "
Frames = Sequence[NDArray[np.uint8]]


class Entry(msgspec.Struct, frozen=True):
    """Who takes part: ``make`` is called in the contestant's own process. ``ours`` have a pipeline;
    ``gpu`` says whose energy and memory are meant; ``cost`` is that of its graph, where known."""

    name: str
    make: Callable[[], BenchTarget]
    ours: bool = False
    gpu: bool = False
    cost: Cost | None = None


class _Opened(msgspec.Struct, frozen=True):
    entry: Entry
    worker: BenchProcess
    facts: Facts
    device_bytes: int | None
    meter: Meter | None


class Benchmark:
    """Frames laid out in ``folder`` (a temporary one), and who runs on them.

    ``tasks`` are frames by name ("360×480"); ``sources`` is how many files run at once, file to
    file, 0 for none; each of its files has ``file_frames`` frames. Whoever fails, or misses one of
    ``deadlines``, is out, and the others go on.
    """

    def __init__(
        self,
        folder: Path,
        tasks: Mapping[str, Frames],
        *,
        threads: int,
        sources: int = 1,
        file_frames: int = 90,
        deadlines: Deadlines | None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        self._folder, self._threads, self._sources = folder, threads, sources
        self._deadlines, self._on_step = deadlines, on_step
        self._file_frames = file_frames
        self.frames, self.videos = {}, {}
        self._counts: dict[str, int] = {}
        for number, (task, frames) in enumerate(tasks.items()):
            self.frames[task] = folder / f"frames{number}"
            self._counts[task] = len(frames)
            self.frames[task].mkdir()
            for index, frame in enumerate(frames):
                np.save(self.frames[task] / f"{index:03}.npy", frame)
            self.videos[task] = folder / f"video{number}.mp4"
            looped = [frames[index % len(frames)] for index in range(file_frames)]
            write_video(self.videos[task], looped)
        self.laps: list[Measurement] = []
        self.failures: list[Failure] = []
        self._startups: dict[str, float] = {}
        self._peaks: dict[str, int | None] = {}
        self._opened: dict[str, _Opened] = {}
        self._agreements: dict[tuple[str, str], float] = {}
        self.reference: str | None = None

    @property
    def ours(self) -> list[str]:
        """The names of our engines that were opened."""
        return [name for name, opened in self._opened.items() if opened.entry.ours]

    @property
    def theirs(self) -> list[str]:
        """The names of the peers that were opened."""
        return [name for name, opened in self._opened.items() if not opened.entry.ours]

    def limits(self) -> Limits:
        """This machine's, at the contest's thread count."""
        with self._worker(LimitsProbe) as worker:
            found: Limits = worker.call("measure")
            return found

    def run(self, entries: Sequence[Entry], rounds: int, pause: float = PAUSE) -> None:
        """Open all, compare their maps with those of the first of ours that is verified (of the
        first of ours, if none is), and run the rounds."""
        with ExitStack() as stack:
            for entry in entries:
                self._open(stack, entry)
                self._on_step()
            self._compare()
            media = stack.enter_context(self._worker(Media))
            turns: dict[str, list[str]] = {
                name: [*self.frames, *self._file_tasks(opened.entry)]
                for name, opened in self._opened.items()
            }
            turns[_MEDIA] = list(self.frames)

            def lap(name: str, task: str, number: int) -> Measurement | None:
                if name == _MEDIA:
                    return self._media_lap(media, task, number)
                return self._lap(self._opened[name], task, number)

            self.laps = interleave(turns, rounds, lap, pause=pause)
            for name, opened in self._opened.items():
                self._peaks[name] = opened.worker.peak_bytes()

    def _worker(self, factory: Callable[[], object]) -> BenchProcess:
        return BenchProcess(factory, self._threads, self._deadlines)

    def _file_tasks(self, entry: Entry) -> list[str]:
        return [_FILES + task for task in self.frames] if entry.ours and self._sources else []

    def _open(self, stack: ExitStack, entry: Entry) -> None:
        before = gpu_memory_used() if entry.gpu else None
        first = next(iter(self.frames.values()))
        with ExitStack() as own:  # ends who fails on the way
            try:
                worker = own.enter_context(self._worker(partial(WorkerTarget, entry.make, first)))
                facts: Facts = worker.call("facts")
                for task, frames in self.frames.items():
                    out = self._maps(entry.name, task)
                    worker.call("maps", frames, out, frames=self._counts[task])
            except EngineError as error:
                self.failures.append(Failure(entry.name, str(error)))
                return
            stack.push(own.pop_all())
        after = gpu_memory_used() if entry.gpu else None
        device = None if before is None or after is None else max(after - before, 0)
        self._startups[entry.name] = worker.seconds
        meter = gpu_meter() if entry.gpu else processor_meter()
        self._opened[entry.name] = _Opened(entry, worker, facts, device, meter)

    def _maps(self, name: str, task: str) -> Path:
        return self._folder / "maps" / name / self.frames[task].name

    def _compare(self) -> None:
        ours = [opened for opened in self._opened.values() if opened.entry.ours]
        if not ours:
            return
        best = next((opened for opened in ours if opened.facts.unverified_reason is None), ours[0])
        self.reference = best.entry.name
        for name in self._opened:
            for task in self.frames:
                found = agreement(self._maps(self.reference, task), self._maps(name, task))
                self._agreements[name, task] = found

    def _lap(self, opened: _Opened, task: str, number: int) -> Measurement | None:
        entry, worker, meter = opened.entry, opened.worker, opened.meter
        before = meter() if meter else None
        try:
            if task.startswith(_FILES):
                videos = [self.videos[task.removeprefix(_FILES)]] * self._sources
                out = self._folder / "out"
                out.mkdir(exist_ok=True)
                count = self._sources * self._file_frames
                frames, seconds = worker.call("file_to_file", videos, out, frames=count)
                samples = {TOTAL: [1000 * seconds / frames] * frames}
            else:
                samples = worker.call("lap", self.frames[task], frames=self._counts[task])
        except EngineError as error:
            worker.kill()
            self.failures.append(Failure(entry.name, str(error)))
            return None
        after = meter() if meter else None
        joules = None if before is None or after is None else after - before
        self._on_step()
        return Measurement(entry.name, task, number, samples, joules)

    def _media_lap(self, media: BenchProcess, task: str, number: int) -> Measurement | None:
        video, out = self.videos[task], self._folder / "media.mp4"
        try:
            samples = media.call("lap", video, out, frames=self._file_frames)
        except EngineError as error:
            self.failures.append(Failure("decode and encode", str(error)))
            return None
        return Measurement(_MEDIA, task, number, samples)

    def _of(self, name: str, task: str) -> list[Measurement]:
        return [lap for lap in self.laps if (lap.contestant, lap.task) == (name, task)]

    def rows(self, limits: Limits) -> list[Row]:
        """A row for every contestant and task that has laps."""
        found = []
        for task in self.frames:
            for name, opened in self._opened.items():
                if laps := self._of(name, task):
                    found.append(self._row(opened, task, laps, limits))
        return found

    def _row(self, opened: _Opened, task: str, laps: list[Measurement], limits: Limits) -> Row:
        entry, facts, name = opened.entry, opened.facts, opened.entry.name
        cost = entry.cost
        times = stages(laps)
        shares: tuple[float | None, float | None] = (None, None)
        if cost is not None and not entry.gpu:
            seconds = times["infer"].median / 1000
            shares = (
                round(cost.multiply_adds / seconds / limits.matmul, 4),
                round(cost.bytes / seconds / limits.copy, 4),
            )
        return Row(
            contestant=name,
            task=task,
            ours=entry.ours,
            precision=facts.precision,
            graph=facts.graph,
            verified=entry.ours and facts.unverified_reason is None,
            unverified_reason=facts.unverified_reason,
            note=facts.note,
            frames_per_second=round(1000 / times[TOTAL].median, 2),
            stages=times,
            agreement=self._agreements.get((name, task)),
            startup_seconds=round(self._startups[name], 3),
            peak_bytes=self._peaks[name],
            device_bytes=opened.device_bytes,
            joules_per_frame=joules_per_frame(laps),
            multiply_adds=cost.multiply_adds if cost else None,
            least_bytes=cost.bytes if cost else None,
            matmul_share=shares[0],
            copy_share=shares[1],
        )

    def files(self) -> list[FileRow]:
        """File to file, for each of ours and each task."""
        found = []
        for task in self.frames:
            for name in self._opened:
                rates = [
                    round(1000 / lap.samples[TOTAL][0], 2) for lap in self._of(name, _FILES + task)
                ]
                if rates:
                    median = round(statistics.median(rates), 2)
                    found.append(FileRow(name, task, self._sources, median, rates))
        return found

    def media(self) -> list[MediaRow]:
        """Decoding and encoding, for each task."""
        laps = {task: self._of(_MEDIA, task) for task in self.frames}
        return [MediaRow(task, stages(found)) for task, found in laps.items() if found]
