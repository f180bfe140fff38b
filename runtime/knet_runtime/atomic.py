"""Files and folders that appear under their name only when they are whole.

Each is written aside, under a hidden name that no other process has, then brought to the disk and
renamed: whatever is killed or loses power, what stands under the name is the old one or the new
one. Where the name cannot be had any more (a folder has it, its folder is gone), what was written
stays on the disk, and the error says where. ``growing`` has what is written for hours.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from knet_runtime.errors import OutputError
from knet_runtime.locks import is_at, try_lock
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
        case errno.EISDIR:
            fix = "a folder has this name: choose another"
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
    probe = hidden_name(folder / "probe")
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


def free_partial_path(path: Path) -> Path:
    """That name, or NAME.partial.2.SUFFIX and so on: the first that nothing has yet."""
    place, count = partial_path(path), 1
    while os.path.lexists(place):
        count += 1
        place = path.with_name(f"{path.stem}.partial.{count}{path.suffix}")
    return place


def hidden_name(path: Path) -> Path:
    """A name beside ``path``, drawn anew each time, for what is to become it."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def publish(temporary: Path, target: Path) -> None:
    """Rename a file or folder, which is on the disk, to ``target``, and bring the name there too.

    Raises OSError; its text says where the file is then.
    """
    rename(temporary, target)
    sync(target.parent)


def rename(temporary: Path, target: Path) -> None:
    """The same, without waiting for the disk."""
    try:
        temporary.replace(target)
    except OSError as error:
        raise kept(error, temporary, target) from error


def kept(error: OSError, temporary: Path, target: Path) -> OSError:
    """The error, with the name that the file or folder has now: a partial one, or its own."""
    place = free_partial_path(target)
    try:
        temporary.rename(place)
    except OSError:
        place = temporary
    return kept_at(error, place) if os.path.lexists(place) else error


def kept_at(error: OSError, place: Path) -> OSError:
    """The error, with where the file is all the same."""
    reason = error.strerror or str(error)
    return OSError(error.errno, f"{reason}; what was written is kept in {place}")


class AtomicFile:
    """A hidden file beside ``target`` that becomes it, or vanishes.

    Making one tries whether ``target`` can be written, parents included, and leaves nothing behind;
    raises OutputError when it cannot. ``start`` then creates the file ``temporary``, which is
    locked for as long as it is written. As a context manager it is started, and vanishes unless it
    was committed.
    """

    def __init__(self, target: Path) -> None:
        if target.is_dir():
            raise OutputError(f"{target}: is a folder; name a file in it")
        self.target = target
        self.temporary = hidden_name(target)
        self._created: list[Path] = []
        self._handle: int | None = None
        self._settled = False
        AtomicFile.start(self)
        self.discard()

    def __enter__(self) -> AtomicFile:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def start(self) -> None:
        """Create the file, empty, and its missing parents. Raises OutputError."""
        try:
            self._created = make_folder(self.target.parent)
            self.temporary, self._handle = create_hidden(self.target)
        except OSError as error:
            self.discard()
            raise output_error(self.target, error) from error

    def write(self, data: bytes) -> Path:
        """Start, write all of it, and commit; the target. Raises OutputError; what could not be
        written whole is not left."""
        self.start()
        try:
            self.temporary.write_bytes(data)
        except OSError as error:
            self.discard()
            raise output_error(self.target, error) from error
        return self.commit(complete=True)

    def commit(self, *, complete: bool) -> Path:
        """Rename the file to the target or, unless complete, to its ``partial_path`` (numbered
        where there is one already); that path.

        Raises OutputError. What is whole is never removed: where only its name cannot be had, the
        error says where it is. What could not be brought to the disk is not left.
        """
        final = self.target if complete else free_partial_path(self.target)
        self._settled = True
        try:
            self._sync()
            publish(self.temporary, final)
        except OSError as error:
            raise output_error(final, error) from error
        finally:
            self._release()
        sync_names(self._created)
        return final

    def discard(self) -> None:
        """Remove the file, unless it was committed, and the folders created for it."""
        self._release()
        if not self._settled:
            with contextlib.suppress(OSError):
                self.temporary.unlink(missing_ok=True)
        remove_empty(self._created)

    @property
    def is_lost(self) -> bool:
        """Whether somebody removed or moved the file or its folder; a commit brings it back."""
        return self._handle is not None and not is_at(self._handle, self.temporary)

    def _sync(self) -> None:
        """Wait until all that was written is on the disk. Raises OSError, which says where it is
        if it is kept."""
        if self._handle is not None and self.is_lost:
            lost = OSError(errno.ENOENT, "its folder was removed while it was written")
            raise kept_at(lost, _copied(self._handle, self.target))
        try:
            sync(self.temporary)
        except OSError as error:
            raise self._unsynced(error) from error

    def _unsynced(self, error: OSError) -> OSError:
        """What becomes of a file that cannot be brought to the disk."""
        with contextlib.suppress(OSError):
            self.temporary.unlink(missing_ok=True)
        return error

    def _release(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)


