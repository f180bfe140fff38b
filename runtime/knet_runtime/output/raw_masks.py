"""Raw class maps for another process: the framing, the sink that writes it to a pipe, the reader.

Each mask is a header of 64 bytes (``HEADER``, little-endian) and then its pixels, row by row:

    4s  "KNM1"           Q  sequence number, from 0, without gaps
    H   flags            Q  frame index
    H   bytes per pixel  d  PTS in seconds, or NaN
    I   height           d  wall time in seconds since the epoch, or NaN
    I   width            I  CRC-32 of the pixels
                         12 bytes, 0

Flag 1 marks a stale picture: it is shown again because no newer one came.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING, BinaryIO

import msgspec
import numpy as np

from knet_runtime.errors import ConfigError, SourceError
from knet_runtime.frames import MAX_PIXELS, Frame
from knet_runtime.output.pipe import Pipe
from knet_runtime.overlay import ClassMap
from knet_runtime.pending import Keep

if TYPE_CHECKING:
    from knet_runtime.segmenter import Mask

HEADER = Struct("<4sHHIIQQddI12x")
MAGIC = b"KNM1"
_STALE = 1


class RawMask(msgspec.Struct, frozen=True):
    """One mask as it was read: ``class_map`` uint8 or uint16 [H, W].

    ``sequence`` counts what was written, ``index`` is the frame's; ``pts`` in seconds, ``wall`` in
    seconds since the epoch; ``stale`` marks a picture that was shown again.
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
        class_map: ClassMap
        if self.depth == 2:
            class_map = np.frombuffer(pixels, "<u2").astype(np.uint16, copy=False)
        else:
            class_map = np.frombuffer(pixels, np.uint8)
        class_map = class_map.reshape(self.shape)
        return RawMask(class_map, self.sequence, self.index, self.pts, self.wall, self.stale)


def pack(frame: Frame, mask: Mask, sequence: int) -> tuple[bytes, memoryview]:
    """The header and the pixels of one mask."""
    class_map = mask.class_map
    kind = "u1" if class_map.dtype == np.uint8 else "<u2"
    pixels = np.ascontiguousarray(class_map, kind).data.cast("B")
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
    return Header(
        (height, width),
        depth,
        sequence,
        index,
        None if math.isnan(pts) else pts,
        None if math.isnan(wall) else wall,
        bool(flags & _STALE),
        crc,
    )


def read_masks(stream: BinaryIO) -> Iterator[RawMask]:
    """What ``RawMasks`` writes, from the other end of the pipe, until it ends.

    Raises SourceError for anything else, and when the stream breaks off within a mask.
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

    ``output.pipe.Pipe`` says what becomes of a slow reader. The descriptor stays open. Raises
    ConfigError for a terminal.
    """

    path: Path | None = None

    def __init__(self, descriptor: int | None = None, *, patience: float = 10.0) -> None:
        self.name = "raw masks on stdout" if descriptor is None else "raw masks"
        self._pipe = Pipe(self.name, descriptor, patience=patience)
        if self._pipe.is_terminal:
            raise ConfigError("raw masks are no text for a terminal: pipe them into a program")
        self._sequence = 0

    def write(self, frame: Frame, mask: Mask) -> None:
        """Write one mask. Raises OutputError and OutputClosed."""
        self._pipe.send(*pack(frame, mask, self._sequence))
        self._sequence += 1

    def close(self, keep: Keep = "complete") -> None:
        """Nothing is left to be written; the descriptor is its owner's."""
        self._pipe.close()
