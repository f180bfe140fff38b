"""The NVIDIA GPU of this machine, as far as an engine that was built for it depends on it."""

from __future__ import annotations

import ctypes
from pathlib import Path

import msgspec

from knet_runtime.backends.machine import DRIVER_LIBRARY, gpu_name

_MODULE_VERSION = Path("/sys/module/nvidia/version")
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


class Gpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A GPU's name, its architecture as "sm86", and its driver's version."""

    name: str
    sm: str
    driver: str


def this_gpu() -> Gpu | None:
    """The first GPU of this machine; None without one or without its driver."""
    name = gpu_name()
    if name is None:
        return None
    driver = ctypes.CDLL(DRIVER_LIBRARY)
    device, version = ctypes.c_int(), ctypes.c_int()
    major, minor = ctypes.c_int(), ctypes.c_int()
    failed = (
        driver.cuDeviceGet(ctypes.byref(device), 0)
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
    return Gpu(name, f"sm{major.value}{minor.value}", text)
