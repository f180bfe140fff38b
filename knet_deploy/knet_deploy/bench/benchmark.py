"""The benchmark itself: its frames, every target in a process of its own, in turns, and the rows.

The frames are of a synthetic street or somebody's own. Decoding and encoding video files of them
is timed alone, as it is the same for every engine.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from knet_deploy.bench.machine import (
    Limits,
    LimitsProbe,
    Meter,
    gpu_memory_used,
    gpu_meter,
    processor_meter,
)
from knet_deploy.bench.process import BenchProcess, Deadlines
from knet_deploy.bench.report import (
    PAUSE,
    TOTAL,
    Failure,
    FileRow,
    Measurement,
    MediaRow,
    Ratio,
    Row,
    all_ratios,
    interleave,
    joules_per_frame,
    stages,
)
from knet_deploy.bench.target import BenchTarget, Facts, WorkerTarget, agreement
from knet_runtime.errors import EngineError, SourceError
from knet_runtime.preprocess import resize
from knet_runtime.sinks.encoder import ENCODERS, VideoWriter, working_encoder
from knet_runtime.sources import open_source
from knet_runtime.sources.container import redacted, scheme_of
from knet_runtime.types import Rgb, Size
from knet_synthetic import Street

if TYPE_CHECKING:
    from knet_export.graph.cost import Cost

_MEDIA, _FILES = "decode and encode", "files "
_RATE = 30
_SEED = 2_000_000_000  # a street that training has not seen
_DRAWN = 360  # rows: a larger frame is drawn at about this size and enlarged, which is faster


class Entry(msgspec.Struct, frozen=True):
    """A target to be timed: ``make`` is called in its own process. ``ours`` have a pipeline;
    ``gpu`` says whose energy and memory are meant; ``cost`` is that of its graph, where known."""

    name: str
    make: Callable[[], BenchTarget]
    ours: bool = False
    gpu: bool = False
    cost: Cost | None = None


class _Frames(msgspec.Struct, frozen=True):
    """Frames of one size: ``count`` arrays in a folder, and a video that repeats them."""

    folder: Path
    count: int
    video: Path


@dataclass
class _Opened:
    """A target that runs; ``agreements`` with the reference are by size."""

    entry: Entry
    process: BenchProcess
    facts: Facts
    device_bytes: int | None
    meter: Meter | None
    peak_bytes: int | None = None
    agreements: dict[str, float] = field(default_factory=dict)


class Benchmark:
    """Frames laid out in ``folder`` (a temporary one), for targets to run on.

    ``frames`` are uint8 [H, W, 3] RGB by the name of their size ("360×480"); ``sources`` is how
    many files run at once, file to file, 0 for none; each of them has ``file_frames`` frames. A
    target that fails, or misses one of ``deadlines``, is out, and the others continue.
    """

    def __init__(
        self,
        folder: Path,
        frames: Mapping[str, Sequence[Rgb]],
        *,
        threads: int,
        sources: int = 1,
        file_frames: int = 90,
        deadlines: Deadlines | None = None,
    ) -> None:
        self._folder, self._threads, self._sources = folder, threads, sources
        self._file_frames, self._deadlines = file_frames, deadlines
        self.frames: dict[str, _Frames] = {}
        for number, (size, images) in enumerate(frames.items()):
            laid = _Frames(folder / f"frames{number}", len(images), folder / f"video{number}.mp4")
            laid.folder.mkdir()
            for index, image in enumerate(images):
                np.save(laid.folder / f"{index:03}.npy", image)
            write_video(laid.video, [images[index % len(images)] for index in range(file_frames)])
            self.frames[size] = laid
        self.measurements: list[Measurement] = []
        self.failures: list[Failure] = []
        self.reference: str | None = None
        self._opened: dict[str, _Opened] = {}

    def limits(self) -> Limits:
        """This machine's, at the benchmark's thread count."""
        with self._process(LimitsProbe) as process:
            found: Limits = process.call("measure")
            return found

    def run(
        self,
        entries: Sequence[Entry],
        rounds: int,
        pause: float = PAUSE,
        on_step: Callable[[int, str], None] = lambda *_: None,
        on_round: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Open all, compare their maps with those of the first of ours that is verified (of the
        first of ours, if none is), and run the rounds; ``pause`` is in seconds.

        ``on_step`` is told whose turn begins in which round, from 1; to open a target is round 0.
        ``on_round`` is told how many rounds are done. What was measured until an exception ends it
        is kept.
        """
        with ExitStack() as stack:
            for entry in entries:
                on_step(0, entry.name)
                self._open(stack, entry)
            self._compare()
            media = stack.enter_context(self._process(Media))
            cases = {name: self._cases(opened.entry) for name, opened in self._opened.items()}

            def measure(name: str, case: str, number: int) -> Measurement | None:
                if name == _MEDIA:
                    found = self._measure_media(media, case, number)
                else:
                    on_step(number + 1, name)
                    found = self._measure(self._opened[name], case, number)
                if found is not None:
                    self.measurements.append(found)
                return found

            cases[_MEDIA] = list(self.frames)
            on_round(0)
            interleave(cases, rounds, measure, pause=pause, on_round=on_round)

    def steps(self, entries: Sequence[Entry], rounds: int) -> int:
        """How often ``run`` calls ``on_step`` if nobody fails."""
        return sum(1 + rounds * len(self._cases(entry)) for entry in entries)

    def _process(self, factory: Callable[[], object]) -> BenchProcess:
        return BenchProcess(factory, self._threads, self._deadlines)

    def _cases(self, entry: Entry) -> list[str]:
        files = [_FILES + size for size in self.frames] if entry.ours and self._sources else []
        return [*self.frames, *files]

    def _open(self, stack: ExitStack, entry: Entry) -> None:
        before = gpu_memory_used() if entry.gpu else None
        first = next(iter(self.frames.values())).folder
        with ExitStack() as own:  # ends who fails on the way
            try:
                process = own.enter_context(self._process(partial(WorkerTarget, entry.make, first)))
                facts: Facts = process.call("facts")
                for size, laid in self.frames.items():
                    out = self._maps(entry.name, size)
                    process.call("maps", laid.folder, out, frames=laid.count)
            except EngineError as error:
                self.failures.append(Failure(entry.name, str(error)))
                return
            stack.push(own.pop_all())
        after = gpu_memory_used() if entry.gpu else None
        device = None if before is None or after is None else max(after - before, 0)
        meter = gpu_meter() if entry.gpu else processor_meter()
        self._opened[entry.name] = _Opened(entry, process, facts, device, meter)

    def _maps(self, name: str, size: str) -> Path:
        return self._folder / "maps" / name / self.frames[size].folder.name

    def _compare(self) -> None:
        ours = [opened for opened in self._opened.values() if opened.entry.ours]
        if not ours:
            return
        best = next((opened for opened in ours if opened.facts.unverified_reason is None), ours[0])
        self.reference = best.entry.name
        for name, opened in self._opened.items():
            for size in self.frames:
                found = agreement(self._maps(self.reference, size), self._maps(name, size))
                opened.agreements[size] = found

    def _measure(self, opened: _Opened, case: str, number: int) -> Measurement | None:
        process, meter = opened.process, opened.meter
        before = meter() if meter else None
        try:
            if case.startswith(_FILES):
                videos = [self.frames[case.removeprefix(_FILES)].video] * self._sources
                out = self._folder / "out"
                out.mkdir(exist_ok=True)
                count = self._sources * self._file_frames
                frames, seconds = process.call("file_to_file", videos, out, frames=count)
                samples = {TOTAL: [1000 * seconds / frames] * frames}
            else:
                laid = self.frames[case]
                samples = process.call("measure", laid.folder, frames=laid.count)
        except EngineError as error:
            process.kill()
            self.failures.append(Failure(opened.entry.name, str(error)))
            return None
        after = meter() if meter else None
        opened.peak_bytes = process.peak_bytes()
        joules = None if before is None or after is None else after - before
        return Measurement(opened.entry.name, case, number, samples, joules)

    def _measure_media(self, media: BenchProcess, size: str, number: int) -> Measurement | None:
        video, out = self.frames[size].video, self._folder / "media.mp4"
        try:
            samples = media.call("measure", video, out, frames=self._file_frames)
        except EngineError as error:
            self.failures.append(Failure(_MEDIA, str(error)))
            return None
        return Measurement(_MEDIA, size, number, samples)

    def _of(self, name: str, case: str) -> list[Measurement]:
        return [one for one in self.measurements if (one.target, one.case) == (name, case)]

    def rows(self, limits: Limits) -> list[Row]:
        """A row for every size and target that was measured."""
        return [
            self._row(opened, size, found, limits)
            for size in self.frames
            for name, opened in self._opened.items()
            if (found := self._of(name, size))
        ]

    def _row(self, opened: _Opened, size: str, found: list[Measurement], limits: Limits) -> Row:
        entry, facts, cost = opened.entry, opened.facts, opened.entry.cost
        times = stages(found)
        matmul_share = copy_share = None
        if cost is not None and not entry.gpu:
            seconds = times["infer"].median / 1000
            matmul_share = round(cost.multiply_adds / seconds / limits.matmul, 4)
            copy_share = round(cost.bytes / seconds / limits.copy, 4)
        return Row(
            target=entry.name,
            size=size,
            ours=entry.ours,
            precision=facts.precision,
            graph=facts.graph,
            verified=entry.ours and facts.unverified_reason is None,
            unverified_reason=facts.unverified_reason,
            note=facts.note,
            frames_per_second=round(1000 / times[TOTAL].median, 2),
            stages=times,
            agreement=opened.agreements.get(size),
            startup_seconds=round(opened.process.seconds, 3),
            peak_bytes=opened.peak_bytes,
            device_bytes=opened.device_bytes,
            joules_per_frame=joules_per_frame(found),
            multiply_adds=cost.multiply_adds if cost else None,
            min_bytes=cost.bytes if cost else None,
            matmul_share=matmul_share,
            copy_share=copy_share,
        )

    def ratios(self) -> list[Ratio]:
        """Every target's against each of ours."""
        ours = [name for name, opened in self._opened.items() if opened.entry.ours]
        baselines = [name for name in self._opened if name not in ours]
        return all_ratios(self.measurements, list(self.frames), ours, baselines)

    def files(self) -> list[FileRow]:
        """File to file, for each size and each of ours."""
        found = []
        for size in self.frames:
            for name in self._opened:
                if measured := self._of(name, _FILES + size):
                    rates = [round(1000 / one.samples[TOTAL][0], 2) for one in measured]
                    median = round(statistics.median(rates), 2)
                    found.append(FileRow(name, size, self._sources, median, rates))
        return found

    def media(self) -> list[MediaRow]:
        """Decoding and encoding, for each size."""
        measured = {size: self._of(_MEDIA, size) for size in self.frames}
        return [MediaRow(size, stages(found)) for size, found in measured.items() if found]


