"""When each frame of an output video is shown."""

from __future__ import annotations

from fractions import Fraction
from time import monotonic

from knet_runtime.frames import Frame, SourceInfo

_SLIDESHOW_RATE = Fraction(2)
_DEFAULT_RATE = Fraction(30)
_FINEST_TICK = Fraction(1, 1_000_000_000)  # MP4 counts ticks per second in 31 bits


class FrameClock:
    """Times of frames as ever later whole ticks from 0, which is what a video takes.

    ``tick`` is their unit in seconds; by default the source's, where that is one that fits.
    """

    def __init__(self, info: SourceInfo, tick: Fraction | None = None) -> None:
        base = tick or info.time_base
        self._tick = base if base is not None and _FINEST_TICK <= base <= 1 else None
        still = info.kind in ("image", "images")
        self.rate = info.rate or (_SLIDESHOW_RATE if still else _DEFAULT_RATE)
        self._last: int | None = None
        self._offset = 0
        self._fresh = (0, 0.0)  # ticks of the last fresh frame, and when it came here
        self.retimed = 0

    def tick(self, first: Fraction | None) -> Fraction:
        """The unit in seconds, chosen once, with the first frame's time in hand."""
        if self._tick is None:
            self._tick = 1 / self.rate if first is None else Fraction(1, 90_000)
        return self._tick

    def ticks(self, frame: Frame) -> int:
        """The time of ``frame``, later than that of the one before."""
        now, arrived = self._ticks(frame), monotonic()
        if not frame.stale:
            self._fresh = (now, arrived)
        self._last = now
        return now

    def _ticks(self, frame: Frame) -> int:
        tick = self.tick(frame.pts)
        last = self._last
        period = max(1, round(1 / self.rate / tick))
        if last is not None and frame.stale:
            # It has the time of the picture that it repeats; it is shown now.
            since = Fraction(monotonic() - self._fresh[1])
            return max(last + 1, self._fresh[0] + round(since / tick))
        if frame.pts is None:
            now = 0 if last is None else last + period
        else:
            if last is None:
                self._offset = -round(frame.pts / tick)
            now = round(frame.pts / tick) + self._offset
        if last is not None and now <= last:
            self.retimed += 1
            if (last - now) * tick > 1:  # the source's clock began anew: go on from here
                self._offset += last + period - now
                return last + period
            return last + 1
        return now
