"""Whether a video file is damaged, and where that begins."""

from __future__ import annotations

import logging
from pathlib import Path

import av

from knet_runtime.errors import SourceError

_log = logging.getLogger(__name__)


class Damage:
    """Where a file is damaged: in packets, as threads hold some frames back.

    Counting begins at a key frame: a recording that begins between two of them is not damaged for
    that.
    """

    def __init__(self) -> None:
        self.at: int | None = None  # whole packets before the damage
        self.pictures = 0
        self._good = 0
        self._patched = 0

    def began(self) -> None:
        """It begins here, unless it did before."""
        if self.at is None:
            self.at = self._good

    def count(
        self, packet: av.Packet[av.VideoStream], pictures: list[av.VideoFrame] | None
    ) -> None:
        """Count a packet and what it was decoded to (None: nothing, it is damaged)."""
        if pictures is None:
            if self._good:
                self.began()
            return
        self._good += bool(self._good or packet.is_keyframe)
        self._patched += sum(picture.is_corrupt for picture in pictures)
        self.pictures += len(pictures)

    def report(self, name: str) -> None:
        """Warn of patched pictures. Raises SourceError where something was damaged."""
        if self._patched:
            _log.warning("%s: %d damaged frames were patched up to be read", name, self._patched)
        if self.at is not None and self.pictures:
            whole = min(self.at, self.pictures)
            raise SourceError(
                f"{name}: is damaged after {whole} frames ({self.pictures} could be read); "
                "copy or export it again"
            )


def is_cut_off(path: Path) -> bool:
    """Whether an MP4's boxes end after the file does: its demuxer then just reports the end."""
    length = path.stat().st_size
    with path.open("rb") as file:
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
