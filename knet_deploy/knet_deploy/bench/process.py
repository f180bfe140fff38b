"""A target in a process of its own: its memory is its own, and so is its crash."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Event, Timer
from time import perf_counter
from types import TracebackType
from typing import IO, Any

import cv2
import msgspec

from knet_runtime.errors import EngineError

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Deadlines(msgspec.Struct, frozen=True):
    """Seconds after which whoever has not answered is taken to hang."""

    opening: float = 15 * 60  # torch.compile and TensorRT take minutes on a small machine
    call: float = 10 * 60  # torch.compile compiles again for each size of frame
    frame: float = 30  # a turn of many frames has so much for each, if that is more

    def of_frames(self, count: int) -> float:
        """Those of a call that goes through ``count`` frames."""
        return max(self.call, count * self.frame)


class BenchProcess:
    """Makes ``factory()`` in a fresh process that may use ``threads`` cores, and calls its methods.

    ``factory`` and all arguments must be picklable. Raises EngineError, with the reason, when the
    process or a call fails, or does not answer in time; ``seconds`` is what making it took, the
    imports that it needs included. Where an error or a signal ends the ``with``, the process is
    killed in the middle of its work.

    Not a process of multiprocessing: that would share a tracker of semaphores with this one, which
    complains here of what a killed compiler leaves, and would hear Ctrl-C while it starts.
    """

    def __init__(
        self, factory: Callable[[], object], threads: int, deadlines: Deadlines | None = None
    ) -> None:
        self._deadlines = deadlines or Deadlines()
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # engines write there, which belongs to the table
            env={**os.environ, **dict.fromkeys(_THREAD_VARIABLES, str(threads))},
            start_new_session=True,
        )
        try:
            self._send((threads, pickle.dumps(factory)))
            self.seconds = float(self._answer(self._deadlines.opening))
        except BaseException:
            self.kill()
            raise

    def call(self, method: str, *arguments: object, frames: int = 1) -> Any:
        """What ``method`` of the object over there gives; ``frames`` is how many it takes."""
        self._send((method, arguments))
        return self._answer(self._deadlines.of_frames(frames))

    def peak_bytes(self) -> int | None:
        """The most memory that the process has held (VmHWM); None where the system does not say."""
        try:
            lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        except OSError:
            return None
        held = (line for line in lines if line.startswith("VmHWM"))
        return next((1024 * int(line.split()[1]) for line in held), None)

    def close(self) -> None:
        """Let the process end; a second call does nothing."""
        self._close_pipes()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self.kill()

    def kill(self) -> None:
        """End the process whatever it does; a second call does nothing."""
        self._stop()
        self._process.wait()
        self._close_pipes()

    def _stop(self) -> None:
        if self._process.poll() is not None:
            return
        if hasattr(os, "killpg"):  # and the compilers that it has started
            os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.kill()

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # nobody reads what it still holds
                    pipe.close()

    def _send(self, message: object) -> None:
        assert self._process.stdin is not None
        try:
            _write(self._process.stdin, message)
        except (OSError, ValueError) as error:  # a ValueError: closed here, after a failure
            raise EngineError(self._ended()) from error

    def _answer(self, seconds: float) -> Any:
        assert self._process.stdout is not None
        late = Event()

        def give_up() -> None:
            late.set()
            self._stop()

        timer = Timer(seconds, give_up)
        timer.start()
        try:
            worked, value = pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            if late.is_set():
                why = f"it did not answer within {seconds:g} s and was ended"
                raise EngineError(why) from error
            raise EngineError(self._ended()) from error
        finally:
            timer.cancel()
        if not worked:
            raise EngineError(str(value))
        return value

    def _ended(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        return f"its process ended with {self._process.returncode}"

    def __enter__(self) -> BenchProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()


def serve() -> None:
    """What the process does: makes the object, and then calls what it is told, until its input
    ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this ends it
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):  # what engines say there would be taken for answers
        os.dup2(nowhere, stream)
    threads, factory = pickle.load(requests)
    _use_cores(threads)
    try:
        started = perf_counter()
        made = pickle.loads(factory)()
        _write(answers, (True, perf_counter() - started))
    except Exception as error:
        _write(answers, (False, _reason(error)))
        return
    while True:
        try:
            method, arguments = pickle.load(requests)
        except EOFError:
            return
        try:
            answer = True, getattr(made, method)(*arguments)
        except Exception as error:
            answer = False, _reason(error)
        _write(answers, answer)


def _write(stream: IO[bytes], message: object) -> None:
    stream.write(pickle.dumps(message))
    stream.flush()


def _use_cores(threads: int) -> None:
    """Engines take as many threads as there are cores to use."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    cv2.setNumThreads(threads)


def _reason(error: Exception) -> str:
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    return first if isinstance(error, EngineError) else f"{type(error).__name__}: {first}"
