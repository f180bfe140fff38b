from __future__ import annotations

import ctypes
import os
from pathlib import Path

from knet_runtime.engines import hardware as machine
from knet_runtime.engines.hardware import cpu_budget, gpu_name, processor_name


def test_threads_are_no_more_than_this_process_may_use(monkeypatch):
    assert 1 <= cpu_budget() <= (os.cpu_count() or 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    read_text = Path.read_text
    for quota, threads in (("150000 100000", 2), ("max 100000", 64), ("1000 100000", 1)):

        def read(self: Path, quota: str = quota) -> str:
            return quota if self.name == "cpu.max" else read_text(self)

        monkeypatch.setattr(Path, "read_text", read)
        assert cpu_budget() == threads


def test_processor_has_a_name():
    assert processor_name().strip()


def test_machine_without_a_driver_has_no_gpu(monkeypatch):
    monkeypatch.setattr(machine, "DRIVER_LIBRARY", "libno-such-driver.so.1")
    assert gpu_name() is None


def test_driver_that_finds_no_gpu_is_no_gpu(monkeypatch):
    class Driver:
        def cuInit(self, flags: int) -> int:  # noqa: N802 (the driver's own name)
            return 100  # CUDA_ERROR_NO_DEVICE

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Driver())
    assert gpu_name() is None
