"""A thread of the pipeline."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Worker(threading.Thread):
    """A thread that does not keep the process alive, and whose end can be awaited amid signals.

    ``join`` can not: interrupted by an exception of a signal handler, Python before 3.13 takes the
    thread that goes on for one that has ended.
    """

    def __init__(self, name: str, target: Callable[[], None]) -> None:
        super().__init__(name=f"knet-{name}", target=target, daemon=True)
        self._over = threading.Event()

    def run(self) -> None:
        """Called by ``start``."""
        try:
            super().run()
        finally:
            self._over.set()

    @property
    def working(self) -> bool:
        """Whether it has begun and not come to its end."""
        return self.ident is not None and not self._over.is_set()

    def wait(self, seconds: float) -> None:
        """Return when it has come to its end, or after so long."""
        self._over.wait(seconds)
