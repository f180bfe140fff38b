"""Raw class maps for another process: the framing, the sink that writes them, the reader.

``Pipe`` sends bytes to stdout or another descriptor without ever hanging on whoever reads them.

Each mask is a header of 64 bytes (``HEADER``, little-endian) and then its pixels, row by row:

    4s  "KNM1"           Q  sequence number, from 0, without gaps
    H   flags            Q  frame index
    H   bytes per pixel  d  PTS in seconds, or NaN
    I   height           d  wall time in seconds since the epoch, or NaN
    I   width            I  CRC-32 of the pixels
                         12 bytes, 0

Flag 1 marks a stale frame: it is shown again because no newer one came.
"""

from __future__ import annotations

import math
import os
import select
import stat
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from struct import Struct
from time import monotonic
from typing import BinaryIO

import msgspec
import numpy as np

from knet_runtime.errors import ConfigError, OutputClosed, OutputError, SourceError
from knet_runtime.segmentation import Segmentation
from knet_runtime.types import MAX_PIXELS, ClassMap, Frame

if sys.platform != "win32":
    import fcntl

STDOUT = "-"
"""What stands for stdout where a file could be named."""

# A pipe that is ready takes this much without blocking (POSIX: PIPE_BUF is at least 512, on Linux
# 4096), so a reader that stops reading cannot hold us.
_PIECE = getattr(select, "PIPE_BUF", 512)  # absent where there is no poll either


class Pipe:
    """Sends whole messages; ``name`` is what it is called in errors.

    ``descriptor`` (None: stdout) is a pipe, socket, terminal or file and stays open; a stdout that
    is closed is an OutputError. A reader that takes its time makes ``send`` wait. One that takes
    not a byte for ``patience`` seconds is an OutputError, and one that closes its end an
    OutputClosed; nothing more can be sent then.
    """

    def __init__(self, name: str, descriptor: int | None = None, *, patience: float = 10.0) -> None:
        self.name = name
        if descriptor is None:
            if sys.stdout is None:
                raise OutputError(f"{name}: stdout is closed; name a file")
            sys.stdout.flush()  # what was printed comes before
            descriptor = sys.stdout.fileno()
            if not _takes_bytes(descriptor):
                raise OutputError(f"{name}: stdout is closed; name a file")
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
            raise self._problem(error) from error

    def close(self, *, complete: bool = True) -> None:
        """Send nothing more; the descriptor is its owner's. Raises OutputError where what was sent
        to a file cannot be brought to the disk."""
        was_open, self._closed = not self._closed, True
        if self._is_file and was_open:
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                raise self._problem(error) from error

    def _problem(self, error: OSError) -> OutputError:
        return OutputError(f"{self.name}: {error.strerror}; write to another place")

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


def _takes_bytes(descriptor: int) -> bool:
    if sys.platform == "win32":
        return True
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
    except OSError:
        return False


HEADER = Struct("<4sHHIIQQddI12x")
MAGIC = b"KNM1"
_STALE = 1


class RawMask(msgspec.Struct, frozen=True):
    """One mask as it was read: ``class_map`` uint8 or uint16 [H, W].

    ``sequence`` counts what was written, ``index`` is the frame's; ``pts`` in seconds, ``wall`` in
    seconds since the epoch; ``stale`` marks a frame that was shown again.
    """

    class_map: ClassMap
    sequence: int
    index: int
    pts: float | None
    wall: float | None
    stale: bool


class Header(msgspec.Struct, frozen=True):
    """What stands before the pixels, understood and checked."""

    shape: tuple[int, int]
    depth: int
    sequence: int
    index: int
    pts: float | None
    wall: float | None
    stale: bool
    crc: int

    @property
    def size(self) -> int:
        """Bytes of the pixels."""
        return self.shape[0] * self.shape[1] * self.depth

    def mask(self, pixels: bytes) -> RawMask | None:
        """The mask of these pixels, None if they are not the ones that were written."""
        if zlib.crc32(pixels) != self.crc:
            return None
        stored = np.frombuffer(pixels, f"<u{self.depth}").reshape(self.shape)
        class_map = stored.astype(f"=u{self.depth}", copy=False)
        return RawMask(class_map, self.sequence, self.index, self.pts, self.wall, self.stale)


