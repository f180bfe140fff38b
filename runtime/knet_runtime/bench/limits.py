"""How fast this machine can be at best: its matrix products and its copies, measured."""

from __future__ import annotations

from time import perf_counter

import msgspec
import numpy as np

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
        target = np.zeros_like(source)
        products, copies = [], []
        for _ in range(_ATTEMPTS):
            started = perf_counter()
            np.matmul(left, right, out=out)
            products.append(perf_counter() - started)
            started = perf_counter()
            np.copyto(target, source)
            copies.append(perf_counter() - started)
        return Limits(matmul=_SIDE**3 / min(products), copy=2 * source.nbytes / min(copies))
