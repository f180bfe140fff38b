"""The energy that the processor or the GPU has used, where the device tells."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

_POWERCAP = Path("/sys/class/powercap")
_NVML = "nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1"

Meter = Callable[[], float | None]
"""Joules used since some moment, of which only differences mean anything; None: not to be had."""


def processor_meter(powercap: Path = _POWERCAP) -> Meter | None:
    """All processor packages together (RAPL); None where it is missing or only root may read it."""
    # Others lie within a package, or are the whole board, which holds the packages.
    zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if _is_package(zone)]
    counters = [_Counter(zone) for zone in zones]

    def joules() -> float | None:
        try:
            return sum(counter.joules() for counter in counters)
        except (OSError, ValueError):
            return None

    return joules if counters and joules() is not None else None


def _is_package(zone: Path) -> bool:
    try:
        return (zone / "name").read_text().startswith("package")
    except OSError:
        return False


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
