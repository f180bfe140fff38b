"""Measurements in interleaved rounds, and the numbers made of them: percentiles, ratios, energy.

Targets take turns, so that whatever else the machine does slows all of them alike. Ratios are
taken round by round for the same reason.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from time import sleep as _sleep

import msgspec
import numpy as np

TOTAL = "total"
"""The stage that is the whole: from the decoded frame to the class map at the frame's size."""

PAUSE = 0.3  # seconds: threads of one engine that spin while they wait slow the next one


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
) -> list[Measurement]:
    """All measurements of ``rounds`` rounds.

    ``cases`` says what each target does in its turn, in that order. ``measure`` (target, case,
    round) does one of them; None from it ends that target's part in all that follows. ``pause`` is
    in seconds and comes before every turn.
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
