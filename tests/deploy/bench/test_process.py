"""Processes of a benchmark: what they may use, how they fail, and that none is left behind."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import psutil
import pytest

from knet_deploy.bench.benchmark import Benchmark, Entry
from knet_deploy.bench.machine import Limits
from knet_deploy.bench.process import BenchProcess, Deadlines
from knet_deploy.bench.target import BundleTarget
from knet_runtime.bundle.store import Bundle
from knet_runtime.errors import EngineError


@pytest.fixture
def things(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module("bench_targets")


def test_a_process_computes_on_the_cores_that_it_was_given(things: ModuleType) -> None:
    before = os.environ.get("OPENBLAS_NUM_THREADS")
    with BenchProcess(things.Thing, 1) as process:
        assert process.call("threads") == (1, "1", 1)
        assert process.seconds >= 0
    assert os.environ.get("OPENBLAS_NUM_THREADS") == before


def test_what_fails_in_a_process_is_said_in_one_line(things: ModuleType) -> None:
    with pytest.raises(EngineError, match=r"^ValueError: out of luck$"):
        BenchProcess(partial(things.Thing, "out of luck"), 1)
    with BenchProcess(things.Thing, 1) as process:
        with pytest.raises(EngineError, match=r"^no such frame$"):
            process.call("fail")
        with pytest.raises(EngineError, match=r"ended with 7"):
            process.call("die")
        with pytest.raises(EngineError, match=r"ended with 7"):
            process.call("threads")


def test_what_an_engine_prints_is_no_answer(
    things: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    with BenchProcess(things.Thing, 1) as process:
        assert process.call("shout") == 0
    assert capfd.readouterr() == ("", "")


def test_who_does_not_answer_in_time_is_ended(things: ModuleType) -> None:
    with pytest.raises(EngineError, match=r"^it did not answer within 0.2 s and was ended$"):
        BenchProcess(things.never, 1, Deadlines(opening=0.2))
    with BenchProcess(things.Thing, 1, Deadlines(call=0.2, frame=0.1)) as process:
        with pytest.raises(EngineError, match=r"did not answer within 0.3 s"):
            process.call("hang", frames=3)
        with pytest.raises(EngineError, match=r"ended with -9"):
            process.call("threads")


def test_an_interrupt_ends_the_process_and_what_it_started(things: ModuleType) -> None:
    before, compilers = set(psutil.Process().children()), []

    def interrupted() -> None:
        with BenchProcess(things.Thing, 1) as process:
            compilers.append(psutil.Process(process.call("compiler")))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert set(psutil.Process().children()) == before
    assert not psutil.wait_procs(compilers, timeout=60)[1]


def test_nothing_is_said_of_the_locks_of_who_was_killed() -> None:
    # torch.compile makes such a lock; a tracker that two processes share reports it at the end.
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from bench_targets import Thing; "
        "from knet_deploy.bench.process import BenchProcess; process = BenchProcess(Thing, 1); "
        "process.call('lock'); process.kill()"
    )
    words = [sys.executable, "-c", code, str(Path(__file__).parent)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_benchmark_goes_on_without_who_hangs(
    tmp_path: Path, make_bundle: Callable[..., Bundle], things: ModuleType
) -> None:
    entries = [
        Entry("tired", partial(things.Tiring, 2)),  # its start-up and its map
        Entry("ours", partial(BundleTarget, make_bundle().path, "onnxruntime-cpu"), True),
    ]
    frames = [np.zeros((32, 48, 3), np.uint8)]
    deadlines = Deadlines(call=4, frame=1)
    benchmark = Benchmark(tmp_path, {"32×48": frames}, threads=1, sources=0, deadlines=deadlines)
    benchmark.run(entries, 2, pause=0)
    (failure,) = benchmark.failures
    assert failure.target == "tired"
    assert failure.reason == "it did not answer within 4 s and was ended"
    assert [row.target for row in benchmark.rows(Limits(1e9, 1e9))] == ["ours"]
    assert [one.round for one in benchmark.measurements if one.target == "ours"] == [0, 1]


def test_a_benchmark_stands_without_times_of_files(
    tmp_path: Path, make_bundle: Callable[..., Bundle]
) -> None:
    entry = Entry("ours", partial(BundleTarget, make_bundle().path, "onnxruntime-cpu"), True)
    frames = [np.zeros((32, 48, 3), np.uint8)]
    benchmark = Benchmark(tmp_path, {"32×48": frames}, threads=1, sources=0)
    benchmark.frames["32×48"].video.write_bytes(b"no video")
    benchmark.run([entry], 1, pause=0)
    assert [failure.target for failure in benchmark.failures] == ["decode and encode"]
    assert benchmark.media() == []
    assert len(benchmark.rows(Limits(1e9, 1e9))) == 1
