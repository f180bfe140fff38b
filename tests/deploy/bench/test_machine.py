"""Meters of energy: what they count, over their counters' ends, and where there are none."""

from __future__ import annotations

import ctypes.util
import shutil
import subprocess
from pathlib import Path

import pytest

from knet_deploy.bench.machine import gpu_memory_used, gpu_meter, processor_meter

NVML = """
static unsigned long long energy;
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    *device = &energy;
    return index;
}
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *millijoules) {
    *millijoules = *(unsigned long long *)device += 5000000000ULL;
    return ANSWER;
}
struct memory { unsigned long long total, free, used; };
int nvmlDeviceGetMemoryInfo(void *device, struct memory *memory) {
    memory->total = 9, memory->free = 2, memory->used = 7000000000ULL;
    return ANSWER;
}
"""


def zone(powercap: Path, number: str, name: str) -> Path:
    folder = powercap / f"intel-rapl:{number}"
    folder.mkdir()
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text("9000000\n")
    (folder / "max_energy_range_uj").write_text("10000000\n")
    return folder


def test_all_packages_are_counted_once_and_over_their_counters_end(tmp_path: Path) -> None:
    first, second = (zone(tmp_path, f"{index}", f"package-{index}") for index in range(2))
    zone(tmp_path, "0:0", "core")  # within the first
    zone(tmp_path, "2", "psys")  # the board, with both
    meter = processor_meter(tmp_path)
    assert meter is not None
    assert meter() == 18.0
    (first / "energy_uj").write_text("500000\n")
    assert meter() == 19.5
    (first / "energy_uj").write_text("400000\n")
    (second / "energy_uj").write_text("9100000\n")
    assert meter() == pytest.approx(29.5)


def test_a_counter_that_cannot_be_read_is_no_counter(tmp_path: Path) -> None:
    assert processor_meter(tmp_path / "absent") is None
    assert processor_meter(tmp_path) is None
    counter = zone(tmp_path, "0", "package-0") / "energy_uj"
    meter = processor_meter(tmp_path)
    assert meter is not None
    counter.unlink()
    counter.mkdir()  # root may read any file, but no folder
    assert meter() is None
    assert processor_meter(tmp_path) is None
    counter.rmdir()
    counter.write_text("unknown\n")
    assert processor_meter(tmp_path) is None


def library(folder: Path, answer: int) -> str:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    (folder / "nvml.c").write_text(NVML)
    built = folder / f"nvml{answer}.so"
    words = [compiler, "-shared", "-fPIC", f"-DANSWER={answer}", "-o", str(built)]
    subprocess.run([*words, str(folder / "nvml.c")], check=True)
    return str(built)


def test_a_gpu_tells_its_energy_and_its_memory(tmp_path: Path) -> None:
    nvml = library(tmp_path, 0)
    meter = gpu_meter(nvml)
    assert meter is not None
    before, after = meter(), meter()
    assert before is not None
    assert after is not None
    assert after - before == 5_000_000.0
    assert gpu_memory_used(nvml) == 7_000_000_000


def test_a_gpu_that_does_not_tell_has_no_meter(tmp_path: Path) -> None:
    refuses = library(tmp_path, 3)  # not supported
    assert gpu_meter(refuses) is None
    assert gpu_memory_used(refuses) is None
    foreign = ctypes.util.find_library("c")
    for name in ("libno-such-thing.so.1", *([foreign] if foreign else [])):
        assert gpu_meter(name) is None
        assert gpu_memory_used(name) is None
