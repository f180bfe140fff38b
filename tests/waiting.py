"""Waiting in tests for what other threads and processes do."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic, sleep


def wait_until(condition: Callable[[], object], what: str = "", seconds: float = 20) -> None:
    """Return as soon as ``condition`` holds; fail when it has not after so long."""
    end = monotonic() + seconds
    while not condition():
        assert monotonic() < end, f"not within {seconds:g} s: {what or 'what was waited for'}"
        sleep(0.01)
