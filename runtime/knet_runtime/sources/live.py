"""A camera or a network stream as a source of frames that outlives its connection.

Its times form a line that never runs back (``Timeline``); frames that a playlist brings in bursts
come at their pace (``PlaylistClock``). Both count by the monotonic clock, so that setting the wall
clock changes nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Iterator
from errno import EIO
from fractions import Fraction
from itertools import chain
from pathlib import Path
from time import monotonic, time
from typing import Literal

import av
from av.container import InputContainer

from knet_runtime.errors import SourceError
from knet_runtime.sources.base import Backoff, SourceInfo, SourceLost, SourceOptions, SourceStatus
from knet_runtime.sources.container import Connector, NetworkConnector, close_input, lost_by
from knet_runtime.sources.decoder import READ_ERRORS, Decoder
from knet_runtime.types import Closeable, Frame

_log = logging.getLogger(__name__)

_FINE_TICK = Fraction(1, 90_000)
_SLACK = 2.0  # seconds by which a time may run ahead of the clock before it counts as a jump
# Packets may come for so many read timeouts without a frame: cameras send a key frame every
# ten seconds and more.
_FRAME_PATIENCE = 10
_PLAYLIST_SECONDS = 60


class Timeline:
    """Puts the times of one connection after another on one line that counts from 0.

    Every time is later than the last and a whole number of ``tick`` seconds. Within a connection
    they keep the stream's own distances. After a reconnect, for a frame without a time, and when
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
        """The time of a frame that the stream says is of ``time`` and came at ``now`` (s)."""
        last = self._last
        due = Fraction(0) if last is None else last + Fraction(now - self._arrived)
        if time is None:
            placed = due
        else:
            placed = due if self._offset is None else time + self._offset
            if last is not None and not last < placed <= due + Fraction(_SLACK):  # it jumps
                placed = due
            self._offset = placed - time
        placed = round(placed / self._tick) * self._tick
        if last is not None and placed <= last:
            placed = last + self._tick
        self._last, self._arrived = placed, now
        return placed


class PlaylistClock:
    """When the frames of a playlist are due: it brings seconds of them at once."""

    def __init__(self) -> None:
        self._begin: float | None = None

    def wait(self, time: Fraction | None, now: float) -> float:
        """Seconds until the frame of ``time`` is due. One that is late is due now, and so is one
        after a gap: the next ones are counted from it."""
        if time is None:
            return 0.0
        if self._begin is not None:
            wait = self._begin + float(time) - now
            if 0 <= wait <= _SLACK:
                return wait
        self._begin = now - float(time)
        return 0.0


class Connection:
    """Whether the frames of a live source come, and if not, since when and when to try again.

    ``hint`` is what to look at when they do not; after ``limit`` seconds without one it is over.
    """

    def __init__(self, name: str, hint: str, limit: float | None, stop: threading.Event) -> None:
        self._name, self._hint, self._limit, self._stop = name, hint, limit, stop
        self._connected = True
        self._reconnects = 0
        self._since = monotonic()  # the first frame of a connection
        self._backoff = Backoff()
        self.seen = self._since
        """When the last frame was there."""

    @property
    def status(self) -> SourceStatus:
        """How it fares just now; from any thread."""
        connected = self._connected
        down = 0.0 if connected else monotonic() - self.seen
        return SourceStatus(connected, self._reconnects, down)

    @property
    def is_over(self) -> bool:
        return self._limit is not None and monotonic() - self.seen >= self._limit

    def arrived(self) -> float:
        """Note that there is a frame; the moment on the monotonic clock."""
        now = monotonic()
        if not self._connected:
            self._connected = True
            self._reconnects += 1
            self._since = now
            _log.warning("%s: back after %.1f s", self._name, now - self.seen)
        self.seen = now
        return now

    def broke(self, reason: str, frames: int) -> None:
        """Note that there are no frames any more, after so many."""
        if self._connected:
            self._connected = False
            self._backoff.lasted(self.seen - self._since)
            _log.warning(
                "%s: lost after %d frames (%s); trying to reconnect", self._name, frames, reason
            )

    def wait(self, lost: SourceLost) -> bool:
        """Wait before it is tried again; False when it is stopped. Raises SourceError when it is
        over."""
        wait = self._backoff.delay(refused=lost.refused)
        if self._limit is not None:
            wait = max(0.0, min(wait, self.seen + self._limit - monotonic()))
        _log.info("%s: trying again in %.2f s (%s)", self._name, wait, lost.reason)
        if self._stop.wait(wait):
            return False
        if self.is_over:
            raise SourceError(
                f"{self._name}: no frame for {monotonic() - self.seen:.0f} s ({lost.reason}); "
                f"{self._hint}"
            )
        return True