def create_hidden(target: Path) -> tuple[Path, int | None]:
    """A new, empty and locked file beside ``target``, and the handle that holds the lock: None
    where an open file cannot be renamed (Windows). Raises OSError."""
    while True:
        path = hidden_name(target)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            continue
        if os.name != "posix":
            os.close(handle)
            return path, None
        with contextlib.suppress(OSError):  # a file system without locks
            if not (try_lock(handle) and is_at(handle, path)):  # taken for a leftover, just now
                os.close(handle)
                continue
        return path, handle


def _copied(handle: int, target: Path) -> Path:
    """Write a file that has lost its name anew, as close to ``target`` as can be; where. Raises
    OSError."""
    problem = OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    for folder in (*target.absolute().parents, Path(tempfile.gettempdir())):
        place = free_partial_path(folder / target.name)
        try:
            make_folder(folder)
            with os.fdopen(os.dup(handle), "rb") as lost, place.open("xb") as found:
                lost.seek(0)
                shutil.copyfileobj(lost, found)
                os.fsync(found.fileno())
        except OSError as error:
            problem = error
            continue
        sync(folder)
        return place
    raise problem


def write_atomic(target: Path, data: bytes) -> None:
    """Write a small file so that it is never seen half-written; its folder must exist.

    Raises OSError: what could not be written whole is not left, and where only its name could not
    be had, the text says where it is.
    """
    temporary = hidden_name(target)
    try:
        temporary.touch(exist_ok=False)
        temporary.write_bytes(data)
        sync(temporary)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    publish(temporary, target)


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

    What a killed process left is removed first; where it was killed between the two renames of an
    exchange, the old ``target`` is brought back. Raises OSError.
    """

    def __init__(self, target: Path) -> None:
        self.target = target.absolute()
        self.path = self.target
        self._created: list[Path] = []
        self._handle: int | None = None
        self._kept = False

    def __enter__(self) -> AtomicFolder:
        self._created = make_folder(self.target.parent)
        self._sweep()
        while True:
            self.path = self.target.with_name(f".{self.target.name}.{secrets.token_hex(4)}.new")
            self.path.mkdir()
            if os.name != "posix":  # a folder cannot be opened there
                return self
            self._handle = os.open(self.path, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system without locks
                if not (try_lock(self._handle) and is_at(self._handle, self.path)):
                    os.close(self._handle)  # taken for a leftover, just now
                    continue
            return self

    def __exit__(self, *_: object) -> None:
        if not self._kept:
            shutil.rmtree(self.path, ignore_errors=True)
        if self._handle is not None:
            os.close(self._handle)
        remove_empty(self._created)

    def _sweep(self) -> None:
        pattern = re.compile(rf"\.{re.escape(self.target.name)}\.[0-9a-f]{{8}}\.(new|old)", re.S)
        for path in [one for one in self.target.parent.iterdir() if pattern.fullmatch(one.name)]:
            if _is_written(path.with_suffix(".new")):
                continue
            if path.suffix == ".old" and not os.path.lexists(self.target):
                path.rename(self.target)
                _log.warning("%s: is back, a killed process had moved it aside", self.target)
            else:
                shutil.rmtree(path, ignore_errors=True)

    def commit(self) -> None:
        """Rename the folder to the target; what was there goes, or is back in its place if that
        fails. Where the target cannot be had, the folder is left under a partial name, which the
        error states."""
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
        except BaseException as error:  # KeyboardInterrupt as well
            if os.path.lexists(aside) and not os.path.lexists(self.target):
                aside.rename(self.target)
            elif isinstance(error, OSError):
                self._kept = True
                raise kept(error, self.path, self.target) from error
            raise
        sync(self.target.parent)
        sync_names(self._created)
        if old:
            try:
                aside.unlink() if aside.is_symlink() else shutil.rmtree(aside)
            except OSError as error:
                _log.warning("what %s replaced is left as %s: %s", self.target, aside, error)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise


def _is_written(folder: Path) -> bool:
    """Whether a living process writes this folder; also where that cannot be said."""
    if os.name != "posix":
        return True
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not try_lock(handle)
    except OSError:
        return True
    finally:
        os.close(handle)


def sync_names(created: Iterable[Path]) -> None:
    """Bring the names of folders that ``make_folder`` created to the disk."""
    for folder in created:
        sync(folder.parent)


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
