"""A benchmark that a signal ends: nothing of it continues, stays or is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

WORDS = ("--engine", "onnxruntime-cpu", "--size", "32x32", "--frames", "200")  # a turn takes long


def a_worker_starts(bench: psutil.Process, folder: Path) -> bool:
    try:
        return any("bench.process" in " ".join(child.cmdline()) for child in bench.children())
    except psutil.Error:  # one that has just ended
        return False


def an_engine_computes(bench: psutil.Process, folder: Path) -> bool:
    return any(folder.glob("knet-bench-*/maps/onnxruntime-cpu/*/*.npy"))


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs signals")
@pytest.mark.parametrize(
    ("number", "code", "moment"),
    [(signal.SIGINT, 130, a_worker_starts), (signal.SIGTERM, 143, an_engine_computes)],
)
def test_a_signal_ends_all_of_it(
    number: signal.Signals,
    code: int,
    moment: Callable[[psutil.Process, Path], bool],
    tmp_path: Path,
) -> None:
    bench = subprocess.Popen(
        [sys.executable, "-m", "knet_deploy", "bench", *WORDS],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    process = psutil.Process(bench.pid)
    try:
        deadline = time.monotonic() + 120
        while not moment(process, tmp_path):
            assert bench.poll() is None, bench.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        started = process.children(recursive=True)
        os.killpg(bench.pid, number)  # as a terminal's Ctrl-C and timeout(1) do
        out, err = bench.communicate(timeout=60)
    finally:
        bench.kill()
        bench.wait()
    assert (bench.returncode, out) == (code, "")
    assert set(err.splitlines()) <= {"opening onnxruntime-cpu"}
    assert not psutil.wait_procs(started, timeout=60)[1]
    assert not list(tmp_path.glob("knet-*"))
