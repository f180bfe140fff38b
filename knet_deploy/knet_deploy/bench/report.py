"""Measurements in interleaved rounds, the numbers made of them, and the report of a benchmark.

Targets take turns, so that whatever else the machine does slows all of them alike. Ratios are
taken round by round for the same reason. A ``Report`` is a value that is written as JSON; ``lines``
are its lines for a terminal.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from time import sleep as _sleep

import msgspec
import numpy as np

from knet_deploy.bench.machine import Limits, Machine

TOTAL = "total"
"""The stage that is the whole: from the decoded frame to the class map at the frame's size."""

PAUSE = 0.3  # seconds: threads of one engine that spin while they wait slow the next one

_SPEED = ("precision", "frames/s", "ms", "p5", "p95", "p99")
_STAGES = ("preprocess", "infer", "postprocess", "draw")
_COST = ("matmul", "copy", "J/frame", "MiB", "start s", "equal")


class Measurement(msgspec.Struct, frozen=True):
    """What one turn of one target gave: milliseconds per frame, by stage.

    ``case`` is what it did, such as a size of frame; ``joules`` is None where nothing tells.
    """

    target: str
    case: str
    round: int
    samples: dict[str, list[float]]
    joules: float | None = None


def order(names: Sequence[str], number: int) -> list[str]:
    """Whose turn it is in round ``number``. Every second round runs backwards, so that nobody
    always follows the same neighbour, and after two the next name begins."""
    if not names:
        return []
    start = number // 2 % len(names)
    turned = [*names[start:], *names[:start]]
    return turned[::-1] if number % 2 else turned


def interleave(
    cases: Mapping[str, Sequence[str]],
    rounds: int,
    measure: Callable[[str, str, int], Measurement | None],
    *,
    pause: float = PAUSE,
    sleep: Callable[[float], None] = _sleep,
    on_round: Callable[[int], None] = lambda _: None,
) -> list[Measurement]:
    """All measurements of ``rounds`` rounds.

    ``cases`` says what each target does in its turn, in that order. ``measure`` (target, case,
    round) does one of them; None from it ends that target's part in all that follows. ``pause`` is
    in seconds and comes before every turn. ``on_round`` is told how many rounds are done.
    """
    measurements, out = [], set()
    for number in range(rounds):
        for name in order(list(cases), number):
            for case in cases[name]:
                if name in out:
                    break
                sleep(pause)
                found = measure(name, case, number)
                if found is None:
                    out.add(name)
                else:
                    measurements.append(found)
        on_round(number + 1)
    return measurements


class Spread(msgspec.Struct, frozen=True):
    """Milliseconds per frame: the median and three other percentiles over all frames."""

    median: float
    p5: float
    p95: float
    p99: float


def spread(values: Sequence[float]) -> Spread:
    """Percentiles of milliseconds. Raises ValueError without any."""
    if not values:
        raise ValueError("there is nothing to summarise")
    found = np.percentile(values, (50, 5, 95, 99))
    return Spread(*(round(float(value), 4) for value in found))


def stages(measurements: Iterable[Measurement]) -> dict[str, Spread]:
    """Every stage of one target's measurements of one case, in the order of the first of them."""
    values: dict[str, list[float]] = {}
    for one in measurements:
        for stage, samples in one.samples.items():
            values.setdefault(stage, []).extend(samples)
    return {stage: spread(samples) for stage, samples in values.items()}


def joules_per_frame(measurements: Sequence[Measurement]) -> float | None:
    """Energy of these measurements by their frames; None where the machine does not tell."""
    frames, joules = 0, 0.0
    for one in measurements:
        if one.joules is None:
            return None
        joules += one.joules
        frames += len(one.samples[TOTAL])
    return round(joules / frames, 4) if frames else None


