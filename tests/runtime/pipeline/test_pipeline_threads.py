"""The pipeline's threads: order, fairness, the live policy, failures anywhere, and the end."""

from __future__ import annotations

import _thread
import random
import threading
from collections.abc import Callable
from time import monotonic

import numpy as np
import pytest
from fakes import Batches, Frames, Recorder, entries, pipeline_threads, raises, segment_one
from numpy.typing import NDArray
from waiting import wait_until

import knet_runtime.pipeline as pipeline_module
from knet_runtime.errors import ConfigError, EngineError, OutputClosed, OutputError, SourceError
from knet_runtime.pipeline import Feed, Pipeline, RunStats, run
from knet_runtime.segmentation import Segmentation
from knet_runtime.types import Frame


class Broken(Exception):
    """A fault that was put in."""


def breaks_at(number: int, error: BaseException) -> Callable[[object], None]:
    count = 0

    def step(_: object) -> None:
        nonlocal count
        count += 1
        if count > number:
            raise error

    return step


@pytest.mark.parametrize("seed", range(60))
def test_a_failure_in_any_stage_is_raised_and_leaves_nothing_behind(seed: int) -> None:
    chance = random.Random(seed)
    stage = ("read", "segment", "transform", "write", "close", "callback")[seed % 6]
    fault = Broken(stage)
    feeds = chance.randint(1, 3)
    breaks = breaks_at(chance.randint(0, 12), fault)
    where = chance.randrange(feeds)
    threads, files = entries("/proc/self/task"), entries("/proc/self/fd")

    def segmenter(image: NDArray[np.uint8]) -> Segmentation:
        if stage == "segment":
            breaks(image)
        return segment_one(image)

    def transform(frame: Frame, mask: Segmentation) -> Segmentation:
        breaks(frame)
        return mask

    sinks = [[Recorder("one"), Recorder("two")] for _ in range(feeds)]
    sources = [Frames(20) for _ in range(feeds)]
    if stage == "read":
        sources[where] = Frames(20, breaks)
    if stage == "write":
        sinks[where][0] = Recorder("bad", on_write=breaks)
    if stage == "close":
        sinks[where][0] = Recorder("bad", on_close=raises(fault))
    made = [
        Feed(
            source,
            outputs,
            str(index),
            transform=transform if stage == "transform" and index == where else None,
        )
        for index, (source, outputs) in enumerate(zip(sources, sinks, strict=True))
    ]

    def callback(frame: Frame, mask: Segmentation) -> None:
        if stage == "callback":
            breaks(frame)

    began = monotonic()
    with pytest.raises((Broken, OutputError), match="bad: close|" + stage):
        run(made, segmenter, on_frame=callback)
    assert monotonic() - began < 10
    assert pipeline_threads() == []
    assert entries("/proc/self/fd") == files
    # The system lets go of a thread a moment after Python does.
    wait_until(lambda: entries("/proc/self/task") <= threads, "all threads to end")
    assert all(len(sink.closed) == 1 for outputs in sinks for sink in outputs)
    if stage in ("read", "write", "transform"):
        for index, outputs in enumerate(sinks):
            kept = index != where
            assert [sink.closed for sink in outputs] == [[kept]] * 2
            if index != where:
                assert outputs[0].frames == list(range(20))


def test_what_was_segmented_before_a_failure_is_written() -> None:
    sink = Recorder()

    def read(index: int) -> None:
        if index == 7:
            raise SourceError("cut.mp4: is damaged")

    with pytest.raises(SourceError):
        run([Feed(Frames(20, read), [sink])], segment_one)
    assert sink.frames == list(range(7))

    def segmenter(image: NDArray[np.uint8]) -> Segmentation:
        if image.flat[0] == 9:
            raise EngineError("out of memory")
        return segment_one(image)

    sink = Recorder()
    with pytest.raises(EngineError):
        run([Feed(Frames(20), [sink])], segmenter)
    assert sink.frames == list(range(9))
    assert sink.closed == [False]


def test_feeds_share_batches_fairly_and_keep_their_order() -> None:
    engine = Batches()
    sinks = [Recorder(str(index)) for index in range(5)]
    gate = threading.Barrier(5)
    feeds = [
        Feed(Frames(30, lambda index: index or gate.wait(10)), [sink], sink.name) for sink in sinks
    ]
    summary = run(feeds, engine)
    assert summary.frames == 150
    assert engine.warmed == [5]
    assert all(sink.frames == list(range(30)) for sink in sinks)
    assert all(len(batch) <= 3 for batch in engine.batches)
    assert max(len(batch) for batch in engine.batches) > 1


def test_a_feed_whose_disk_is_slow_holds_up_no_other() -> None:
    free = threading.Event()
    slow = Recorder("slow", on_write=lambda frame: free.wait(20))
    quick = Recorder("quick")
    feeds = [Feed(Frames(30), [slow], "slow"), Feed(Frames(30), [quick], "quick")]
    with Pipeline(feeds, segment_one) as pipeline:
        try:
            wait_until(lambda: quick.closed, "the quick feed's end")
            assert slow.frames == []
        finally:
            free.set()
        pipeline.join()
    assert slow.frames == quick.frames == list(range(30))


