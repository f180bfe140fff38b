"""What this machine has: how many cores may be used, the processor, and the NVIDIA GPU as far as
plans depend on it."""

from __future__ import annotations

import ctypes
import math
import os
import platform
from pathlib import Path

import msgspec

DRIVER_LIBRARY = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
_MODULE_VERSION = Path("/sys/module/nvidia/version")
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


def cpu_budget() -> int:
    """How many CPU cores this process may use: its affinity mask, less a container's quota.

    Engines count the machine's cores instead; in a container held to two of 64 they would run 64
    threads that take turns.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        pass
    return max(cores, 1)


def processor_name() -> str:
    """The processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


class Gpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A GPU's name, its architecture as "sm86", and its driver's version."""

    name: str
    sm: str
    driver: str


def this_gpu() -> Gpu | None:
    """The first NVIDIA GPU of this machine, as its driver describes it; None without either."""
    try:
        driver = ctypes.CDLL(DRIVER_LIBRARY)
    except OSError:
        return None
    name = ctypes.create_string_buffer(256)
    device, version, major, minor = (ctypes.c_int() for _ in range(4))
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
        or driver.cuDriverGetVersion(ctypes.byref(version))
    )
    if failed:
        return None
    cuda = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    try:
        text = f"{_MODULE_VERSION.read_text().strip()} ({cuda})"
    except OSError:  # Windows, and some Jetsons
        text = cuda
    return Gpu(name.value.decode(errors="replace"), f"sm{major.value}{minor.value}", text)


def gpu_name() -> str | None:
    """The first NVIDIA GPU's name, or None without a driver or a GPU."""
    gpu = this_gpu()
    return None if gpu is None else gpu.name
