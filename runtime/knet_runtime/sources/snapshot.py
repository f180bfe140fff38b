"""The one image at an HTTP address, such as a camera's snapshot: read once, or again and again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from fractions import Fraction
from time import monotonic, time

from knet_runtime.errors import SourceError
from knet_runtime.sources.base import SourceInfo, SourceLost, SourceOptions, SourceStatus
from knet_runtime.sources.container import NetworkConnector
from knet_runtime.sources.images import decode_image
from knet_runtime.sources.live import Connection, Timeline
from knet_runtime.types import Closeable, Frame, Rgb

_TICK = Fraction(1, 1000)


class SnapshotSource(Closeable):
    """One frame of the image at an address; a context manager.

    With ``options.every_seconds`` it is a live source instead: the image is fetched again each so
    many seconds, and where that fails, as a lost stream is opened again (``Connection``). Times
    are those of the arrivals. ``image`` is what the address gives, if that is known already.

    Raises SourceError when the first image cannot be had.
    """

    def __init__(
        self, link: NetworkConnector, options: SourceOptions, image: Rgb | None = None
    ) -> None:
        self._link = link
        self._options = options
        self._stop = threading.Event()
        self._connection = Connection(link.name, link.hint, options.max_downtime, self._stop)
        first = self._first() if image is None else image
        hw, period = first.shape[:2], options.every_seconds
        if period is None:
            self.info = SourceInfo("image", hw, None, 1)
            self._frames: Iterator[Frame] = iter([Frame(first, 0, None, link.stem)])
        else:
            rate = 1 / (Fraction(period).limit_denominator(1000) or _TICK)
            self.info = SourceInfo("stream", hw, rate / options.every, None, _TICK)
            self._frames = self._poll(first, period)

    @property
    def status(self) -> SourceStatus:
        """How it fares just now; from any thread."""
        return self._connection.status

    def __iter__(self) -> Iterator[Frame]:
        return self._frames

    def stop(self) -> None:
        """End the iteration, from any thread: at once, unless an image is just being fetched."""
        self._stop.set()

    def close(self) -> None:
        """End the frames; nothing is open between them."""
        self._stop.set()
        self._frames = iter(())

    def _poll(self, image: Rgb, period: float) -> Iterator[Frame]:
        timeline, number, due = Timeline(_TICK), 0, monotonic()
        while not self._stop.is_set():
            placed = timeline.place(None, self._connection.arrived())
            index, left_over = divmod(number, self._options.every)
            if not left_over:
                yield Frame(image, index, placed, f"{index:06d}", wall=time())
            number += 1
            due = max(due + period, monotonic())
            if self._stop.wait(due - monotonic()):
                return
            fetched = self._again(number)
            if fetched is None:
                return
            image = fetched

    def _first(self) -> Rgb:
        try:
            return self._fetch()
        except SourceLost as error:
            lost = error
        hint = "leave every_seconds out to read a stream" if lost.foreign else self._link.hint
        raise SourceError(f"{self._link.name}: {lost.reason}; {hint}")

    def _again(self, number: int) -> Rgb | None:
        """The image, after as many tries as it takes; None when it is stopped."""
        while True:
            try:
                return self._fetch()
            except SourceLost as error:
                lost = error
            self._connection.broke(lost.reason, number)
            if not self._connection.wait(lost):
                return None

    def _fetch(self) -> Rgb:
        data = self._link.fetch()
        try:
            return decode_image(data, self._link.name)
        except SourceError as error:
            raise SourceLost("what comes is no whole image") from error
