"""Counts and times of a run, and their snapshots."""

from __future__ import annotations

import threading

import msgspec
import pytest
from fakes import Frames

from knet_runtime.pipeline.stats import RunSnapshot, RunStats


def test_a_snapshot_holds_counts_and_percentiles_of_the_last_thousand_frames() -> None:
    stats = RunStats()
    feed = stats.add_feed("gate", Frames(0))
    assert stats.snapshot().feeds["gate"].last_frame_age is None
    for value in (*[10_000] * 50, *range(1, 1001)):
        feed.add("write", value)
    feed.add("read", 3)
    feed.dropped()
    feed.repeated()
    feed.wrote(read_at=0.0)
    taken = stats.snapshot()
    gate = taken.feeds["gate"]
    assert (gate.frames, gate.dropped, gate.stale_frames) == (1, 1, 1)
    assert (gate.connected, gate.reconnects) == (True, 0)
    assert gate.last_frame_age is not None
    assert gate.last_frame_age > 0
    assert list(gate.stages) == ["read", "write"]
    assert gate.stages["write"].p50 == pytest.approx(500.5)
    assert gate.stages["write"].p99 == pytest.approx(990, abs=1)
    assert msgspec.json.decode(msgspec.json.encode(taken), type=RunSnapshot) == taken


def test_snapshots_may_be_taken_while_threads_count() -> None:
    stats, done = RunStats(), threading.Event()
    feed = stats.add_feed("gate", Frames(0))

    def count() -> None:
        for value in range(2000):
            feed.add("infer", value)
            feed.wrote(0.0)
        done.set()

    thread = threading.Thread(target=count)
    thread.start()
    while not done.is_set():
        assert stats.snapshot().feeds["gate"].frames <= 2000
    thread.join()
    assert stats.snapshot().feeds["gate"].frames == 2000
