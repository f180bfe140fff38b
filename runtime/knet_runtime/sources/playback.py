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
    source = open_file()
    if options.loop:
        source = LoopedSource(source, open_file)
    if options.realtime:
        try:
            source = PacedSource(source, name)
        except BaseException:
            source.close()
            raise
    return source


class LoopedSource(Closeable):
    """A file that begins anew at its end, until it is stopped; a context manager.

    ``source`` is the file, which it takes over, and ``open_file`` opens it again: each time what is
    there then. Indices and times go on rising, the first frame of a round follows the last one of
    the round before by a frame's time. Frames of an image or a folder are called as they are, and
    in later rounds with its number behind that ("a.2"), so that all names differ. Each round is a
    scene of its own. Raises SourceError while iterating when the file is damaged, or cannot be
    opened any more.
    """

    def __init__(self, source: Source, open_file: Callable[[], Source]) -> None:
        self._source = source
        self._open = open_file
        self._stop = threading.Event()
        self._stills = source.info.kind != "video"
        kind = "images" if self._stills else source.info.kind
        self.info = replace(source.info, kind=kind, frames=None, loops=True)
        self.status = source.status
        self._frames = self._play()

    def __iter__(self) -> Iterator[Frame]:
        return self._frames

    def stop(self) -> None:
        """End the iteration, from any thread."""
        self._stop.set()
        self._source.stop()

    def close(self) -> None:
        """Let go of the file; a second call does nothing."""
        self._stop.set()
        self._frames = iter(())
        self._source.close()

    def _play(self) -> Iterator[Frame]:
        index, offset, mark = 0, Fraction(0), "."
        names: list[str] = []
        for scene in count():
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
                yield replace(frame, index=index, pts=pts, name=name, scene=scene)
                index += 1
            if first is not None and last is not None:
                offset += last - first + self._period()
            while scene == 0 and any(re.search(rf"{re.escape(mark)}\d+$", name) for name in names):
                mark += "."  # some image is called like those of a later round
            self._source.close()
            if self._stop.is_set():
                return
            self._source = self._open()
            if self._stop.is_set():  # it may have come to the one before
                return

    def _period(self) -> Fraction:
        """How long a frame is shown, in whole ticks."""
        tick = self.info.time_base or Fraction(1)
        rate = self.info.rate
        return max(1, round(1 / rate / tick)) * tick if rate else tick


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


class PacedSource(Closeable):
    """Frames of ``source``, which it takes over, when they are due (``Pace``); a context manager.

    Whoever is slower gets every frame all the same, as soon as it asks. Raises ConfigError when
    they state no times; ``name`` is how it calls them.
    """

    def __init__(self, source: Source, name: str) -> None:
        self._source = source
        self.info = source.info
        self.status = source.status
        self._stop = threading.Event()
        frames = iter(source)
        first = next(frames, None)
        if first is not None and first.pts is None:
            raise ConfigError(
                f"{name}: its frames state no times, which realtime goes by: leave it out, or make "
                "an MP4 of them"
            )
        self._frames = self._play(frames if first is None else chain([first], frames))

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

    def _play(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        pace = Pace()
        for frame in frames:
            if frame.pts is not None and self._stop.wait(pace.wait(float(frame.pts), monotonic())):
                return
            yield frame
