"""Locks that die with their process: whoever holds one lives, and a leftover file locks nobody out.

They are the system's (``flock``, on Windows ``msvcrt.locking``), and hold between processes and
within one. File systems without locks lock nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path

from knet_runtime.types import Closeable

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_log = logging.getLogger(__name__)


def try_lock(handle: int) -> bool:
    """Lock an open file until it is closed; False where somebody else has it. Raises OSError where
    files cannot be locked."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def is_at(handle: int, path: Path) -> bool:
    """Whether the open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


class FileLock(Closeable):
    """Holds the lock of the file ``path``, which it makes, and removes when it is closed.

    Raises BlockingIOError where somebody else holds it, OSError where the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: int | None = None
        while self._handle is None:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if not try_lock(handle):
                    raise BlockingIOError(f"{path} is locked")
                if is_at(handle, path):  # else its holder removed it meanwhile
                    self._handle = handle
            except BlockingIOError:
                raise
            except OSError as error:
                _log.debug("%s cannot be locked, so nothing is guarded: %s", path, error)
                self._handle = handle
            finally:
                if self._handle is None:
                    os.close(handle)

    def close(self) -> None:
        """Let go of it; a second call does nothing."""
        handle, self._handle = self._handle, None
        if handle is None:
            return
        with contextlib.suppress(OSError):
            if os.name == "posix":
                self._path.unlink()
        os.close(handle)
        with contextlib.suppress(OSError):
            if os.name != "posix":  # which removes no file that is open
                self._path.unlink()
