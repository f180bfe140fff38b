"""From laps to numbers: percentiles over all frames, and ratios that are taken round by round."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from knet_runtime.bench.rounds import Lap

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


def stages(laps: Iterable[Lap]) -> dict[str, Spread]:
    """Every stage of these laps of one contestant at one task, in its first lap's order."""
    values: dict[str, list[float]] = {}
    for lap in laps:
        for stage, samples in lap.samples.items():
            values.setdefault(stage, []).extend(samples)
    return {stage: spread(samples) for stage, samples in values.items()}


def joules_per_frame(laps: Sequence[Lap]) -> float | None:
    """Energy of these laps by their frames; None where the machine does not tell."""
    frames, joules = 0, 0.0
    for lap in laps:
        if lap.joules is None:
            return None
        joules += lap.joules
        frames += len(lap.samples[TOTAL])
    return round(joules / frames, 4) if frames else None


def ratio(laps: Iterable[Lap], task: str, slower: str, faster: str) -> Ratio | None:
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
    laps: Sequence[Lap], tasks: Sequence[str], ours: Sequence[str], theirs: Sequence[str]
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
