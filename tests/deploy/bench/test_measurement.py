"""Turns and what is made of them, with clocks that do what they are told."""

from __future__ import annotations

import pytest

from knet_deploy.bench.report import (
    TOTAL,
    Measurement,
    all_ratios,
    interleave,
    joules_per_frame,
    order,
    ratio,
    spread,
    stages,
)


def test_every_second_round_runs_backwards_and_then_the_next_one_begins() -> None:
    names = ["a", "b", "c"]
    assert order(names, 0) == ["a", "b", "c"]
    assert order(names, 1) == ["c", "b", "a"]
    assert order(names, 2) == ["b", "c", "a"]
    assert order([], 3) == []


def test_each_place_is_everybodys_equally_often() -> None:
    names = ["a", "b", "c", "d"]
    for place in range(4):
        assert sorted(order(names, number)[place] for number in range(8)) == sorted(2 * names)


def test_turns_are_interleaved_with_a_pause_before_each() -> None:
    events: list[object] = []

    def run(name: str, case: str, number: int) -> Measurement:
        events.append((name, case, number))
        return Measurement(name, case, number, {TOTAL: [1.0]})

    measurements = interleave(
        {"a": ["x", "y"], "b": ["x"]}, 2, run, pause=0.25, sleep=events.append
    )
    turns = [
        ("a", "x", 0),
        ("a", "y", 0),
        ("b", "x", 0),
        ("b", "x", 1),
        ("a", "x", 1),
        ("a", "y", 1),
    ]
    assert [event for event in events if event != 0.25] == turns
    assert events[::2] == [0.25] * len(turns)
    assert [(one.target, one.case, one.round) for one in measurements] == turns


def test_who_fails_is_out_and_the_others_go_on() -> None:
    def run(name: str, case: str, number: int) -> Measurement | None:
        return None if name == "b" and number else Measurement(name, case, number, {TOTAL: [1.0]})

    measurements = interleave({"a": ["x"], "b": ["x", "y"]}, 3, run, pause=0, sleep=lambda _: None)
    assert [one.round for one in measurements if one.target == "a"] == [0, 1, 2]
    ended = [(one.case, one.round) for one in measurements if one.target == "b"]
    assert ended == [("x", 0), ("y", 0)]


def test_percentiles_are_over_all_frames_of_all_rounds() -> None:
    measurements = [
        Measurement(
            "a", "x", number, {"preprocess": [1.0], TOTAL: [float(value) for value in values]}
        )
        for number, values in enumerate((range(1, 51), range(51, 102)))
    ]
    found = stages(measurements)
    assert list(found) == ["preprocess", TOTAL]
    total = found[TOTAL]
    assert (total.median, total.p5, total.p95, total.p99) == (51.0, 6.0, 96.0, 100.0)
    with pytest.raises(ValueError, match="nothing"):
        spread([])


def test_ratios_pair_the_rounds_so_that_a_slow_moment_counts_for_both() -> None:
    measurements = []
    for number, pace in enumerate((1.0, 10.0, 1.0)):  # the machine is busy in the second round
        measurements.append(Measurement("ours", "x", number, {TOTAL: [2.0 * pace] * 3}))
        measurements.append(Measurement("baseline", "x", number, {TOTAL: [6.0 * pace] * 3}))
    found = ratio(measurements, "x", "baseline", "ours")
    assert found is not None
    assert (found.median, found.min, found.max) == (3.0, 3.0, 3.0)
    assert ratio(measurements, "y", "baseline", "ours") is None
    ratios = all_ratios(measurements, ["x"], ["ours"], ["baseline"])
    assert [(one.slower, one.faster) for one in ratios] == [("baseline", "ours")]


def test_energy_is_unknown_as_soon_as_one_measurement_has_none() -> None:
    measurements = [Measurement("a", "x", number, {TOTAL: [1.0, 1.0]}, 3.0) for number in range(2)]
    assert joules_per_frame(measurements) == 1.5
    assert joules_per_frame([*measurements, Measurement("a", "x", 2, {TOTAL: [1.0]})]) is None
    assert joules_per_frame([]) is None
