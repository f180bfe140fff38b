"""What is written for hours: files that grow, and series of small ones.

The disk has all but the last seconds of them, whatever is killed or loses power; what a killed run
left is found at the next start.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import NamedTuple

from knet_runtime.atomic import (
    AtomicFile,
    create_hidden,
    free_partial_path,
    kept,
    output_error,
    rename,
    sync,
    sync_names,
)
from knet_runtime.errors import OutputError
from knet_runtime.locks import is_at, try_lock

_log = logging.getLogger(__name__)

SAVE_SECONDS = 3.0
"""A power cut takes what was written within so long."""

_TOGETHER_SECONDS = 1.0
_MOST = 64  # open files of a series


class GrowingFile(AtomicFile):
    """An ``AtomicFile`` that is brought to the disk every few seconds while it grows.

    What killed runs left of ``target`` is given its partial names, and logged: ``rescued``. What
    another process is still writing is left alone.
    """

    def __init__(self, target: Path) -> None:
        self._over = threading.Event()
        self._saver: threading.Thread | None = None
        self._problem: OSError | None = None
        super().__init__(target)
        self.rescued = rescue(target)

    def start(self) -> None:
        """Create the file, empty, and its missing parents. Raises OutputError."""
        super().start()
        if self._handle is not None:
            self._saver = threading.Thread(
                target=self._save, args=(self._handle,), name="knet-saver", daemon=True
            )
            self._saver.start()

    def _save(self, handle: int) -> None:
        save = getattr(os, "fdatasync", os.fsync)  # macOS has the latter only
        while not self._over.wait(SAVE_SECONDS):
            try:
                save(handle)
            except OSError as error:  # the system reports it once: it must not be lost
                self._problem = error
                return
            sync(self.temporary.parent)
            sync_names(self._created)

    def _sync(self) -> None:
        self._stop_saving()
        super()._sync()
        if self._problem is not None:
            raise self._unsynced(self._problem)

    def _unsynced(self, error: OSError) -> OSError:
        return kept(error, self.temporary, self.target)  # hours of work: most of it may be there

    def _release(self) -> None:
        self._stop_saving()
        super()._release()

    def _stop_saving(self) -> None:
        if self._saver is not None:
            self._over.set()
            self._saver.join()


def rescue(target: Path) -> list[Path]:
    """Give what killed runs left of ``target`` its partial names; those. Each is logged."""
    found = []
    for leftover in abandoned(target.parent, re.escape(target.name)):
        with contextlib.suppress(OSError):
            if not leftover.stat().st_size:
                leftover.unlink()
                continue
            place = free_partial_path(target)
            leftover.rename(place)
            found.append(place)
            _log.warning(
                "%s: a run was killed while it wrote it; that is kept in %s", target, place
            )
    return found


def abandoned(folder: Path, names: str) -> Iterator[Path]:
    """The hidden files in ``folder`` that were to get one of ``names`` (a regular expression), and
    that no living process writes. Nobody else takes one while it is looked at."""
    if not folder.is_dir():
        return
    pattern = re.compile(rf"\.(?:{names})\.[0-9a-f]+\.part", re.S)
    for path in sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name)):
        if os.name != "posix":  # an open file cannot be renamed there
            yield path
            continue
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDWR)
            try:
                if try_lock(handle) and is_at(handle, path):
                    yield path
            finally:
                os.close(handle)


class _Part(NamedTuple):
    target: Path
    temporary: Path
    handle: int | None


class FileSeries:
    """Small files, one after the other, each of which appears whole and stays.

    To wait for the disk takes longer than to write such a file. Those of about a second are waited
    for together, in a thread of their own, and have their names then; one that comes alone has it
    at once.
    """

    def __init__(self) -> None:
        self._parts: list[_Part] = []
        self._problem: OutputError | None = None
        self._last = -_TOGETHER_SECONDS
        self._closing = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def add(self, target: Path, data: bytes) -> None:
        """Write a file; its folder must exist. Raises OutputError, also that of an earlier file."""
        self._raise()
        part = _written(target, data)
        with self._changed:
            alone = not self._parts and monotonic() - self._last > _TOGETHER_SECONDS
            if not alone:
                self._changed.wait_for(lambda: len(self._parts) < _MOST)
                self._parts.append(part)
                self._changed.notify_all()
                if self._thread is None:
                    self._thread = threading.Thread(
                        target=self._run, name="knet-series", daemon=True
                    )
                    self._thread.start()
        if alone:
            self._publish([part])
            self._raise()

    def close(self) -> None:
        """Wait until all of them have their names. Raises OutputError for one that has not."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._raise()

    def _raise(self) -> None:
        if self._problem is not None:
            raise self._problem

    def _run(self) -> None:
        def due() -> bool:
            return self._closing or len(self._parts) >= _MOST

        parts: list[_Part] = []
        while parts or not self._closing:
            with self._changed:
                self._changed.wait_for(lambda: self._parts or self._closing)
                self._changed.wait_for(due, _TOGETHER_SECONDS)
                parts, self._parts = self._parts, []
                self._changed.notify_all()
            self._publish(parts)

    def _publish(self, parts: list[_Part]) -> None:
        """Bring all of them to the disk, then give them their names, and bring those there too."""
        failed: dict[_Part, OSError] = {}
        for part in parts:
            try:
                sync(part.temporary)
            except OSError as error:
                failed[part] = kept(error, part.temporary, part.target)
        for part in parts:
            try:
                if part not in failed:
                    rename(part.temporary, part.target)
            except OSError as error:
                failed[part] = error
            if part.handle is not None:
                os.close(part.handle)
        for folder in {part.target.parent for part in parts}:
            sync(folder)
        for part, problem in failed.items():
            self._problem = self._problem or output_error(part.target, problem)
        self._last = monotonic()


def _written(target: Path, data: bytes) -> _Part:
    """The file under its hidden name, locked. Raises OutputError; nothing is left."""
    try:
        temporary, handle = create_hidden(target)
        try:
            temporary.write_bytes(data)
        except OSError:
            temporary.unlink(missing_ok=True)
            if handle is not None:
                os.close(handle)
            raise
    except OSError as error:
        raise output_error(target, error) from error
    return _Part(target, temporary, handle)
