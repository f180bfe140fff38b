"""Class maps in shared memory: a ring that one process writes and any number read (Linux).

Nobody waits for anybody: a reader takes the newest mask that is whole, and whoever is slow misses
some. The memory begins with ``_HEAD``; each slot holds a header and the pixels of ``raw_masks``.
A header's CRC is what tells a whole mask from one that was written over meanwhile, so nothing hangs
on the order in which processors see each other's writes.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from struct import Struct
from time import monotonic, sleep
from typing import BinaryIO

from knet_runtime.errors import ConfigError, OutputError, SourceError
from knet_runtime.segmentation import Segmentation
from knet_runtime.sinks.raw_masks import HEADER, RawMask, pack, unpack
from knet_runtime.types import Closeable, Frame

_HEAD = Struct("<4sIIIQQ32x")  # magic, process, slots, state, bytes of a slot, masks written
_MAGIC = b"KNR1"
_LIVE, _ENDED, _REPLACED = range(3)
_SLOTS = 4  # a reader that copies one has the time of three frames for it
_FOLDER = Path("/dev/shm")
_POLL_SECONDS = 0.002
_REPLACING_SECONDS = 1.0  # that it may take to make a larger memory; then it came and went


class SharedMasks:
    """Writes each class map into the shared memory ``name``, for ``SharedMaskReader``.

    It never waits for a reader, and readers cannot change it. The memory is made with the first
    frame, made anew when a frame is larger than any before, and gone after ``close``, or when the
    process is killed: Python's resource tracker sees to that. What a run left behind that was
    killed together with its tracker is replaced. Raises ConfigError for a name that cannot be,
    OutputError when the name is another's or memory is short.

        >>> from knet_deploy import Segmenter, SharedMaskReader, SharedMasks, open_source
        >>> sink = SharedMasks("knet-example")
        >>> with open_source("street.png") as source, Segmenter() as segment:
        ...     frame = next(iter(source))
        ...     sink.write(frame, segment(frame.image))
        >>> with SharedMaskReader("knet-example") as reader:  # also in another process
        ...     reader.latest().class_map.shape
        (360, 480)
        >>> sink.close()
    """

    path: Path | None = None

    def __init__(self, name: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", name):
            raise ConfigError(f"shared memory cannot be called {name!r}: use letters, digits, _")
        if not _FOLDER.is_dir():
            raise ConfigError("shared memory of this kind needs Linux; write the raw masks to -")
        self.name = f"shared memory {name}"
        self._name = name
        self._memory: SharedMemory | None = None
        self._slot = 0
        self._written = 0
        self._closed = False
        _make_way(name)

    def write(self, frame: Frame, result: Segmentation) -> None:
        """Make this mask the newest one. Raises OutputError."""
        if self._closed:
            raise ValueError(f"{self.name}: closed")
        header, pixels = pack(frame, result, self._written)
        size = len(header) + len(pixels)
        if self._memory is None or size > self._slot:
            self._make(size)
        at = _HEAD.size + self._written % _SLOTS * self._slot
        buffer = self._buffer()
        buffer[at : at + len(header)] = header
        buffer[at + len(header) : at + size] = pixels
        self._written += 1
        self._set(_LIVE)

    def close(self, *, complete: bool = True) -> None:
        """Tell the readers that nothing follows, and let go of the memory."""
        self._closed = True
        self._drop(_ENDED)

    def _make(self, slot: int) -> None:
        self._drop(_REPLACED)
        size = _HEAD.size + _SLOTS * slot
        _make_way(self._name)
        try:
            self._memory = SharedMemory(self._name, create=True, size=size)
            # Without this a full /dev/shm would show as a killed process, at some later write.
            with (_FOLDER / self._name).open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            self._drop(_ENDED)
            raise OutputError(
                f"{self.name}: {error.strerror} ({size / 2**20:.0f} MiB); free some of "
                f"{_FOLDER} or make it larger"
            ) from error
        self._slot = slot
        self._set(_LIVE)

    def _set(self, state: int) -> None:
        head = (_MAGIC, os.getpid(), _SLOTS, state, self._slot, self._written)
        _HEAD.pack_into(self._buffer(), 0, *head)

    def _buffer(self) -> memoryview:
        assert self._memory is not None
        assert self._memory.buf is not None  # it is until it is closed
        return self._memory.buf

    def _drop(self, state: int) -> None:
        if self._memory is None:
            return
        self._set(state)
        self._memory.close()
        with contextlib.suppress(FileNotFoundError):  # somebody has removed it by hand
            self._memory.unlink()
        self._memory = None


class SharedMaskReader(Closeable):
    """Takes the newest mask from the shared memory ``name``; a context manager.

    Raises SourceError when there is no such memory.

        >>> from knet_deploy import SharedMaskReader, SourceError
        >>> try:
        ...     with SharedMaskReader("nobody-writes-this") as reader:
        ...         while not reader.ended:
        ...             mask = reader.latest(timeout=1.0)
        ... except SourceError as error:
        ...     print(error)
        there are no shared masks 'nobody-writes-this'; ...
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._seen = 0
        self._missing_since: float | None = None
        self._ring = _Ring.attach(name)
        if self._ring is None:
            raise SourceError(
                f"there are no shared masks {name!r}; start the run that writes them first"
            )

    @property
    def ended(self) -> bool:
        """Whether nothing follows: the writer has closed it, or was killed."""
        if self._missing_since is not None:
            return monotonic() - self._missing_since > _REPLACING_SECONDS
        return self._ring is None or self._ring.ended

    def latest(self, timeout: float = 0.0) -> RawMask | None:
        """The newest mask that was not taken yet; None if none comes within ``timeout`` seconds."""
        deadline = monotonic() + timeout
        while True:
            ended = self.ended
            mask = self._newest()
            if mask is not None or ended or monotonic() >= deadline:
                return mask
            sleep(_POLL_SECONDS)

    def close(self) -> None:
        """Let go of the memory; a second call does nothing."""
        ring, self._ring = self._ring, None
        if ring is not None:
            ring.close()

    def _newest(self) -> RawMask | None:
        ring = self._ring
        if ring is None:
            return None
        _, _, slots, state, slot, written = ring.head()
        if state == _REPLACED:  # by a larger one of the same name
            larger = _Ring.attach(self._name)
            if larger is not None:
                ring.close()
                self._ring, self._missing_since = larger, None
            elif self._missing_since is None:
                self._missing_since = monotonic()
            return None
        if written <= self._seen:
            return None
        at = _HEAD.size + (written - 1) % slots * slot
        header = unpack(ring.memory[at : at + HEADER.size])
        if header is None or header.sequence != written - 1 or header.size > slot - HEADER.size:
            return None
        start = at + HEADER.size
        mask = header.mask(ring.memory[start : start + header.size])
        if mask is not None:
            self._seen = written
        return mask


