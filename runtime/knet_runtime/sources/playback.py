"""Files played as if they were live: again and again, and at the pace of their times."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import chain, count
from time import monotonic

from knet_runtime.errors import ConfigError
from knet_runtime.sources.base import Source, SourceOptions
from knet_runtime.types import Closeable, Frame

_BEHIND = 1.0  # seconds


def play(open_file: Callable[[], Source], name: str, options: SourceOptions) -> Source:
    """What ``open_file`` opens, played as ``options.loop`` and ``options.realtime`` ask for.

    Raises what that raises, and ConfigError when there are no times to keep to.
    """
    if options.loop or options.realtime:
        return PlayedSource(open_file, name, options)
    return open_file()


class PlayedSource(Closeable):
    """A file that begins anew at its end, until it is stopped (``options.loop``), or whose frames
    come when they are due and no earlier (``options.realtime``), or both; a context manager.

    ``open_file`` opens it, for each round anew: what is there then. Indices and times go on rising,
    the first frame of a round follows the last one of the round before by a frame's time. Frames of
    an image or a folder are called as they are, and in later rounds with its number behind that
    ("a.2"), so that all names differ. Each round is a scene of its own.

    Whoever is slower than the times gets every frame all the same, as soon as it asks (``Pace``).

    Raises ConfigError when frames that are to come when they are due state no times; ``name`` is
    how it calls the file. Raises SourceError while iterating when the file is damaged, or cannot be
    opened any more.
    """

    def __init__(self, open_file: Callable[[], Source], name: str, options: SourceOptions) -> None:
        self._open = open_file
        self._stop = threading.Event()
        self._source = source = open_file()
        self._stills = source.info.kind in ("image", "images")
        self.info, self.status = source.info, source.status
        self._frames = iter(source)
        if options.loop:
            kind = "images" if self._stills else source.info.kind
            self.info = replace(source.info, kind=kind, frames=None, loops=True)
            self._frames = self._rounds()
        if options.realtime:
            try:
                first = next(self._frames, None)
                if first is not None and first.pts is None:
                    raise ConfigError(
                        f"{name}: its frames state no times, which realtime goes by: leave it out, "
                        "or make an MP4 of them"
                    )
            except BaseException:
                self.close()
                raise
            self._frames = self._paced(chain([] if first is None else [first], self._frames))

    def __iter__(self) -> Iterator[Frame]:
        return self._frames

    def stop(self) -> None:
        """End the iteration, from any thread: at once where it waits."""
        self._stop.set()
        self._source.stop()

    def close(self) -> None:
        """Let go of the file; a second call does nothing."""
        self._stop.set()
        self._frames = iter(())
        self._source.close()

    def _rounds(self) -> Iterator[Frame]:
        index, offset, mark = 0, Fraction(0), "."
        names: list[str] = []
        for scene in count():
            began = index
            first: Fraction | None = None
            last: Fraction | None = None
            for frame in self._source:
                if not self._stills:
                    name = f"{index:06d}"
                elif scene == 0:
                    name = frame.name
                    names.append(name)
                else:
                    name = f"{frame.name}{mark}{scene + 1}"
                first, last = frame.pts if first is None else first, frame.pts
                pts = None if frame.pts is None else frame.pts + offset
                ros = None if frame.ros is None else frame.ros.later(offset)
                yield replace(frame, index=index, pts=pts, name=name, ros=ros, scene=scene)
                index += 1
            if first is not None and last is not None:
                offset += last - first + self._period(last - first, index - began)
            while scene == 0 and any(re.search(rf"{re.escape(mark)}\d+$", name) for name in names):
                mark += "."  # some image is called like those of a later round
            self._source.close()
            if self._stop.is_set():
                return
            self._source = self._open()
            if self._stop.is_set():  # it may have come to the one before
                return

    def _period(self, lasted: Fraction, frames: int) -> Fraction:
        """How long a frame of a round is shown, in whole ticks: by the stated rate, or else as long
        as the others are."""
        tick = self.info.time_base or Fraction(1)
        period = 1 / self.info.rate if self.info.rate else lasted / max(1, frames - 1)
        return max(1, round(period / tick)) * tick

    def _paced(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        pace = Pace()
        for frame in frames:
            if frame.pts is not None and self._stop.wait(pace.wait(float(frame.pts), monotonic())):
                return
            yield frame


class Pace:
    """When frames are due that are to come as fast as they are shown, and no faster."""

    def __init__(self) -> None:
        self._begin: float | None = None

    def wait(self, time: float, now: float) -> float:
        """Seconds until the frame of ``time`` is due, counted from the first one. One that is late
        is due now; the next ones are counted from it where it is late by more than a second."""
        if self._begin is None or self._begin + time - now < -_BEHIND:
            self._begin = now - time
        return max(0.0, self._begin + time - now)