def test_a_live_feed_drops_what_is_old_and_counts_it() -> None:
    source = Frames(200, lambda index: threading.Event().wait(0.001), kind="stream")
    stats = RunStats()
    sink = Recorder(on_write=lambda frame: threading.Event().wait(0.01) and None)
    run([Feed(source, [sink], "gate")], segment_one, stats=stats)
    numbers = stats.snapshot().feeds["gate"]
    assert sink.frames == sorted(set(sink.frames))
    assert numbers.dropped > 20
    assert numbers.frames + numbers.dropped == 200
    assert sink.frames[-1] == 199
    assert numbers.stages["latency"].p50 < 500


def test_a_live_feed_without_new_pictures_shows_the_last_one_as_stale() -> None:
    more = threading.Event()

    def read(index: int) -> None:
        if index == 3:
            more.wait(20)

    source, sink, stats = Frames(5, read, kind="stream"), Recorder(), RunStats()
    options = {"stats": stats, "stale_after": 0.05}
    with Pipeline([Feed(source, [sink], "gate")], segment_one, **options) as pipeline:
        wait_until(lambda: len(sink.stale) >= 3, "three stale pictures")
        more.set()
        pipeline.join()
    assert set(sink.stale) == {2}
    assert sink.frames[-1] == 4
    numbers = stats.snapshot().feeds["gate"]
    assert numbers.stale_frames == len(sink.stale)
    assert numbers.frames == len(sink.frames)


@pytest.mark.parametrize("kind", ["video", "stream"])
def test_stopping_drains_and_closes_as_complete(kind: str) -> None:
    source, sink, stop = Frames(None, kind=kind), Recorder(), threading.Event()  # type: ignore[arg-type]

    def callback(frame: Frame, mask: Segmentation) -> None:
        if frame.index >= 20:
            stop.set()

    summary = run([Feed(source, [sink])], segment_one, stop=stop, on_frame=callback)
    assert sink.closed == [True]
    assert summary.frames == len(sink.frames)
    assert source.stopped.is_set()
    assert pipeline_threads() == []


def test_a_live_run_ends_after_max_frames() -> None:
    source, sink = Frames(None, kind="stream"), Recorder()
    assert run([Feed(source, [sink])], segment_one, max_frames=7).frames == 7
    assert len(sink.frames) == 7
    assert sink.closed == [True]


def test_a_sink_that_hangs_is_left_behind_and_the_others_are_closed() -> None:
    free = threading.Event()
    try:
        for where in ("write", "close"):
            hung = Recorder(
                "nfs/o.mp4",
                on_write=(lambda frame: free.wait(60) and None) if where == "write" else None,
                on_close=(lambda: free.wait(60) and None) if where == "close" else None,
            )
            other = Recorder("other")
            feeds = [Feed(Frames(5), [hung, other])]
            with pytest.raises(OutputError, match=r"nfs/o\.mp4: did not answer for 0\.2 s"):
                run(feeds, segment_one, sink_patience=0.2)
            assert other.closed == [False]
    finally:
        free.set()
    wait_until(lambda: pipeline_threads() == [], "the thread that hung to end")


def test_a_source_that_does_not_stop_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_module, "STOP_PATIENCE", 0.2)
    free = threading.Event()
    source = Frames(None, lambda index: index == 3 and free.wait(60))
    sink, other = Recorder(), Recorder("other")
    pipeline = Pipeline([Feed(source, [sink], "gate"), Feed(Frames(5), [other])], segment_one)
    pipeline.start()
    wait_until(lambda: sink.frames == [0, 1, 2] and other.closed, "what can be read")
    pipeline.stop()
    with pytest.raises(SourceError, match="gate: does not stop and was given up"):
        pipeline.join()
    assert (sink.closed, other.closed) == ([False], [True])
    free.set()
    wait_until(lambda: pipeline_threads() == [], "the thread that hung to end")


def test_an_engine_that_does_not_come_back_is_given_up_and_comes_too_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline_module, "STOP_PATIENCE", 0.2)
    hangs, late, written = threading.Event(), threading.Event(), threading.Event()

    def segmenter(image: NDArray[np.uint8]) -> Segmentation:
        if image.flat[0] == 2:
            hangs.set()
            late.wait(60)
        return segment_one(image)

    sink = Recorder(on_write=lambda frame: written.wait(20))
    pipeline = Pipeline([Feed(Frames(None), [sink])], segmenter)

    def engine_returns_while_frames_are_written() -> None:
        wait_until(lambda: pipeline._errors, "the engine to be given up")
        late.set()
        wait_until(lambda: "knet-engine" not in pipeline_threads(), "the engine's thread to end")
        written.set()

    pipeline.start()
    assert hangs.wait(20)
    pipeline.stop()
    beside = threading.Thread(target=engine_returns_while_frames_are_written)
    beside.start()
    with pytest.raises(EngineError, match="does not come back and was given up"):
        pipeline.join()
    beside.join()
    assert sink.frames == [0, 1]
    assert sink.closed == [False]
    assert pipeline_threads() == []


