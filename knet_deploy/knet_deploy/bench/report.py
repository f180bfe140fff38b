"""What a contest found, as one value that is written as JSON.

From laps to numbers: percentiles over all frames, and ratios that are taken round by round.

Interleaved rounds: whatever else the machine does meets every contestant alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from time import sleep as _sleep

import msgspec
import numpy as np

from knet_deploy.bench.machine import Limits, Machine

PAUSE = 0.3  # seconds: threads of one engine that spin while they wait slow the next one


class Measurement(msgspec.Struct, frozen=True):
    """What one turn of one contestant at one task gave: milliseconds per frame, by stage."""

    contestant: str
    task: str
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
    tasks: Mapping[str, Sequence[str]],
    rounds: int,
    run: Callable[[str, str, int], Measurement | None],
    *,
    pause: float = PAUSE,
    sleep: Callable[[float], None] = _sleep,
) -> list[Measurement]:
    """All laps of ``rounds`` rounds.

    ``tasks`` says what each contestant does in its turn, in that order. ``run`` (contestant, task,
    round) does one of them; None from it ends that contestant's part in all that follows.
    ``pause`` is in seconds and comes before every turn.
    """
    laps, out = [], set()
    for number in range(rounds):
        for name in order(list(tasks), number):
            for task in tasks[name]:
                if name in out:
                    break
                sleep(pause)
                lap = run(name, task, number)
                if lap is None:
                    out.add(name)
                else:
                    laps.append(lap)
    return laps


TOTAL = "total"
"""The stage that is the whole: from the decoded frame to the class map at the frame's size."""


class Spread(msgspec.Struct, frozen=True):
    """Milliseconds per frame: the median and three other percentiles over all frames."""

    median: float
    p5: float
    p95: float
    p99: float


class Ratio(msgspec.Struct, frozen=True):
    """How many times as long ``slower`` takes as ``faster``: the median over the rounds of the
    ratios of their medians, and the least and the most of these."""

    task: str
    slower: str
    faster: str
    median: float
    least: float
    most: float


def spread(values: Sequence[float]) -> Spread:
    """Percentiles of milliseconds. Raises ValueError without any."""
    if not values:
        raise ValueError("there is nothing to summarise")
    found = np.percentile(values, (50, 5, 95, 99))
    return Spread(*(round(float(value), 4) for value in found))


def stages(laps: Iterable[Measurement]) -> dict[str, Spread]:
    """Every stage of these laps of one contestant at one task, in its first lap's order."""
    values: dict[str, list[float]] = {}
    for lap in laps:
        for stage, samples in lap.samples.items():
            values.setdefault(stage, []).extend(samples)
    return {stage: spread(samples) for stage, samples in values.items()}


def joules_per_frame(laps: Sequence[Measurement]) -> float | None:
    """Energy of these laps by their frames; None where the machine does not tell."""
    frames, joules = 0, 0.0
    for lap in laps:
        if lap.joules is None:
            return None
        joules += lap.joules
        frames += len(lap.samples[TOTAL])
    return round(joules / frames, 4) if frames else None


def ratio(laps: Iterable[Measurement], task: str, slower: str, faster: str) -> Ratio | None:
    """``slower`` against ``faster`` at ``task``; None unless both ran in some round."""
    times: dict[str, dict[int, float]] = {slower: {}, faster: {}}
    for lap in laps:
        if lap.task == task and lap.contestant in times:
            times[lap.contestant][lap.round] = statistics.median(lap.samples[TOTAL])
    shared = times[slower].keys() & times[faster].keys()
    found = [times[slower][number] / times[faster][number] for number in shared]
    if not found:
        return None
    numbers = (statistics.median(found), min(found), max(found))
    return Ratio(task, slower, faster, *(round(number, 4) for number in numbers))


def all_ratios(
    laps: Sequence[Measurement], tasks: Sequence[str], ours: Sequence[str], theirs: Sequence[str]
) -> list[Ratio]:
    """Every peer, and every one of ours but itself, against each of ours."""
    found = [
        ratio(laps, task, slower, faster)
        for task in tasks
        for faster in ours
        for slower in (*theirs, *ours)
        if slower != faster
    ]
    return [one for one in found if one is not None]


class Row(msgspec.Struct, frozen=True):
    """One contestant at one frame size (``task``, "HEIGHT×WIDTH").

    ``verified`` says whether verify has passed this very graph on this engine and device,
    ``unverified_reason`` why not. ``stages`` are milliseconds per frame: "total" from the decoded
    frame to the class map at its size, in which "preprocess", "infer" and "postprocess" lie (an
    upload counts as "infer"), and "draw" after it. ``frames_per_second`` is one over the total's
    median. ``agreement`` is the share of pixels equal to ``Report.reference``'s.
    ``startup_seconds`` goes from opening to the first mask, engine's import included;
    ``peak_bytes`` is the most memory of its own process, ``device_bytes`` of the GPU's;
    ``joules_per_frame`` are the processor's or the GPU's, drawing included. ``multiply_adds`` and
    ``least_bytes`` are the graph's for one picture; ``matmul_share`` and ``copy_share`` say how
    much of the machine's float32 matrix product (whatever the row's precision) and copy speed they
    are in "infer". None: not known here.
    """

    contestant: str
    task: str
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
    least_bytes: int | None
    matmul_share: float | None
    copy_share: float | None


class Failure(msgspec.Struct, frozen=True):
    """A contestant that could not take part, and why."""

    contestant: str
    reason: str


class FileRow(msgspec.Struct, frozen=True):
    """File to file through the whole pipeline: all sources' frames per second, round by round."""

    contestant: str
    task: str
    sources: int
    frames_per_second: float
    rounds: list[float]


class MediaRow(msgspec.Struct, frozen=True):
    """Milliseconds per frame to decode and to encode a file of this size, alone."""

    task: str
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
