"""How signals end a command: by an exception where Python runs, by force where it does not.

A call into native code that never returns (an engine in the self-test) keeps Python from seeing a
signal. A thread of ours sees it, and waits a few seconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType

PATIENCE = 8.0
"""Seconds that a command has for its end after a signal."""

_AFTERWARDS = 3.0
_TICK = 0.1

_bounds_itself = threading.Event()


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: whatever Ctrl-C would have closed properly is closed properly."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__()
        self.exit_code = 128 + number


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated(number)


def _hang_up(number: int, frame: FrameType | None) -> None:
    """Whoever has put another handler in place for SIGTERM, as training has, gets that."""
    if signal.getsignal(signal.SIGTERM) is _terminate:
        raise Terminated(number)
    signal.raise_signal(signal.SIGTERM)


@contextmanager
def bounds_itself() -> Iterator[None]:
    """Inside, a command sees to it that a signal ends it soon, and may take longer where something
    is still written."""
    _bounds_itself.set()
    try:
        yield
    finally:
        _bounds_itself.clear()


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise ``Terminated``, but a SIGHUP that nohup has switched off.
    A command that has not come to its end ``PATIENCE`` seconds after one of them, or after Ctrl-C,
    is ended by force."""
    if threading.current_thread() is not threading.main_thread():  # where signals never arrive
        yield
        return
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, _terminate)}
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, _hang_up)
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    wakeup = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True)
    watch.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        writing.close()
        watch.join()
        reading.close()


def exit_past_hanging_threads(code: int) -> None:
    """End the process at once if a thread of a run was given up: it is in native code, which aborts
    when Python takes itself down around it."""
    if any(thread.name.startswith("knet-") for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.flush()
        os._exit(code)


def _watch(signals: socket.socket) -> None:
    number = next((n for n in iter(lambda: _next(signals), None) if _is_ours(n)), None)
    deadline = monotonic() + PATIENCE
    signals.settimeout(_TICK)
    while number is not None:
        with contextlib.suppress(TimeoutError):
            if _next(signals) is None:
                return
        if _bounds_itself.is_set():
            deadline = max(deadline, monotonic() + _AFTERWARDS)
        if monotonic() >= deadline:
            text = "knet-deploy: error: a call that cannot be interrupted hangs: ended by force\n"
            with contextlib.suppress(OSError):
                os.write(2, text.encode())
            os._exit(128 + number)


def _next(signals: socket.socket) -> int | None:
    """The next signal's number; None when there will be none."""
    data = signals.recv(1)
    return data[0] if data else None


def _is_ours(number: int) -> bool:
    """Whether the signal is to end the command: training, for one, saves its state first."""
    handler = signal.getsignal(number)
    if handler is _hang_up:
        handler = signal.getsignal(signal.SIGTERM)
    return handler in (_terminate, signal.default_int_handler)


def _forget_in_child() -> None:
    """A process that is forked off must not report its signals to its parent."""
    with contextlib.suppress(ValueError):  # of a thread that has none
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
