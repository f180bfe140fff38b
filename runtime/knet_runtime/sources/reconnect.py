"""How long to wait before a source that was lost is tried again."""

from __future__ import annotations

import random

_FIRST, _LONGEST = 0.25, 5.0
_REFUSED = 60.0


class SourceLost(Exception):
    """A live source cannot be opened or read just now.

    ``reason`` may be shown: it holds no address and no password. ``refused`` says that the server
    does not take the credentials.
    """

    def __init__(self, reason: str, *, refused: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.refused = refused


class Backoff:
    """Seconds before each next try: 0.25, doubled up to 5, of which a random half is taken off so
    that many boxes do not come back in one moment.

    A server that refuses the credentials is asked once a minute: many lock the account otherwise.
    """

    def __init__(self) -> None:
        self._next = _FIRST

    def delay(self, *, refused: bool = False) -> float:
        """Seconds to wait now."""
        if refused:
            return _REFUSED
        delay = self._next
        self._next = min(2 * delay, _LONGEST)
        return delay * random.uniform(0.5, 1)

    def lasted(self, seconds: float) -> None:
        """Frames came for so long: after more than 5 s the next loss begins at 0.25 again."""
        if seconds > _LONGEST:
            self._next = _FIRST