class Ratio(msgspec.Struct, frozen=True):
    """How many times as long ``slower`` takes as ``faster`` at ``size``: the median, the smallest
    and the largest of the rounds' ratios of medians."""

    size: str
    slower: str
    faster: str
    median: float
    min: float
    max: float


def ratio(measurements: Iterable[Measurement], size: str, slower: str, faster: str) -> Ratio | None:
    """``slower`` against ``faster`` at ``size``; None unless both ran in some round."""
    times: dict[str, dict[int, float]] = {slower: {}, faster: {}}
    for one in measurements:
        if one.case == size and one.target in times:
            times[one.target][one.round] = statistics.median(one.samples[TOTAL])
    shared = times[slower].keys() & times[faster].keys()
    found = [times[slower][number] / times[faster][number] for number in shared]
    if not found:
        return None
    numbers = (statistics.median(found), min(found), max(found))
    return Ratio(size, slower, faster, *(round(number, 4) for number in numbers))


def all_ratios(
    measurements: Sequence[Measurement],
    sizes: Sequence[str],
    ours: Sequence[str],
    baselines: Sequence[str],
) -> list[Ratio]:
    """Every baseline, and every one of ours but itself, against each of ours."""
    found = [
        ratio(measurements, size, slower, faster)
        for size in sizes
        for faster in ours
        for slower in (*baselines, *ours)
        if slower != faster
    ]
    return [one for one in found if one is not None]


class Row(msgspec.Struct, frozen=True):
    """One target at one frame size ("HEIGHT×WIDTH").

    ``verified`` says whether verify has passed this very graph on this engine and device,
    ``unverified_reason`` why not. ``stages`` are milliseconds per frame: "total" from the decoded
    frame to the class map at its size, in which "preprocess", "infer" and "postprocess" lie (an
    upload counts as "infer"), and "draw" after it. ``frames_per_second`` is one over the total's
    median. ``agreement`` is the share of pixels equal to ``Report.reference``'s.
    ``startup_seconds`` goes from opening to the first class map, the engine's import included;
    ``peak_bytes`` is the most memory of its own process, ``device_bytes`` of the GPU's;
    ``joules_per_frame`` are the processor's or the GPU's, drawing included. ``multiply_adds`` and
    ``min_bytes`` are the graph's for one image; ``matmul_share`` and ``copy_share`` say how much
    of the machine's float32 matrix product (whatever the row's precision) and copy speed they are
    in "infer". None: not known here.
    """

    target: str
    size: str
    ours: bool
    precision: str
    graph: str | None
    verified: bool
    unverified_reason: str | None
    note: str
    frames_per_second: float
    stages: dict[str, Spread]
    agreement: float | None
    startup_seconds: float
    peak_bytes: int | None
    device_bytes: int | None
    joules_per_frame: float | None
    multiply_adds: int | None
    min_bytes: int | None
    matmul_share: float | None
    copy_share: float | None


class Failure(msgspec.Struct, frozen=True):
    """A target that could not be timed, or not to the end, and why."""

    target: str
    reason: str


class FileRow(msgspec.Struct, frozen=True):
    """File to file through the whole pipeline: all sources' frames per second, round by round."""

    target: str
    size: str
    sources: int
    frames_per_second: float
    rounds: list[float]


class MediaRow(msgspec.Struct, frozen=True):
    """Milliseconds per frame to decode and to encode a file of this size, alone."""

    size: str
    stages: dict[str, Spread]


class Report(msgspec.Struct, frozen=True):
    """All of it. ``models`` are the identities of the bundles."""

    models: list[str]
    source: str
    frames: int
    rounds: int
    threads: int
    reference: str | None
    rows: list[Row]
    failures: list[Failure]
    ratios: list[Ratio]
    files: list[FileRow]
    media: list[MediaRow]
    limits: Limits
    machine: Machine

    @property
    def sizes(self) -> list[str]:
        """The frame sizes that have rows."""
        return list(dict.fromkeys(row.size for row in self.rows))


