"""Files and folders that appear under their name only when they are whole.

Each is written aside, under a hidden name, then brought to the disk and renamed: whatever is killed
or loses power, what stands under the name is the old one or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from knet_runtime.errors import OutputError
from knet_runtime.types import as_utf8

_log = logging.getLogger(__name__)
_MANY = 100  # files; one takes about 5 ms


def output_error(path: Path, error: Exception) -> OutputError:
    """The OutputError for a failed write to ``path``: what happened, and what to do."""
    number = getattr(error, "errno", None)
    reason = getattr(error, "strerror", None) or str(error)
    match number:
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            fix = "free some space or write to another disk"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            fix = "write to a folder that you may change"
        case errno.ENOTDIR | errno.EEXIST:
            fix = "a part of this path is a file where a folder is needed: choose another"
        case _:
            fix = "choose another place to write to"
    return OutputError(f"{path}: {reason}; {fix}")


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
    raises OutputError when it cannot. ``start`` then creates the file ``temporary``. As a context
    manager it is started, and vanishes unless it was committed.
    """

    def __init__(self, target: Path) -> None:
        if target.is_dir():
            raise OutputError(f"{target}: is a folder; name a file in it")
        self.target = target
        self.temporary = _beside(target)
        self._created: list[Path] = []
        self.start()
        self.discard()

    def __enter__(self) -> AtomicFile:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def start(self) -> None:
        """Create the file, empty, and its missing parents. Raises OutputError."""
        with self._or_discard(self.target):
            self._created = make_folder(self.target.parent)
            self.temporary.write_bytes(b"")

    def write(self, data: bytes) -> Path:
        """Start, write all of it, and commit; the target. Raises OutputError; nothing is left."""
        self.start()
        with self._or_discard(self.target):
            self.temporary.write_bytes(data)
        return self.commit(complete=True)

    def commit(self, *, complete: bool) -> Path:
        """Rename the file to the target or, unless complete, to its ``partial_path``; that path.

        Raises OutputError; the file then vanishes.
        """
        final = self.target if complete else partial_path(self.target)
        with self._or_discard(final):
            sync(self.temporary)
            self.temporary.replace(final)
            sync(final.parent)
        return final

    def discard(self) -> None:
        """Remove the file, and the folders created for it."""
        with contextlib.suppress(OSError):
            self.temporary.unlink(missing_ok=True)
        remove_empty(self._created)

    @contextlib.contextmanager
    def _or_discard(self, path: Path) -> Iterator[None]:
        """What fails is an OutputError for ``path``, and leaves nothing."""
        try:
            yield
        except OSError as error:
            self.discard()
            raise output_error(path, error) from error


def write_atomic(target: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a small file so that it is never seen half-written; its folder must exist.

    Unless ``durable`` it is not waited for the disk, as for one of many files each of which a power
    cut may take. Raises OSError; nothing is left then.
    """
    temporary = _beside(target)
    try:
        temporary.write_bytes(data)
        if durable:
            sync(temporary)
        temporary.replace(target)
        if durable:
            sync(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_json(target: Path, value: Any) -> None:
    """Write ``value`` as indented JSON so that it is never seen half-written, missing parents
    included. Raises OutputError."""
    AtomicFile(target).write(msgspec.json.format(json_bytes(value), indent=2) + b"\n")


def json_bytes(value: Any) -> bytes:
    """``value`` as JSON; names of files in it may be no UTF-8 (see ``as_utf8``)."""
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        return msgspec.json.encode(_readable(msgspec.to_builtins(value)))


def _readable(value: Any) -> Any:
    match value:
        case str():
            return as_utf8(value)
        case list() | tuple():
            return [_readable(item) for item in value]
        case dict():
            return {_readable(key): _readable(item) for key, item in value.items()}
        case _:
            return value


class AtomicFolder:
    """A hidden folder ``path`` beside ``target`` that becomes it at ``commit``, or vanishes.

        with AtomicFolder(target) as folder:
            (folder.path / "a.txt").write_text("whole")
            folder.commit()

    Raises OSError.
    """

    def __init__(self, target: Path) -> None:
        self.target = target.absolute()
        self.path = self.target.with_name(f".{target.name}.{secrets.token_hex(4)}.new")
        self._created: list[Path] = []

    def __enter__(self) -> AtomicFolder:
        self._created = make_folder(self.target.parent)
        self.path.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        remove_empty(self._created)

    def commit(self) -> None:
        """Rename the folder to the target; what was there goes, and is back in its place if that
        fails."""
        entries = [self.path, *self.path.rglob("*")]
        if len(entries) > _MANY and hasattr(os, "sync"):
            os.sync()  # the whole disk once: to wait for each of thousands takes minutes
        else:
            for entry in entries:
                sync(entry)
        aside = self.path.with_suffix(".old")
        old = os.path.lexists(self.target)
        try:
            if old:
                self.target.rename(aside)
            self.path.rename(self.target)
        except BaseException:  # KeyboardInterrupt as well
            if os.path.lexists(aside) and not os.path.lexists(self.target):
                aside.rename(self.target)
            raise
        sync(self.target.parent)
        if old:
            try:
                aside.unlink() if aside.is_symlink() else shutil.rmtree(aside)
            except OSError as error:
                _log.warning("what %s replaced is left as %s: %s", self.target, aside, error)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise


def sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk. Some systems cannot
    for folders, which is no error. Raises OSError when a file's bytes cannot be written."""
    folder = path.is_dir()
    if os.name != "posix" and folder:
        return
    try:
        handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if not folder:
            raise
        _log.debug("%s cannot be synced: %s", path, error)


def _beside(target: Path) -> Path:
    """A hidden name beside ``target``. The process's number keeps two runs apart; a leftover of a
    killed run is overwritten."""
    return target.with_name(f".{target.name}.{os.getpid()}.part")
