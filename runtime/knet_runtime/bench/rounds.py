"""Interleaved rounds: whatever else the machine does meets every contestant alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import sleep as _sleep

import msgspec

PAUSE = 0.3  # seconds: threads of one engine that spin while they wait slow the next one


class Lap(msgspec.Struct, frozen=True):
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
    run: Callable[[str, str, int], Lap | None],
    *,
    pause: float = PAUSE,
    sleep: Callable[[float], None] = _sleep,
) -> list[Lap]:
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
