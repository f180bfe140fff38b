"""How the C library hands out large tensors, which decides the speed of training on a CPU."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD = -1  # from <malloc.h>
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Let glibc reuse large blocks instead of returning them to the kernel; True where it could.

    By default glibc maps every large tensor afresh and unmaps it when it is freed. The kernel then
    clears all its pages again at every step, which took half of a training step's time. The price
    is that the process keeps its peak of memory until it ends. Does nothing without glibc.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    # 2³¹ - 1 is the largest int; glibc compares the free top of the heap, 2 GiB, against it.
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