class LiveSource(Closeable):
    """Frames as they arrive, for as long as it is wanted; a context manager.

    When the connection ends, breaks or goes silent, it is opened again after an ever longer wait
    (``Backoff``), until ``options.max_downtime`` has passed without a frame: then SourceError.
    In the meantime there are no frames; ``status`` says so. Times go on across reconnects
    (``Timeline``), and so does ``index``. A frame is handed on when it arrives and nothing is
    kept: whoever is slow gets what FFmpeg has buffered. ``Frame.wall`` is when it was decoded.

    Takes over ``container``, which ``link`` opened; ``path`` is that of a device. ``info`` is what
    the first connection showed. Raises SourceError when it holds no video, or ends before the first
    frame: only what has worked once is tried again.
    """

    def __init__(
        self,
        link: Connector,
        container: InputContainer,
        kind: Literal["camera", "stream"],
        options: SourceOptions,
        path: Path | None = None,
    ) -> None:
        self._link = link
        self._options = options
        self._stop = threading.Event()
        self._closed = False
        self._connection = Connection(link.name, link.hint, options.max_downtime, self._stop)
        self._lost = SourceLost("it was stopped")
        # The stream's time of a playlist's last frame: now, and when it was opened.
        self._played: Fraction | None = None
        self._already: Fraction | None = None
        self._container: InputContainer | None = container
        try:
            self._decoder = Decoder(container, link.name, live=True)
            base = self._decoder.stream.time_base or _FINE_TICK
            self._timeline = Timeline(base)
            self._reading = self._read()
            first = next(self._reading)  # it waits for one, or raises
            self._frames: Iterator[Frame] = chain([first], self._reading)
            rate = self._decoder.rate(options.every)
            hw, aspect = first.image.shape[:2], self._decoder.sample_aspect
            self.info = SourceInfo(kind, hw, rate, None, base, path, aspect)
        except BaseException:
            self._disconnect()
            raise

    @property
    def status(self) -> SourceStatus:
        """How it fares just now; from any thread."""
        return self._connection.status

    def __iter__(self) -> Iterator[Frame]:
        return self._frames

    def stop(self) -> None:
        """End the iteration, from any thread: at once while it waits to reconnect, else at the
        next packet or when a timeout is over."""
        self._stop.set()

    def close(self) -> None:
        """Let go of the connection, from the thread that iterates or after it; twice is fine."""
        if self._closed:
            return
        self._closed = True
        self._stop.set()
        self._reading.close()
        self._frames = iter(())
        self._disconnect()
        del self._decoder  # the decoder's threads live as long as this

    def _read(self) -> Generator[Frame, None, None]:
        every, index, number = self._options.every, 0, 0
        while not self._stop.is_set():
            for decoded in self._decoded_frames():
                now = self._connection.arrived()
                placed = self._timeline.place(self._decoder.time_of(decoded), now)
                if number % every == 0:
                    rgb = self._decoder.rgb(decoded)
                    yield Frame(rgb, index, placed, f"{index:06d}", wall=time())
                    self._connection.seen = monotonic()  # what the taker needed is no silence
                    index += 1
                number += 1
            self._disconnect()
            if index == 0:
                raise SourceError(f"{self._link.name}: {self._lost.reason}; {self._link.hint}")
            if not self._stop.is_set():
                self._reconnect(index)

    def _decoded_frames(self) -> Iterator[av.VideoFrame]:
        """Those of one connection, when they are due, until it is lost (``_lost`` says how) or the
        source is stopped."""
        container = self._container
        assert container is not None  # until it is stopped
        pace = PlaylistClock() if container.format.name == "hls" else None
        self._already = self._played
        packets = container.demux(self._decoder.stream)
        opened = monotonic()
        while not self._stop.is_set():
            try:
                packet = next(packets, None)
            except READ_ERRORS as error:
                # Kept, not raised: an exception would hold the decoder, and FFmpeg's own the
                # address with its password.
                broke = error.errno == EIO
                self._lost = SourceLost("the connection broke") if broke else lost_by(error)
                return
            if packet is None:  # a server that dies looks like one that has finished
                self._lost = SourceLost("the stream ended")
                return
            for decoded in self._decoder.decode(packet) or ():
                if pace is not None:
                    at = self._decoder.time_of(decoded)
                    if self._is_repeated(at):
                        continue
                    if self._stop.wait(pace.wait(at, monotonic())):
                        return
                    self._played = at
                yield decoded
            silent = monotonic() - max(self._connection.seen, opened)
            if silent > _FRAME_PATIENCE * self._options.read_timeout or self._connection.is_over:
                self._lost = SourceLost("what comes cannot be decoded")
                return

    def _is_repeated(self, at: Fraction | None) -> bool:
        """A playlist that has stopped growing begins with its last segments when it is opened
        again: frames that were handed on must not come back as new ones."""
        done = self._already
        return done is not None and at is not None and done - _PLAYLIST_SECONDS <= at <= done

    def _reconnect(self, frames: int) -> None:
        """Try until it is open again or stopped. Raises SourceError after ``max_downtime``."""
        self._connection.broke(self._lost.reason, frames)
        while self._connection.wait(self._lost):
            try:
                self._connect()
                return
            except SourceLost as lost:
                self._lost = lost.with_traceback(None)

    def _connect(self) -> None:
        container = self._link.open()
        try:
            # A live playlist that now states its length has ended; it would begin anew.
            if isinstance(self._link, NetworkConnector) and self._link.is_finite(container):
                raise SourceLost("the stream has ended")
            self._decoder = Decoder(container, self._link.name, live=True)
        except SourceError as error:
            close_input(container)
            raise SourceLost("there is no video in it") from error
        except BaseException:
            close_input(container)
            raise
        self._container = container
        self._timeline.reconnected()

    def _disconnect(self) -> None:
        container, self._container = self._container, None
        if container is not None:
            close_input(container)