def street_frames(size: Size, count: int) -> list[Rgb]:
    """``count`` frames, uint8 [H, W, 3] RGB of ``size`` (height, width), of one drive."""
    shrink = max(1, round(size[0] / _DRAWN))
    street = Street(_SEED, (max(size[0] // shrink, 32), max(size[1] // shrink, 32)))
    return [resize(street.frame(index)[0], size) for index in range(count)]


def read_frames(source: str, count: int) -> list[Rgb]:
    """The first ``count`` frames of a video or folder, or fewer if it has no more. Raises
    SourceError when it cannot be read, has none, or is live."""
    live = SourceError(
        f"{redacted(source)} is live, and what is timed must be the same frames for everybody: "
        "record some to a file and pass that"
    )
    if scheme_of(source) in ("rtsp", "rtsps"):  # whether it answers or not
        raise live
    with open_source(source) as opened:
        if opened.info.live:
            raise live
        frames = [frame.image for frame in islice(opened, count)]
    if not frames:
        raise SourceError(f"{source} has no frames: pass a video or a folder of images")
    return frames


def write_video(path: Path, frames: Sequence[Rgb]) -> list[float]:
    """Write uint8 [H, W, 3] RGB frames as H.264 at 30 a second; milliseconds for each."""
    height, width = frames[0].shape[:2]
    path.unlink(missing_ok=True)
    encoder = working_encoder(ENCODERS["h264"], (height, width))
    writer = VideoWriter(path, (height, width), Fraction(1, _RATE), Fraction(_RATE), encoder)
    times = []
    for tick, frame in enumerate(frames):
        began = perf_counter()
        writer.write(frame, tick)
        times.append(1000 * (perf_counter() - began))
    began = perf_counter()
    writer.close()
    # The encoder lags behind: what it still holds at the end is shared by all frames.
    rest = 1000 * (perf_counter() - began) / len(frames)
    return [time + rest for time in times]


class Media:
    """Decodes and encodes files, with nothing else in the process."""

    def measure(self, video: Path, out: Path) -> dict[str, list[float]]:
        """Decode ``video`` to RGB frames, and encode these to ``out``: milliseconds per frame."""
        frames, decode = [], []
        with open_source(video) as source:
            began = perf_counter()
            for frame in source:
                decode.append(1000 * (perf_counter() - began))
                frames.append(frame.image)
                began = perf_counter()
        return {"decode": decode, "encode": write_video(out, frames)}
