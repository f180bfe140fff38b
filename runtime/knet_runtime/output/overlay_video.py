"""The sink for the overlay as a video, with the source's own timing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from knet_runtime.errors import ConfigError
from knet_runtime.frames import Frame, SourceInfo
from knet_runtime.output.encoder import ENCODERS, Codec, working_encoder
from knet_runtime.output.frame_clock import FrameClock
from knet_runtime.output.painter import Painter
from knet_runtime.output.video_file import (
    INDEXED_FRAMES,
    WRITE_ERRORS,
    VideoFormat,
    VideoWriter,
    is_playable,
)
from knet_runtime.pending import Keep, PendingFile, output_error

if TYPE_CHECKING:
    from knet_runtime.segmenter import Mask

_log = logging.getLogger(__name__)

_FORMATS: dict[str, VideoFormat] = {".mp4": "mp4", ".mkv": "matroska"}
_MILLISECOND = Fraction(1, 1000)


class OverlayVideo:
    """Writes each frame under its colours to ``path``, an MP4 or MKV by its suffix.

    ``info`` is the source's; ``alpha`` the colours' opacity (0 … 1); ``legend`` adds a strip of
    class names and shares below the picture; ``classes`` names those that are drawn (none: all).
    The video is H.264, or HEVC by ``codec``; ``encoders`` are FFmpeg's names in the order in which
    they are tried.

    The first frame sets the size: odd sides are padded to even ones, and frames of another size
    are letterboxed. Times are the frames' own, counted from the first frame, to the tick of
    ``info.time_base`` (MKV: to the millisecond), so that gaps stay gaps; a missing one follows the
    last at the source's rate, or at 30 a second. Images become a slideshow of two a second. A live
    source is encoded at low latency; a stale frame is marked in red, at the time it is shown. The
    MP4 of a live source, or of more than 100,000 frames, stays in fragments: its index would grow
    in memory.

    Until ``close`` the file has a hidden name beside ``path``. Raises OutputError when it can
    not be written or no encoder works, ConfigError for another suffix, a wrong alpha or classes
    that the model does not have.
    """

    SUFFIXES = tuple(_FORMATS)

    def __init__(
        self,
        path: str | Path,
        info: SourceInfo,
        *,
        alpha: float = 0.5,
        legend: bool = False,
        classes: Sequence[str] = (),
        codec: Codec = "h264",
        encoders: Sequence[str] | None = None,
    ) -> None:
        self._path = Path(path)
        video_format = _FORMATS.get(self._path.suffix.lower())
        if video_format is None:
            raise ConfigError(f"{path}: the overlay is a video: let its name end in .mp4 or .mkv")
        if codec not in ENCODERS:
            raise ConfigError(f"the codec is {codec!r}; use h264 or hevc")
        self._format: VideoFormat = video_format
        self._painter = Painter(alpha=alpha, legend=legend, classes=classes)
        self._encoder = working_encoder(encoders or ENCODERS[codec], info.hw)
        self._live = info.live
        self._endless = info.live or (info.frames or 0) > INDEXED_FRAMES
        self._clock = FrameClock(info, _MILLISECOND if video_format == "matroska" else None)
        self._failed = False
        self._writer: VideoWriter | None = None
        self._pending: PendingFile | None = PendingFile(self._path)

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return str(self._path)

    @property
    def path(self) -> Path:
        """Where the finished file will be."""
        return self._path

    @property
    def retimed(self) -> int:
        """How many frames had a time that is not after the last one's, and were moved."""
        return self._clock.retimed

    def write(self, frame: Frame, mask: Mask) -> None:
        """Add one frame; ``mask`` has its size. Raises OutputError when it can not be written."""
        if self._pending is None:
            raise ValueError(f"{self._path} is closed")
        picture = self._painter.paint(frame, mask)
        try:
            if self._writer is None:
                self._pending.start()
                self._writer = VideoWriter(
                    self._pending.temporary,
                    (picture.shape[0], picture.shape[1]),
                    self._clock.tick(frame.pts),
                    self._clock.rate,
                    self._encoder,
                    video_format=self._format,
                    live=self._live,
                    endless=self._endless,
                )
            self._writer.write(picture, self._clock.ticks(frame))
        except WRITE_ERRORS as error:
            self._failed = True
            raise output_error(self._path, error) from error

    def close(self, keep: Keep = "complete") -> None:
        """Finish the file and rename it to ``path``, or for "partial" to ``NAME.partial.SUFFIX``.

        Without frames nothing is left. A second call does nothing. Raises OutputError when it can
        not be finished; if it plays all the same it is kept as partial.
        """
        pending, self._pending = self._pending, None
        writer, self._writer = self._writer, None
        if pending is None:
            return
        if writer is None:
            pending.discard()
            return
        problem: Exception | None = None
        try:
            writer.close()
        except WRITE_ERRORS as error:
            problem = error
        if self.retimed:
            _log.warning("%s: moved %d frames whose time ran back", self._path, self.retimed)
        if problem is None and not self._failed:
            pending.commit(keep)
        elif is_playable(pending.temporary, self._format):
            pending.commit("partial")
        else:
            pending.discard()
        if problem is not None and not self._failed:  # else write() has raised it already
            raise output_error(self._path, problem) from problem