@pytest.mark.parametrize("where", ["warm-up", "call"])
def test_an_engine_that_hangs_when_the_run_is_interrupted_is_given_up_within_seconds(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(pipeline_module, "ENGINE_PATIENCE", 0.2)
    hangs, late = threading.Event(), threading.Event()

    class Hangs(Batches):
        def warm_up(self, largest: int) -> None:
            if where == "warm-up":
                hangs.set()
                late.wait(60)

        def batch(self, frames: list[NDArray[np.uint8]]) -> list[Segmentation]:
            if frames[0].flat[0] == 2:
                hangs.set()
                late.wait(60)
            return super().batch(frames)

    def interrupt() -> None:
        assert hangs.wait(20)
        _thread.interrupt_main()

    source, sink = Frames(None), Recorder()
    beside = threading.Thread(target=interrupt)
    beside.start()
    began = monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            run([Feed(source, [sink])], Hangs())
    finally:
        late.set()
        beside.join()
    assert monotonic() - began < 10
    # Without a frame there is nothing to be partial.
    assert (sink.frames, sink.closed) == (([0, 1], [False]) if where == "call" else ([], [True]))
    wait_until(lambda: pipeline_threads() == [], "the thread that hung to end")


def test_an_interrupted_run_waits_for_an_engine_whose_calls_are_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline_module, "ENGINE_PATIENCE", 0.01)
    busy = threading.Event()

    def segmenter(image: NDArray[np.uint8]) -> Segmentation:
        if image.flat[0] == 1:
            busy.set()
        threading.Event().wait(0.5)
        return segment_one(image)

    sink = Recorder()
    pipeline = Pipeline([Feed(Frames(None), [sink])], segmenter)
    pipeline.start()
    assert busy.wait(20)  # in its second call
    pipeline.stop()
    pipeline.join()
    assert sink.closed == [True]
    assert sink.frames[:2] == [0, 1]


def test_a_slow_engine_may_take_its_time_for_the_last_frames(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline_module, "STOP_PATIENCE", 0.05)

    def segmenter(image: NDArray[np.uint8]) -> Segmentation:
        threading.Event().wait(0.2)
        return segment_one(image)

    for options in ({}, {"max_frames": 2}):
        for kind in ("video", "stream"):
            sink = Recorder()
            run([Feed(Frames(2, kind=kind), [sink], policy="file")], segmenter, **options)
            assert sink.frames == [0, 1]
            assert sink.closed == [True]


@pytest.mark.parametrize("interrupts", [1, 2])
def test_ctrl_c_writes_what_was_read_and_a_second_one_nothing_more(
    monkeypatch: pytest.MonkeyPatch, interrupts: int
) -> None:
    wait, done = Pipeline._wait, threading.Event()
    source, sink = Frames(None), Recorder(on_write=lambda frame: frame.index == 2 and done.wait(20))
    left = [KeyboardInterrupt() for _ in range(interrupts)]

    def interrupted(self: Pipeline) -> None:
        wait(self)
        if len(sink.frames) == 2 and left:
            raise left.pop()
        if not left and source.stopped.is_set():
            done.set()

    monkeypatch.setattr(Pipeline, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run([Feed(source, [sink])], segment_one)
    assert sink.closed == [True]
    assert (len(sink.frames) == 3) == (interrupts == 2)
    assert sink.frames == list(range(len(sink.frames)))


def test_every_failure_but_the_raised_one_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    closing = threading.Event()
    sinks = [
        Recorder("one", on_close=raises(OutputError("one: lost"))),
        Recorder("two", on_close=raises(OutputError("two: lost"))),
        Recorder("three", on_close=lambda: closing.wait(0.5)),  # the run is looked after meanwhile
    ]
    with pytest.raises(OutputError, match="one: lost"):
        run([Feed(Frames(2), sinks)], segment_one)
    assert [record.message for record in caplog.records] == ["two: lost"]


def test_a_reader_that_has_had_enough_ends_its_feed_only() -> None:
    def write(frame: Frame) -> None:
        if frame.index == 4:
            raise OutputClosed("nobody reads")

    closed, other = Recorder("pipe", on_write=write), Recorder("other")
    summary = run([Feed(Frames(30), [closed], "a"), Feed(Frames(30), [other], "b")], segment_one)
    assert closed.frames == [0, 1, 2, 3]
    assert closed.closed == other.closed == [True]
    assert other.frames == list(range(30))
    assert summary.frames == 34


def test_feeds_of_one_name_and_no_feed_at_all_are_refused() -> None:
    with pytest.raises(ConfigError, match="each its own name"):
        Pipeline([Feed(Frames(1), []), Feed(Frames(1), [])], segment_one)
    with pytest.raises(ConfigError, match="at least one"):
        Pipeline([], segment_one)
