"""Opening files that are read: only what is a regular file, and without ever waiting for it."""

from __future__ import annotations

import os
import stat
from errno import ENXIO
from pathlib import Path
from typing import BinaryIO

from knet_runtime.errors import SourceError

_HEAD = 1 << 16


def open_regular(path: Path, what: str) -> BinaryIO:
    """Open a regular file for reading, at its first byte.

    What was opened is looked at, not its name, so that nothing can be exchanged in between; a FIFO
    that nobody writes to is no wait. ``what`` is what the file should be ("an image"). Raises
    SourceError, naming the file, when it is missing, no regular file, empty, or begins with 64 KiB
    of zeros, as what was never written does.
    """
    flags = os.O_RDONLY
    for name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)  # as far as the system has them
    try:
        handle = os.open(path, flags)
    except OSError as error:
        if path.is_dir():  # only Windows does not open folders
            raise SourceError(_is_folder(path, what)) from error
        reason = error.strerror or "cannot be opened"
        if error.errno == ENXIO:  # a socket
            reason = "is not a regular file"
        raise SourceError(f"{path}: {reason}; check the name and its permissions") from error
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise SourceError(_is_folder(path, what))
        if not stat.S_ISREG(mode):
            raise SourceError(f"{path}: is not a regular file; copy what it gives into one")
        head = os.read(handle, _HEAD)
        if not head:
            raise SourceError(f"{path}: is empty; copy or export it again")
        if len(head) == _HEAD and not any(head):
            raise SourceError(f"{path}: begins with zeros, so it is not {what}; copy it again")
        os.lseek(handle, 0, os.SEEK_SET)
        return os.fdopen(handle, "rb")
    except OSError as error:
        os.close(handle)
        raise SourceError(f"{path}: {error.strerror}; copy it again") from error
    except BaseException:
        os.close(handle)
        raise


def _is_folder(path: Path, what: str) -> str:
    return f"{path}: is a folder, not {what}; name {what} in it"