class _Ring:
    """A read-only view of the memory. (A ``SharedMemory`` would remove the memory when the reader
    ends, before Python 3.13.)"""

    def __init__(self, file: BinaryIO, memory: mmap.mmap) -> None:
        self._file = file
        self.memory = memory

    @classmethod
    def attach(cls, name: str) -> _Ring | None:
        """None if there is none, or none yet."""
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context((_FOLDER / name).open("rb"))
                memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            except (OSError, ValueError):  # it is missing, or was made this moment and is empty
                return None
            stack.enter_context(memory)
            if len(memory) < _HEAD.size or memory[: len(_MAGIC)] != _MAGIC:
                return None
            stack.pop_all()
            return cls(file, memory)

    def head(self) -> tuple[bytes, int, int, int, int, int]:
        """Magic, process, slots, state, bytes of a slot, masks written."""
        return _HEAD.unpack_from(self.memory)

    @property
    def ended(self) -> bool:
        state = self.head()[3]
        # Without a name it belongs to a writer that is gone, or that has made a larger one.
        gone = os.fstat(self._file.fileno()).st_nlink == 0 and state != _REPLACED
        return state == _ENDED or gone

    def close(self) -> None:
        self.memory.close()
        self._file.close()


def _make_way(name: str) -> None:
    """Remove what a dead process left under this name. Raises OutputError for anything else."""
    place = _FOLDER / name
    if not place.exists():
        return
    ring = _Ring.attach(name)
    if ring is None:
        raise OutputError(f"{place} exists and holds no masks; choose another name")
    process = ring.head()[1]
    ring.close()
    if _alive(process):
        raise OutputError(f"process {process} writes to shared memory {name}; choose another name")
    with contextlib.suppress(FileNotFoundError):
        place.unlink()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
