"""What is damaged inside a video: how much of it, and where it begins."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from knet_runtime.errors import SourceError
from knet_runtime.sources.times import Packet

_log = logging.getLogger(__name__)

_SYNC = 0x47
_OUTSPOKEN = ("h264", "mpeg1video", "mpeg2video", "mpeg4")  # decoders that mark cut pictures
_CHUNK = 1 << 16  # packets


class DamageReport:
    """Where a file is damaged: in packets, as threads hold some frames back.

    Counting begins at a key frame: a recording that begins between two of them is not damaged for
    that. Whether packets that are marked as corrupt are, is looked into in the end.
    """

    def __init__(self) -> None:
        self.at: int | None = None  # whole packets before the damage
        self.frames = 0
        self._good = 0
        self._patched = 0
        self._marked: list[tuple[int, int | None]] = []  # whole packets before it, and its place
        self._read_to = 0

    def began(self) -> None:
        """It begins here, unless it did before."""
        if self.at is None:
            self.at = self._good

    def count(self, packet: Packet, frames: list[av.VideoFrame] | None) -> None:
        """Count a packet and what it was decoded to (None: nothing, it is damaged)."""
        self._read_to = max(self._read_to, packet.pos or 0)
        if frames is None:
            if self._good:
                self.began()
            return
        if packet.is_corrupt and self._good:
            self._marked.append((self._good, packet.pos))
        self._good += bool(self._good or packet.is_keyframe)
        self._patched += sum(decoded.is_corrupt for decoded in frames)
        self.frames += len(frames)

    def report(self, name: str, path: Path | None, stream: av.VideoStream) -> None:
        """Warn of patched frames and of joints. Raises SourceError where something was damaged.

        ``path`` is that of a transport stream, whose packets can be looked at; of others only the
        frames are known.
        """
        if self._patched:
            _log.warning("%s: %d damaged frames were patched up to be read", name, self._patched)
        if self._marked:
            (first, place), *_ = self._marked
            if path is None or place is None:
                whole = not self._patched
            else:
                heard = not self._patched and stream.codec_context.name in _OUTSPOKEN
                whole = pictures_are_whole(path, stream.id, place, self._read_to, cut_shows=heard)
            if whole:
                _log.warning(
                    "%s: the counters of its packets jump, as where recordings were joined; every "
                    "frame that is there is whole",
                    name,
                )
            else:
                self.at = first if self.at is None else min(self.at, first)
        if self.at is not None and self.frames:
            whole_frames = min(self.at, self.frames)
            raise SourceError(
                f"{name}: is damaged after {whole_frames} frames ({self.frames} could be read); "
                "copy or export it again"
            )


def pictures_are_whole(path: Path, pid: int, begin: int, end: int, *, cut_shows: bool) -> bool:
    """Whether the counters of an MPEG transport stream jump only from picture to picture.

    The packet after such a jump begins a picture, and the one before it is the last of one: it is
    filled up, or (rarely) just full. That it is full is taken for a cut picture unless that would
    show otherwise (``cut_shows``). The packets of ``pid`` between two places in the file are looked
    at.
    """
    counter, filled = -1, False
    with path.open("rb") as file:
        file.seek(begin)
        stride, shift = _layout(file.read(1024))
        if not stride:
            return False
        file.seek(begin + shift)
        while file.tell() <= end:
            data = np.frombuffer(file.read(stride * _CHUNK), np.uint8)
            packets = data[: len(data) // stride * stride].reshape(-1, stride)
            if not len(packets):
                break
            if (packets[:, 0] != _SYNC).any():
                return False
            video = packets[(packets[:, 1] & 31).astype(int) * 256 + packets[:, 2] == pid]
            if (video[:, 1] & 128).any():  # the receiver marked it
                return False
            video = video[video[:, 3] & 16 != 0]  # those with a payload are counted
            if not len(video):
                continue
            counters = np.append(counter, video[:, 3] & 15)
            fillings = np.append(filled, _filled(video))
            jumps = np.diff(counters) % 16 != 1
            jumps[0] &= counter >= 0
            starts = video[:, 1] & 64 != 0
            if (jumps & ~(starts & (fillings[:-1] | cut_shows))).any():
                return False
            counter, filled = int(counters[-1]), bool(fillings[-1])
    return True


def _layout(data: bytes) -> tuple[int, int]:
    """How many bytes a packet takes, and where the first one begins; (0, 0) for no such stream."""
    for stride in (188, 192, 204):
        for shift in range(stride):
            if data[shift : shift + 5 * stride : stride] == bytes([_SYNC]) * 5:
                return stride, shift
    return 0, 0


def _filled(packets: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which packets have an adaptation field longer than what it holds."""
    length, flags = packets[:, 4].astype(int), packets[:, 5]
    needed = 1 + 6 * (flags & 16 != 0) + 6 * (flags & 8 != 0) + (flags & 4 != 0)
    return np.asarray((packets[:, 3] & 32 != 0) & ((length == 0) | (length > needed)))


def is_cut_off(path: Path) -> bool:
    """Whether an MP4's boxes end after the file does: its demuxer then just reports the end. Not
    known, and so not said, of a file that was removed meanwhile."""
    try:
        file = path.open("rb")
    except OSError:
        return False
    with file:
        length = os.fstat(file.fileno()).st_size
        offset = 0
        while offset + 8 <= length:
            file.seek(offset)
            header = file.read(16)
            size = int.from_bytes(header[:4], "big")
            if size == 1:
                size = int.from_bytes(header[8:], "big")
            if size == 0:  # up to the end
                return False
            if size < 8:
                return True
            offset += size
    return offset > length