def lines(report: Report) -> Iterator[str]:
    """The report for a terminal: a table for each frame size, and a line for each ratio."""
    machine = report.machine
    models = ", ".join(report.models)
    turns = f"{counted(report.rounds, 'round')} of {counted(report.frames, 'frame')}"
    yield f"{models}, {report.source}, {turns}"
    yield (
        f"{machine.processor}, {counted(report.threads, 'thread')}: matrix product "
        f"{2 * report.limits.matmul / 1e9:.0f} GFLOP/s float32, copy "
        f"{report.limits.copy / 1e9:.1f} GB/s"
    )
    if machine.load is not None and machine.load > 1:
        yield f"note: the load is {machine.load:.1f}: others compute here too"
    for count in dict.fromkeys(row.multiply_adds for row in report.rows if row.multiply_adds):
        yield f"{count / 1e9:.2f} giga multiply-adds an image"
    for size in report.sizes:
        yield ""
        yield from _table(size, [row for row in report.rows if row.size == size])
    yield ""
    yield from _notes(report)
    for file in report.files:
        several = "" if file.sources == 1 else f", {file.sources} files at once"
        rate = f"{file.frames_per_second:.1f} frames/s"
        yield f"file to file {file.size}: {file.target} {rate}{several}"
    for media in report.media:
        parts = ", ".join(f"{stage} {time.median:.2f}" for stage, time in media.stages.items())
        yield f"file {media.size}, ms a frame: {parts}"
    winners = {size: _winner(report, size) for size in report.sizes}
    for ratio in report.ratios:
        if ratio.faster == winners[ratio.size]:
            yield (
                f"{ratio.size}: {ratio.faster} is {ratio.median:.2f} times as fast as "
                f"{ratio.slower} ({ratio.min:.2f} … {ratio.max:.2f})"
            )


def counted(number: int, noun: str) -> str:
    """ "1 frame", "2 frames"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _table(size: str, rows: Sequence[Row]) -> Iterator[str]:
    """Columns that nothing is known for are left out."""
    table = [(size, *_SPEED, *_STAGES, *_COST), *(_cells(row) for row in rows)]
    columns = [column for column in zip(*table, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    for cells in zip(*columns, strict=True):
        padded = [
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        yield "  ".join(padded).rstrip()


def _cells(row: Row) -> tuple[str, ...]:
    total = row.stages[TOTAL]
    return (
        row.target if row.verified or not row.ours else f"{row.target} *",
        row.precision,
        f"{row.frames_per_second:.1f}",
        *(f"{value:.2f}" for value in (total.median, total.p5, total.p95, total.p99)),
        *(f"{row.stages[name].median:.2f}" if name in row.stages else "" for name in _STAGES),
        _percent(row.matmul_share, 0),
        _percent(row.copy_share, 0),
        "" if row.joules_per_frame is None else f"{row.joules_per_frame:.2f}",
        "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}",
        f"{row.startup_seconds:.1f}",
        _percent(row.agreement, 3),
    )


def _percent(share: float | None, digits: int) -> str:
    return "" if share is None else f"{100 * share:.{digits}f} %"


def _notes(report: Report) -> Iterator[str]:
    rows = {row.target: row for row in report.rows}
    for name, row in rows.items():
        if row.ours and row.unverified_reason:
            yield f"* {name}: {row.unverified_reason}; knet-deploy verify measures it"
        if row.note:
            yield f"{name}: {row.note}"
    for failure in report.failures:
        what = "stopped" if failure.target in rows else "did not run"
        yield f"{failure.target} {what}: {failure.reason}"


def _winner(report: Report, size: str) -> str | None:
    """The fastest of ours that is verified here; of all of ours, where none is."""
    ours = [row for row in report.rows if row.ours and row.size == size]
    verified = [row for row in ours if row.verified] or ours
    return max(verified, key=lambda row: row.frames_per_second).target if verified else None