def pack(frame: Frame, result: Segmentation, sequence: int) -> tuple[bytes, memoryview]:
    """The header and the pixels of one mask."""
    class_map = result.class_map
    pixels = np.ascontiguousarray(class_map, f"<u{class_map.itemsize}").data.cast("B")
    header = HEADER.pack(
        MAGIC,
        _STALE if frame.stale else 0,
        class_map.itemsize,
        *class_map.shape,
        sequence,
        frame.index,
        math.nan if frame.pts is None else float(frame.pts),
        math.nan if frame.wall is None else frame.wall,
        zlib.crc32(pixels),
    )
    return header, pixels


def unpack(data: bytes) -> Header | None:
    """The header in these 64 bytes, None if it is none."""
    magic, flags, depth, height, width, sequence, index, pts, wall, crc = HEADER.unpack(data)
    if magic != MAGIC or depth not in (1, 2) or height * width > MAX_PIXELS:
        return None
    pts, wall = (None if math.isnan(time) else time for time in (pts, wall))
    return Header((height, width), depth, sequence, index, pts, wall, bool(flags & _STALE), crc)


def read_masks(stream: BinaryIO) -> Iterator[RawMask]:
    """What ``RawMasks`` writes, from the other end of the pipe, until it ends.

    Raises SourceError for anything else, and when the stream breaks off within a mask.

        >>> import io
        >>> from knet_deploy import read_masks
        >>> list(read_masks(io.BytesIO()))
        []
    """
    while head := _read(stream, HEADER.size):
        header = unpack(head) if len(head) == HEADER.size else None
        if header is None:
            raise SourceError("the stream holds no raw masks; write them with --raw -")
        pixels = _read(stream, header.size)
        mask = header.mask(pixels) if len(pixels) == header.size else None
        if mask is None:
            raise SourceError(f"the stream breaks off within mask {header.sequence}")
        yield mask


def _read(stream: BinaryIO, size: int) -> bytes:
    parts = []
    while size and (part := stream.read(size)):  # an unbuffered pipe gives less than it is asked
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


class RawMasks:
    """Writes raw class maps to stdout, or to the pipe, socket or file of another descriptor.

    ``Pipe`` says what becomes of a slow reader. The descriptor stays open. Raises
    ConfigError for a terminal.

        >>> from knet_deploy import RawMasks, Segmenter, open_source, read_masks
        >>> with open("masks.raw", "wb") as file, open_source("street.png") as source:
        ...     sink = RawMasks(file.fileno())
        ...     with Segmenter() as segment:
        ...         for frame in source:
        ...             sink.write(frame, segment(frame.image))
        ...     sink.close()
        >>> with open("masks.raw", "rb") as file:
        ...     [mask.class_map.shape for mask in read_masks(file)]
        [(360, 480)]
    """

    path: Path | None = None

    def __init__(self, descriptor: int | None = None, *, patience: float = 10.0) -> None:
        self.name = "raw masks on stdout" if descriptor is None else "raw masks"
        self._pipe = Pipe(self.name, descriptor, patience=patience)
        if self._pipe.is_terminal:
            raise ConfigError("raw masks are no text for a terminal: pipe them into a program")
        self._sequence = 0

    def write(self, frame: Frame, result: Segmentation) -> None:
        """Write one mask. Raises OutputError and OutputClosed."""
        self._pipe.send(*pack(frame, result, self._sequence))
        self._sequence += 1

    def close(self, *, complete: bool = True) -> None:
        """Nothing is left to be written; the descriptor is its owner's."""
        self._pipe.close()
