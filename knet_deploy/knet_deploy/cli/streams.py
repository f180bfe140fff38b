"""stdout and stderr as they may be: closed, on a full disk, or read by nobody.

What a command says must not keep it from doing its work: the first error ends the saying, and the
exit code tells of it in the end.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast


class Words:
    """A text stream that never fails: after the first ``problem`` it drops what it is given."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.problem: OSError | None = None
        self.may_be_closed = False

    def write(self, text: str) -> int:
        """Write, and flush what a person or a log waits for."""
        if self.problem is None:
            try:
                return self.stream.write(text)
            except OSError as error:
                self.problem = error
        return len(text)

    def flush(self) -> None:
        """Flush what was written."""
        if self.problem is None:
            try:
                self.stream.flush()
            except OSError as error:
                self.problem = error

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":  # bytes would go past us
            raise AttributeError(name)
        return getattr(self.stream, name)

    @property
    def is_closed(self) -> bool:
        """Whether whoever started this process gave it no such stream."""
        return self.problem is not None and self.problem.errno == errno.EBADF


def allow_closed_stdout() -> None:
    """What the command says only sums up what it leaves elsewhere: who closed stdout has all that
    was asked for."""
    if isinstance(sys.stdout, Words):
        sys.stdout.may_be_closed = True


@contextmanager
def unfailing_streams() -> Iterator[Words]:
    """stdout and stderr as ``Words``, for as long as this lasts; that of stdout."""
    _occupy_closed()
    before = sys.stdout, sys.stderr
    out, err = (
        Words(_opened(number) if stream is None else stream)
        for number, stream in enumerate(before, 1)
    )
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield out
    finally:
        sys.stdout, sys.stderr = before
        for words in (out, err):
            if words.problem is not None:
                # Python flushes once more when it ends, and would fail then.
                with contextlib.suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), words.stream.fileno())


def _occupy_closed() -> None:
    """A file that is opened must not get the number of a closed stdout or stderr: what C libraries
    print would go into it. To write there is an error still."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)  # the lowest free number


def _opened(number: int) -> TextIO:
    return open(number, "w", encoding="utf-8", errors="replace", closefd=False)
