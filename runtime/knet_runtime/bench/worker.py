"""A contestant in a process of its own: its memory is its own, and so is its crash."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any

import cv2

from knet_runtime.errors import BackendError

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Worker:
    """Makes ``factory()`` in a fresh process that may use ``threads`` cores, and calls its methods.

    ``factory`` and all arguments must be picklable. Raises BackendError, with the reason, when the
    process or a call fails; ``seconds`` is what making it took.
    """

    def __init__(self, factory: Callable[[], object], threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, factory, threads), daemon=True)
        with _thread_variables(threads):
            self._process.start()
        theirs.close()
        try:
            self.seconds = float(self._answer())
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *arguments: object) -> Any:
        """What ``method`` of the thing over there gives."""
        try:
            self._connection.send((method, arguments))
        except OSError as error:
            raise BackendError(self._ended()) from error
        return self._answer()

    def peak_bytes(self) -> int | None:
        """The most memory that the process has held (VmHWM); None where the system does not say."""
        return peak_bytes(self._process.pid)

    def close(self) -> None:
        """End the process; a second call does nothing."""
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _answer(self) -> Any:
        try:
            worked, value = self._connection.recv()
        except (EOFError, OSError) as error:
            raise BackendError(self._ended()) from error
        if not worked:
            raise BackendError(str(value))
        return value

    def _ended(self) -> str:
        self._process.join(10)
        return f"its process ended with {self._process.exitcode}"

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def peak_bytes(process: int | None) -> int | None:
    """The most memory that a process has held, in bytes; None where the system does not say."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)


@contextmanager
def _thread_variables(threads: int) -> Iterator[None]:
    """A process that is started now computes with so many threads, whatever library does it."""
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(connection: Connection, factory: Callable[[], object], threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this ends it
    _keep_quiet()
    _use_cores(threads)
    try:
        started = perf_counter()
        thing = factory()
        connection.send((True, perf_counter() - started))
    except Exception as error:
        connection.send((False, _reason(error)))
        return
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = True, getattr(thing, method)(*arguments)
        except Exception as error:
            answer = False, _reason(error)
        connection.send(answer)


def _use_cores(threads: int) -> None:
    """Engines take as many threads as there are cores to use."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    cv2.setNumThreads(threads)


def _keep_quiet() -> None:
    """Engines and compilers write to both streams, which belong to the table."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _reason(error: Exception) -> str:
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    return first if isinstance(error, BackendError) else f"{type(error).__name__}: {first}"
