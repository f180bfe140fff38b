"""The machine that numbers are made on: what it is, its limits, and the energy that it uses.

Without ``Machine`` nobody can compare the numbers with their own; ``LimitsProbe`` measures how fast
matrix products and copies can be at best; meters read the energy where the device tells it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec
import numpy as np

from knet_runtime.engines.hardware import Gpu, processor_name, this_gpu

_PACKAGES = """
knet-deploy numpy opencv-python-headless av uvicorn onnxruntime onnxruntime-gpu openvino tensorrt
tensorrt-rtx-cu13-bindings torch torchvision timm onnx onnxscript
"""
_FREQUENCY = Path("/sys/devices/system/cpu/cpu0/cpufreq")


class Machine(msgspec.Struct, frozen=True):
    """Processor, clocks and versions; None is what this machine does not tell.

    ``governor`` is the rule by which the first core's clock is set, ``clock_mhz`` that clock now
    and ``max_clock_mhz`` at most; ``load`` is how many processes wanted to run over the last
    minute: above zero others compute here too; ``commit`` is the source checkout's.
    """

    processor: str
    cores: int
    system: str
    python: str
    packages: dict[str, str]
    governor: str | None
    clock_mhz: float | None
    max_clock_mhz: float | None
    load: float | None
    memory_bytes: int | None
    gpu: Gpu | None
    commit: str | None


def this_machine(cores: int) -> Machine:
    """What stands here now; ``cores`` is how many are used."""
    fastest = _text(_FREQUENCY / "scaling_max_freq")
    load = _text(Path("/proc/loadavg"))
    memory = _number(Path("/proc/meminfo"), "MemTotal")
    return Machine(
        processor=processor_name(),
        cores=cores,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        packages={name: version for name in _PACKAGES.split() if (version := _version(name))},
        governor=_text(_FREQUENCY / "scaling_governor"),
        clock_mhz=_number(Path("/proc/cpuinfo"), "cpu MHz"),
        max_clock_mhz=int(fastest) / 1000 if fastest else None,
        load=float(load.split()[0]) if load else None,
        memory_bytes=None if memory is None else 1024 * int(memory),
        gpu=this_gpu(),
        commit=_commit(Path(__file__).resolve().parent),
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def _number(path: Path, name: str) -> float | None:
    """The number of the first line "NAME: NUMBER ...", as files of /proc have them."""
    lines = (_text(path) or "").splitlines()
    return next(
        (float(line.partition(":")[2].split()[0]) for line in lines if line.startswith(name)), None
    )


def _commit(folder: Path) -> str | None:
    """The commit of the checkout that ``folder`` is a part of, "-dirty" behind it where files were
    changed; None where it is not."""
    git = ["git", "-C", str(folder)]
    try:
        done = subprocess.run(
            [*git, "describe", "--always", "--dirty"], capture_output=True, text=True
        )
        # Installed into somebody's repository it would name theirs.
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", "."], capture_output=True)
    except OSError:  # no git
        return None
    return None if done.returncode or tracked.returncode else done.stdout.strip() or None


_SIDE = 1024
_COPY_BYTES = 256 << 20  # well beyond any cache
_ATTEMPTS = 7


class Limits(msgspec.Struct, frozen=True):
    """``matmul`` is float32 multiply-adds per second of NumPy's matrix product, ``copy`` the bytes
    per second that are read and written while a large array is copied: each the best of several."""

    matmul: float
    copy: float

    def best(self, other: Limits) -> Limits:
        """The more of each: whatever disturbs a measurement makes it less."""
        return Limits(max(self.matmul, other.matmul), max(self.copy, other.copy))


class LimitsProbe:
    """Measures, in a process that has the thread count which it is about."""

    def measure(self) -> Limits:
        """Takes about a second."""
        random = np.random.default_rng(0)
        left = random.random((_SIDE, _SIDE), np.float32)
        right = random.random((_SIDE, _SIDE), np.float32)
        out = np.empty_like(left)
        source = np.ones(_COPY_BYTES // 8, np.float64)
        copy = np.zeros_like(source)
        products, copies = [], []
        for _ in range(_ATTEMPTS):
            started = perf_counter()
            np.matmul(left, right, out=out)
            products.append(perf_counter() - started)
            started = perf_counter()
            np.copyto(copy, source)
            copies.append(perf_counter() - started)
        return Limits(matmul=_SIDE**3 / min(products), copy=2 * source.nbytes / min(copies))


_POWERCAP = Path("/sys/class/powercap")
_NVML = "nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1"

Meter = Callable[[], float | None]
"""Joules used since some moment, of which only differences mean anything; None: not to be had."""


def processor_meter(powercap: Path = _POWERCAP) -> Meter | None:
    """All processor packages together (RAPL); None where it is missing or only root may read it."""
    # Others lie within a package, or are the whole board, which holds the packages.
    counters = [
        _Counter(zone)
        for zone in sorted(powercap.glob("intel-rapl:*"))
        if (_text(zone / "name") or "").startswith("package")
    ]

    def joules() -> float | None:
        try:
            return sum(counter.joules() for counter in counters)
        except (OSError, ValueError):
            return None

    return joules if counters and joules() is not None else None


class _Counter:
    """A RAPL counter, which begins at zero again when it is full."""

    def __init__(self, zone: Path) -> None:
        self._zone = zone
        self._last = self._carried = 0

    def joules(self) -> float:
        now = int((self._zone / "energy_uj").read_text())
        if now < self._last:
            self._carried += int((self._zone / "max_energy_range_uj").read_text())
        self._last = now
        return (now + self._carried) / 1e6


def gpu_meter(nvml: str = _NVML) -> Meter | None:
    """The first NVIDIA GPU; None without one, or before Volta, which does not count."""
    device = _first_gpu(nvml)
    if device is None:
        return None
    library, handle = device

    def joules() -> float | None:
        millijoules = ctypes.c_ulonglong()
        if library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
            return None
        return millijoules.value / 1000

    return joules if joules() is not None else None


class _Memory(ctypes.Structure):
    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


def gpu_memory_used(nvml: str = _NVML) -> int | None:
    """Bytes of the first NVIDIA GPU's memory that are in use, by anybody; None without one."""
    device = _first_gpu(nvml)
    if device is None:
        return None
    library, handle = device
    memory = _Memory()
    failed = library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    return None if failed else int(memory.used)


def _first_gpu(nvml: str) -> tuple[Any, ctypes.c_void_p] | None:
    try:
        library = ctypes.CDLL(nvml)
    except OSError:
        return None
    if not hasattr(library, "nvmlDeviceGetTotalEnergyConsumption"):  # older than 2018
        return None
    handle = ctypes.c_void_p()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)):
        return None
    return library, handle
