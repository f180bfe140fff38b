"""Files that appear under their name only when they are whole."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from knet_runtime.errors import OutputError


def output_error(path: Path, error: Exception) -> OutputError:
    """The OutputError for a failed write to ``path``: what happened, and what to do."""
    number = getattr(error, "errno", None)
    reason = getattr(error, "strerror", None) or str(error)
    match number:
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            mend = "free some space or write to another disk"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            mend = "write to a folder that you may change"
        case errno.ENOTDIR | errno.EEXIST:
            mend = "a part of this path is a file where a folder is needed: choose another"
        case _:
            mend = "choose another place to write to"
    return OutputError(f"{path}: {reason}; {mend}")


def make_folder(folder: Path) -> list[Path]:
    """Create a folder and its missing parents; returns those created, innermost first.

    Raises OSError, after taking back what it created.
    """
    missing = []
    at = folder
    while not at.exists() and at != at.parent:
        missing.append(at)
        at = at.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        remove_empty(missing)
        raise
    return missing


def remove_empty(folders: list[Path]) -> None:
    """Remove those folders that are empty, innermost first; the others stay."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def check_folder(folder: Path) -> None:
    """Raise OutputError unless files can be made in ``folder``, itself made if it is missing.

    Nothing is left behind.
    """
    created: list[Path] = []
    probe = folder / f".probe.{os.getpid()}.part"
    try:
        created = make_folder(folder)
        probe.write_bytes(b"")
    except OSError as error:
        raise output_error(folder, error) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
        remove_empty(created)


def partial_path(path: Path) -> Path:
    """The name that a file gets instead of ``path`` when its run failed: NAME.partial.SUFFIX."""
    return path.with_name(f"{path.stem}.partial{path.suffix}")


class AtomicFile:
    """A hidden file beside ``target`` that becomes it, or vanishes.

    Making one tries whether ``target`` can be written, parents included, and leaves nothing behind;
    raises OutputError when it cannot. ``start`` then creates the file ``temporary``.
    """

    def __init__(self, target: Path) -> None:
        if target.is_dir():
            raise OutputError(f"{target}: is a folder; name a file in it")
        self.target = target
        # The process's number keeps two runs apart; a leftover of a killed run is overwritten.
        self.temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
        self._created: list[Path] = []
        self.start()
        self.discard()

    def start(self) -> None:
        """Create the file, empty, and its missing parents. Raises OutputError."""
        try:
            self._created = make_folder(self.target.parent)
            self.temporary.write_bytes(b"")
        except OSError as error:
            self.discard()
            raise output_error(self.target, error) from error

    def write(self, data: bytes) -> Path:
        """Start, write all of it, and commit; the target. Raises OutputError; nothing is left."""
        self.start()
        try:
            self.temporary.write_bytes(data)
        except OSError as error:
            self.discard()
            raise output_error(self.target, error) from error
        return self.commit(complete=True)

    def commit(self, *, complete: bool) -> Path:
        """Rename the file to the target or, unless complete, to its ``partial_path``; that path.

        Raises OutputError; the file then vanishes.
        """
        final = self.target if complete else partial_path(self.target)
        try:
            self.temporary.replace(final)
        except OSError as error:
            self.discard()
            raise output_error(final, error) from error
        return final

    def discard(self) -> None:
        """Remove the file, and the folders created for it."""
        with contextlib.suppress(OSError):
            self.temporary.unlink(missing_ok=True)
        remove_empty(self._created)


def write_atomic(target: Path, data: bytes) -> None:
    """Write a small file so that it is never seen half-written; its folder must exist.

    Raises OSError; nothing is left then.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(data)
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
