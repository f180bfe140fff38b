"""Bytes to stdout, or another descriptor, without ever hanging on whoever reads them."""

from __future__ import annotations

import os
import select
import stat
import sys
from time import monotonic

from knet_runtime.errors import OutputClosed, OutputError

STDOUT = "-"
"""What stands for stdout where a file could be named."""

# A pipe that is ready takes this much without blocking (POSIX: PIPE_BUF is at least 512, on Linux
# 4096), so a reader that stops reading can not hold us.
_PIECE = getattr(select, "PIPE_BUF", 512)  # absent where there is no poll either


class Pipe:
    """Sends whole messages; ``name`` is what it is called in errors.

    ``descriptor`` (None: stdout) is a pipe, socket, terminal or file and stays open. A reader that
    takes its time makes ``send`` wait. One that takes not a byte for ``patience`` seconds is an
    OutputError, and one that closes its end an OutputClosed; nothing more can be sent then.
    """

    def __init__(self, name: str, descriptor: int | None = None, *, patience: float = 10.0) -> None:
        self.name = name
        if descriptor is None:
            sys.stdout.flush()  # what was printed comes before
            descriptor = sys.stdout.fileno()
        self._descriptor = descriptor
        self._patience = patience
        # A file takes anything at once, and is not polled.
        self._is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        self._closed = False

    @property
    def is_terminal(self) -> bool:
        """Whether a person reads it."""
        return os.isatty(self._descriptor)

    def send(self, *parts: bytes | memoryview) -> None:
        """Send these, one after the other. Raises OutputError and OutputClosed."""
        if self._closed:
            raise ValueError(f"{self.name}: closed")
        try:
            for part in parts:
                self._send(memoryview(part))
        except BrokenPipeError as error:
            self._closed = True
            raise OutputClosed(f"{self.name}: nobody reads it any more") from error
        except OSError as error:
            self._closed = True
            raise OutputError(f"{self.name}: {error.strerror}; write to another place") from error

    def close(self) -> None:
        """Send nothing more; the descriptor is its owner's."""
        self._closed = True

    def _send(self, data: memoryview) -> None:
        if self._is_file:
            while data:
                data = data[os.write(self._descriptor, data) :]
            return
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        deadline = monotonic() + self._patience
        while data:
            if poll.poll(1000 * max(0.0, deadline - monotonic())):
                data = data[os.write(self._descriptor, data[:_PIECE]) :]
                deadline = monotonic() + self._patience
            else:
                self._closed = True
                raise OutputError(
                    f"{self.name}: the reader has taken nothing for {self._patience:g} s; "
                    "let it read on, or leave this output out"
                )
