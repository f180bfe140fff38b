"""The child process of ``RtspPush``, seen from its parent: fed, watched, and killed if need be."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import threading
from time import monotonic
from types import TracebackType

import msgspec
import numpy as np

from knet_runtime.output.rtsp_child import FAILED, OK, TIME_BYTES, Push
from knet_runtime.overlay import Rgb

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
                [sys.executable, "-m", "knet_runtime.output.rtsp_child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # FFmpeg's own lines would show the password
                bufsize=0,
            )
        except OSError as error:  # no memory or no processes left: another time, perhaps
            raise PushLost(f"no process can be started: {error.strerror}") from error
        assert self._child.stdin is not None
        os.set_blocking(self._child.stdin.fileno(), False)
        try:
            # Not as an argument: everybody on the machine can read those.
            self._feed(memoryview(msgspec.json.encode(self._push) + b"\n"))
            self._answer(_START_SECONDS + self._push.patience)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end(graceful=error is None)

    def send(self, picture: Rgb, ticks: int) -> None:
        """Push uint8 [H, W, 3] RGB at that time; returns when the server has it. Raises
        PushLost."""
        self._feed(memoryview(ticks.to_bytes(TIME_BYTES, "little", signed=True)))
        self._feed(np.ascontiguousarray(picture).data.cast("B"))
        self._answer(self._push.patience + _GRACE)

    def _feed(self, data: memoryview) -> None:
        assert self._child.stdin is not None
        pipe = self._child.stdin.fileno()
        poll = select.poll()
        poll.register(pipe, select.POLLOUT)
        deadline = monotonic() + self._push.patience
        while data:
            self._wait(poll, deadline)
            try:
                data = data[os.write(pipe, data) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                self._answer(_GRACE)  # it says why it has ended, or else that it has

    def _answer(self, seconds: float) -> None:
        assert self._child.stdout is not None
        pipe = self._child.stdout.fileno()
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        self._wait(poll, monotonic() + seconds)
        answer = os.read(pipe, 1)
        if answer == OK:
            return
        if answer == FAILED:
            raise PushLost(self._child.stdout.readline().decode("utf-8", "replace").strip())
        raise PushLost(f"the server takes nothing for {self._push.patience:g} s")

    def _wait(self, poll: select.poll, deadline: float) -> None:
        while not poll.poll(1000 * _SLICE):
            if self._stop.is_set():
                raise PushLost("stopped")
            if monotonic() > deadline:
                raise PushLost(f"the server takes nothing for {self._push.patience:g} s")

    def _end(self, *, graceful: bool = False) -> None:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with contextlib.suppress(OSError):
            self._child.stdin.close()
        if graceful:
            deadline = monotonic() + self._push.patience
            while not self._stop.is_set() and monotonic() < deadline:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._child.wait(_SLICE)
                    break
        self._child.kill()
        self._child.wait()
        self._child.stdout.close()
