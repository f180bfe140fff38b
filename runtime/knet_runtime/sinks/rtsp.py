"""The sink that pushes the overlay to an RTSP server, and that no server can hold up.

A child process (``rtsp_child``) encodes and sends; here it is fed, watched, and killed if need be.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import subprocess
import sys
import threading
from collections import deque
from fractions import Fraction
from functools import partial
from pathlib import Path
from time import monotonic

import msgspec
import numpy as np

from knet_runtime.errors import ConfigError, OutputError
from knet_runtime.segmentation import Segmentation
from knet_runtime.sinks.encoder import ENCODERS, working_encoder
from knet_runtime.sinks.look import Look, OverlayPainter
from knet_runtime.sinks.overlay import FrameClock
from knet_runtime.sinks.rtsp_child import FAILED, OK, TIME_BYTES, Push
from knet_runtime.sources.base import Backoff, SourceInfo, Transport
from knet_runtime.sources.container import redacted, scheme_of
from knet_runtime.types import Frame, Rgb

_log = logging.getLogger(__name__)

_TICK = Fraction(1, 90_000)  # RTP's
_WAITING = 2  # frames
_LONGEST_PAUSE = 10.0  # seconds between two frames of a file; a longer gap is cut to nothing
_LONGEST_WAIT = 40.0  # seconds that a file may wait: a slow start, a pause and a frozen server
_LINGER = 2.0  # seconds that close() gives to what is waiting
_START_SECONDS = 20.0  # for Python to start on a busy, small machine
_SLICE = 0.1  # seconds between two looks at ``stop``
_GRACE = 0.5  # seconds by which the child may end itself before we do it


class PushLost(Exception):
    """The connection could not be made, or is lost; the text may be shown."""


class PushProcess:
    """Connects when it is entered, and kills the child when it is left; a context manager.

    Nothing waits longer than ``push.patience`` seconds for the server, nor goes on once ``stop``
    is set: PushLost says why it ended.
    """

    def __init__(self, push: Push, stop: threading.Event) -> None:
        self._push = push
        self._stop = stop

    def __enter__(self) -> PushProcess:
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "knet_runtime.sinks.rtsp_child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # FFmpeg's own lines would show the password
                bufsize=0,
            )
        except OSError as error:  # no memory or no processes left: another time, perhaps
            raise PushLost(f"no process can be started: {error.strerror}") from error
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._stdin, self._stdout = self._child.stdin, self._child.stdout
        os.set_blocking(self._stdin.fileno(), False)
        try:
            # Not as an argument: everybody on the machine can read those.
            self._feed(memoryview(msgspec.json.encode(self._push) + b"\n"))
            self._answer(_START_SECONDS + self._push.patience)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end(graceful=kind is None)

    def send(self, image: Rgb, ticks: int) -> None:
        """Push uint8 [H, W, 3] RGB at that time; returns when the server has it. Raises
        PushLost."""
        self._feed(memoryview(ticks.to_bytes(TIME_BYTES, "little", signed=True)))
        self._feed(np.ascontiguousarray(image).data.cast("B"))
        self._answer(self._push.patience + _GRACE)

    def _feed(self, data: memoryview) -> None:
        pipe = self._stdin.fileno()
        deadline = monotonic() + self._push.patience
        while data:
            self._wait(pipe, select.POLLOUT, deadline)
            try:
                data = data[os.write(pipe, data) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                self._answer(_GRACE)  # it says why it has ended, or else that it has

    def _answer(self, seconds: float) -> None:
        pipe = self._stdout.fileno()
        self._wait(pipe, select.POLLIN, monotonic() + seconds)
        answer = os.read(pipe, 1)
        if answer == OK:
            return
        if answer == FAILED:
            raise PushLost(self._stdout.readline().decode("utf-8", "replace").strip())
        raise PushLost(f"the server takes nothing for {self._push.patience:g} s")

    def _wait(self, pipe: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(pipe, event)
        while not poll.poll(1000 * _SLICE):
            if self._stop.is_set():
                raise PushLost("stopped")
            if monotonic() > deadline:
                raise PushLost(f"the server takes nothing for {self._push.patience:g} s")

    def _end(self, *, graceful: bool = False) -> None:
        with contextlib.suppress(OSError):
            self._stdin.close()
        if graceful:
            deadline = monotonic() + self._push.patience
            while not self._stop.is_set() and monotonic() < deadline:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._child.wait(_SLICE)
                    break
        self._child.kill()
        self._child.wait()
        self._stdout.close()


class RtspPush:
    """Pushes each frame under its colours to the RTSP server at ``url``, as H.264.

    A child process encodes and sends; two frames may wait for it. A live source never waits: the
    older frame is dropped and counted. A file is sent at its own speed and waits, while there is a
    connection. A server that takes nothing for ``patience`` seconds costs the child its life. A
    lost connection is made again after a growing pause, for as long as it takes; frames are dropped
    and counted meanwhile.

    ``connected`` says whether there is a connection, ``dropped`` counts the frames that were not
    sent, ``reconnects`` how often a lost connection was made again; they may be read at any time.

    Raises ConfigError for an address that is not RTSP; ``write`` and ``close`` raise OutputError
    when the very first connection fails, later ones are only logged. The address is never shown
    with its password.

        >>> from knet_deploy import RtspPush, open_source
        >>> with open_source("drive.mp4") as source:
        ...     sink = RtspPush("rtsp://user:secret@127.0.0.1:8554/street", source.info)
        ...     sink.close()
        >>> sink.name
        'rtsp://***@127.0.0.1:8554/street'
    """

    path: Path | None = None

    def __init__(
        self,
        url: str,
        info: SourceInfo,
        look: Look = Look(),
        *,
        transport: Transport = "tcp",
        patience: float = 5.0,
    ) -> None:
        if scheme_of(url) not in ("rtsp", "rtsps"):
            raise ConfigError(f"{redacted(url)}: push to an address of rtsp:// or rtsps://")
        self.name = redacted(url)
        self._live = info.live
        self._painter = OverlayPainter(look, steady=True)
        self._clock = FrameClock(info, _TICK)
        rate, tick = self._clock.rate.as_integer_ratio(), _TICK.as_integer_ratio()
        encoder = working_encoder(ENCODERS["h264"], self._painter.size(info.hw))
        self._push = partial(
            Push,
            url,
            transport,
            encoder,
            tick=tick,
            rate=rate,
            aspect=info.sample_aspect.as_integer_ratio(),
            patience=patience,
        )
        self._waiting: deque[tuple[Rgb, int]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._ending = False
        self._stop = threading.Event()
        self.connected = False
        self._lost = False  # whether a connection has failed since the last one worked
        self._failure: str | None = None
        self._pushed = self.dropped = self.reconnects = 0

    def write(self, frame: Frame, result: Segmentation) -> None:
        """Hand over one frame; of a file, wait until there is room for it.

        Raises OutputError when the first connection has failed.
        """
        if self._ending:
            raise ValueError(f"{self.name} is closed")
        image = self._painter.paint(frame, result)
        ticks = self._clock.ticks(frame)
        with self._changed:
            self._raise_failure()
            if self._thread is None:
                hw = image.shape[:2]
                self._thread = threading.Thread(target=self._pump, args=(hw,), name="rtsp-push")
                self._thread.start()
            if not self._live:
                # The child is watched: sooner or later there is room, or the connection is lost.
                self._changed.wait_for(
                    lambda: len(self._waiting) < _WAITING or self._lost, _LONGEST_WAIT
                )
            if len(self._waiting) == _WAITING:
                self._waiting.popleft()
                self.dropped += 1
            self._waiting.append((image, ticks))
            self._changed.notify_all()

    def close(self, *, complete: bool = True) -> None:
        """Send what is waiting, for two seconds at most, and end the connection.

        Raises OutputError when there never was one.
        """
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        thread, self._thread = self._thread, None
        if thread is None:
            return
        thread.join(_LINGER)
        self._stop.set()
        thread.join()
        if self.dropped:
            _log.warning("%s: %d frames pushed, %d dropped", self.name, self._pushed, self.dropped)
        with self._changed:
            self._raise_failure()

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise OutputError(
                f"{self.name}: {failure}; see that the server runs, takes pushed streams at this "
                "address, and knows the user and password"
            )

    def _pump(self, hw: tuple[int, int]) -> None:
        push, backoff, worked = self._push(hw=hw), Backoff(), False
        while not self._over():
            began = monotonic()
            try:
                with PushProcess(push, self._stop) as process:
                    if worked:
                        self.reconnects += 1
                        _log.warning("%s: connected again", self.name)
                    self._mark(connected=True)
                    worked, began = True, monotonic()
                    self._send_all(process)
            except PushLost as error:
                backoff.lasted(monotonic() - began)
                if self._stop.is_set():
                    break
                if not worked:  # only what has worked once is tried again
                    self._failure = str(error)
                elif self.connected:
                    _log.warning("%s: %s; trying again", self.name, error)
                self._mark(connected=False)
                if not worked:
                    break
                self._stop.wait(backoff.delay())
        self._mark(connected=False)
        with self._changed:
            self.dropped += len(self._waiting)
            self._waiting.clear()

    def _send_all(self, process: PushProcess) -> None:
        """Send until all is sent and nothing follows. Raises PushLost."""
        began: float | None = None
        while (taken := self._take()) is not None:
            image, ticks = taken
            if not self._live:  # at its own speed, counted from the first one
                now, due = monotonic(), float(ticks * _TICK)
                if began is None or began + due - now > _LONGEST_PAUSE:
                    began = now - due
                self._stop.wait(began + due - now)
            try:
                process.send(image, ticks)
            except PushLost:
                self.dropped += 1
                raise
            self._pushed += 1

    def _take(self) -> tuple[Rgb, int] | None:
        with self._changed:
            while not self._waiting:
                if self._ending or self._stop.is_set():
                    return None
                self._changed.wait(0.1)
            taken = self._waiting.popleft()
            self._changed.notify_all()
            return taken

    def _mark(self, *, connected: bool) -> None:
        with self._changed:
            self.connected = connected
            self._lost = not connected
            self._changed.notify_all()

    def _over(self) -> bool:
        with self._changed:
            return self._stop.is_set() or (self._ending and not self._waiting)
