"""Times of a live source: a line of them that never runs back, and the pace of playlists.

Both count by the monotonic clock, so that a wall clock that is set changes nothing.
"""

from __future__ import annotations

from fractions import Fraction

_SLACK = 2.0  # seconds by which a time may run ahead of the clock before it counts as a jump


class Timeline:
    """Puts the times of one connection after another on one line that counts from 0.

    Every time is later than the last and a whole number of ``tick`` seconds. Within a connection
    they keep the stream's own distances. After a reconnect, for a picture without a time, and when
    the stream's clock jumps, the distance is what passed between the arrivals.
    """

    def __init__(self, tick: Fraction) -> None:
        self._tick = tick
        self._last: Fraction | None = None
        self._arrived = 0.0
        self._offset: Fraction | None = None

    def reconnected(self) -> None:
        """The times to come have nothing to do with those before."""
        self._offset = None

    def place(self, time: Fraction | None, now: float) -> Fraction:
        """The time of a picture that the stream says is of ``time`` and came at ``now`` (s)."""
        last = self._last
        due = Fraction(0) if last is None else last + Fraction(now - self._arrived)
        if time is None:
            placed = due
        else:
            if self._offset is None or self._jumps(time + self._offset, due):
                self._offset = due - time
            placed = time + self._offset
        placed = round(placed / self._tick) * self._tick
        if last is not None and placed <= last:
            placed = last + self._tick
        self._last, self._arrived = placed, now
        return placed

    def _jumps(self, placed: Fraction, due: Fraction) -> bool:
        return self._last is not None and not self._last < placed <= due + Fraction(_SLACK)


class Pace:
    """When the pictures of a playlist are due: it brings seconds of them at once."""

    def __init__(self) -> None:
        self._begin: float | None = None

    def wait(self, time: Fraction | None, now: float) -> float:
        """Seconds until the picture of ``time`` is due. One that is late is due now, and so is one
        after a gap: the next ones are counted from it."""
        if time is None:
            return 0.0
        if self._begin is not None:
            wait = self._begin + float(time) - now
            if 0 <= wait <= _SLACK:
                return wait
        self._begin = now - float(time)
        return 0.0
