"""The sinks for the overlay: frames under their colours, as one image or as a video.

``FrameClock`` says when each frame of a video is shown, also of one that is pushed to a server.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from time import monotonic

from knet_runtime.atomic import AtomicFile, output_error
from knet_runtime.drawing import encode_jpeg, encode_png
from knet_runtime.errors import ConfigError, OutputError
from knet_runtime.growing import GrowingFile
from knet_runtime.segmentation import Segmentation
from knet_runtime.sinks.encoder import (
    ENCODERS,
    WRITE_ERRORS,
    Codec,
    VideoFormat,
    VideoWriter,
    is_playable,
    working_encoder,
)
from knet_runtime.sinks.look import Look, OverlayPainter
from knet_runtime.sources.base import SourceInfo
from knet_runtime.types import Frame

_log = logging.getLogger(__name__)

_FORMATS: dict[str, VideoFormat] = {".mp4": "mp4", ".mkv": "matroska"}
_MILLISECOND = Fraction(1, 1000)
_SLIDESHOW_RATE = Fraction(2)
_DEFAULT_RATE = Fraction(30)
_FINEST_TICK = Fraction(1, 1_000_000_000)  # MP4 counts ticks per second in 31 bits

JPEG_QUALITY = 95
"""Of overlays that are kept as JPEG."""

INDEXED_FRAMES = 100_000
"""An MP4 of more frames than this stays in fragments: its index would be kept in memory, 72 bytes
a frame, until the end."""


class OverlayImage:
    """Writes one frame under its colours to ``path``, a PNG or JPEG by its suffix.

    The file appears whole at the first ``write``; a second one is refused. Raises OutputError when
    it cannot be written, ConfigError for another suffix or classes that the model does not have.

        >>> from knet_deploy import Look, OverlayImage, Segmenter, open_source
        >>> with open_source("street.png") as source, Segmenter() as segment:
        ...     sink = OverlayImage("overlay.png", Look(legend=True))
        ...     for frame in source:
        ...         sink.write(frame, segment(frame.image))
        ...     sink.close()
    """

    SUFFIXES = (".png", ".jpg", ".jpeg")

    def __init__(self, path: str | Path, look: Look = Look()) -> None:
        target = Path(path)
        self.path: Path | None = target
        self.name = str(path)
        if target.suffix.lower() not in self.SUFFIXES:
            raise ConfigError(f"{path}: let the image's name end in {' or '.join(self.SUFFIXES)}")
        self._painter = OverlayPainter(look, steady=False)
        self._file: AtomicFile | None = AtomicFile(target)

    def write(self, frame: Frame, result: Segmentation) -> None:
        """Write the image. Raises OutputError, also for a second one."""
        file, self._file = self._file, None
        if file is None:
            raise OutputError(f"{self.name}: holds one image; write several as an MP4")
        image = self._painter.paint(frame, result)
        try:
            png = file.target.suffix.lower() == ".png"
            data = encode_png(image) if png else encode_jpeg(image, JPEG_QUALITY)
        except ValueError as error:
            raise OutputError(f"{self.name}: {error}; write a PNG, or a smaller image") from error
        file.write(data)

    def close(self, *, complete: bool = True) -> None:
        """Nothing is left to do: the image is whole, or was never written; ``path`` is then
        None."""
        if self._file is not None:
            self._file = self.path = None


class FrameClock:
    """Times of frames as ever later whole ticks from 0, which is what a video takes.

    ``tick`` is their unit in seconds; by default the source's, where that is one that fits.
    """

    def __init__(self, info: SourceInfo, tick: Fraction | None = None) -> None:
        base = tick or info.time_base
        self._tick = base if base is not None and _FINEST_TICK <= base <= 1 else None
        still = info.kind in ("image", "images")
        self.rate = info.rate or (_SLIDESHOW_RATE if still else _DEFAULT_RATE)
        self._last: int | None = None
        self._offset = 0
        self._fresh = (0, 0.0)  # ticks of the last fresh frame, and when it came here
        self.retimed = 0

    def tick(self, first: Fraction | None) -> Fraction:
        """The unit in seconds, chosen once, with the first frame's time in hand."""
        if self._tick is None:
            self._tick = 1 / self.rate if first is None else Fraction(1, 90_000)
        return self._tick

    def ticks(self, frame: Frame) -> int:
        """The time of ``frame``, later than that of the one before."""
        tick, last, arrived = self.tick(frame.pts), self._last, monotonic()
        period = max(1, round(1 / self.rate / tick))
        stated = None if frame.pts is None else round(frame.pts / tick)
        if last is None:
            now, self._offset = 0, -(stated or 0)
        elif frame.stale:
            # It has the time of the frame that it repeats; it is shown now.
            since = Fraction(arrived - self._fresh[1])
            now = max(last + 1, self._fresh[0] + round(since / tick))
        elif stated is None:
            now = last + period
        else:
            now = stated + self._offset
            if (last - now) * tick > 1:  # the source's clock began anew: go on from here
                self._offset = last + period - stated
            if now <= last:
                self.retimed += 1
                now = max(last + 1, stated + self._offset)
        if not frame.stale:
            self._fresh = (now, arrived)
        self._last = now
        return now


class OverlayVideo:
    """Writes each frame under its colours to ``path``, an MP4 or MKV by its suffix.

    ``info`` is the source's. The video is H.264, or HEVC by ``codec``; ``encoders`` are FFmpeg's
    names in the order in which they are tried.

    The first frame sets the size: odd sides are padded to even ones, and frames of another size
    are letterboxed. Pixels are shown as wide as the source's (``info.sample_aspect``). Times are
    the frames' own, counted from the first frame, to the tick of ``info.time_base`` (MKV: to the
    millisecond), so that gaps stay gaps; a missing one follows the last at the source's rate, or at
    30 a second. Images become a slideshow of two a second. A live source is encoded at low latency;
    a stale frame is marked in red, at the time it is shown. The MP4 of a source without an end, or
    of more than 100,000 frames, stays in fragments: its index would grow in memory.

    Until ``close`` the file has a hidden name beside ``path``; what a killed run left is kept, from
    the next start on, as ``NAME.partial.SUFFIX``. Raises OutputError when it cannot be written or
    no encoder works, ConfigError for another suffix or classes that the model does not have.

        >>> from knet_deploy import Look, OverlayVideo, Segmenter, open_source
        >>> with open_source("drive.mp4") as source, Segmenter() as segment:
        ...     sink = OverlayVideo("overlay.mp4", source.info, Look(legend=True))
        ...     for frame in source:
        ...         sink.write(frame, segment(frame.image))
        ...     sink.close()
    """

    SUFFIXES = tuple(_FORMATS)

    def __init__(
        self,
        path: str | Path,
        info: SourceInfo,
        look: Look = Look(),
        *,
        codec: Codec = "h264",
        encoders: Sequence[str] | None = None,
    ) -> None:
        target = Path(path)
        self.path: Path | None = target
        self.name = str(path)
        video_format = _FORMATS.get(target.suffix.lower())
        if video_format is None:
            raise ConfigError(f"{path}: the overlay is a video: let its name end in .mp4 or .mkv")
        if codec not in ENCODERS:
            raise ConfigError(f"the codec is {codec!r}; use h264 or hevc")
        self._format: VideoFormat = video_format
        self._painter = OverlayPainter(look, steady=True)
        self._clock = FrameClock(info, _MILLISECOND if video_format == "matroska" else None)
        self._open = partial(
            VideoWriter,
            rate=self._clock.rate,
            encoder=working_encoder(encoders or ENCODERS[codec], self._painter.size(info.hw)),
            video_format=video_format,
            aspect=info.sample_aspect,
            live=info.live,
            endless=info.endless or (info.frames or 0) > INDEXED_FRAMES,
        )
        self._failed = False
        self._writer: VideoWriter | None = None
        self._pending: GrowingFile | None = GrowingFile(target)

    @property
    def retimed(self) -> int:
        """How many frames had a time that is not after the last one's, and were moved."""
        return self._clock.retimed

    def write(self, frame: Frame, result: Segmentation) -> None:
        """Add one frame; ``result`` has its size. Raises OutputError when it cannot be written."""
        if self._pending is None:
            raise ValueError(f"{self.name} is closed")
        image = self._painter.paint(frame, result)
        try:
            if self._writer is None:
                self._pending.start()
                tick = self._clock.tick(frame.pts)
                self._writer = self._open(self._pending.temporary, image.shape[:2], tick)
            self._writer.write(image, self._clock.ticks(frame))
        except WRITE_ERRORS as error:
            self._failed = True
            raise output_error(Path(self.name), error) from error

    def close(self, *, complete: bool = True) -> None:
        """Finish the file and rename it to ``path``, or, unless complete, to
        ``NAME.partial.SUFFIX``; ``path`` is then where it is.

        Without frames nothing is left, and ``path`` is None. A second call does nothing. Raises
        OutputError when it cannot be finished; if it plays all the same it is kept as partial.
        """
        pending, self._pending = self._pending, None
        writer, self._writer = self._writer, None
        if pending is None:
            return
        self.path = None
        if writer is None:
            pending.discard()
            return
        problem: Exception | None = None
        try:
            writer.close()
        except WRITE_ERRORS as error:
            problem = error
        if self.retimed:
            _log.warning("%s: moved %d frames whose time ran back", self.name, self.retimed)
        if problem is None and not self._failed:
            self.path = pending.commit(complete=complete)
        elif pending.is_lost or is_playable(pending.temporary, self._format):
            self.path = pending.commit(complete=False)
        else:
            pending.discard()
        if problem is not None and not self._failed:  # else write() has raised it already
            where = f"; what plays of it is kept in {self.path}" if self.path else ""
            raise OutputError(f"{output_error(Path(self.name), problem)}{where}") from problem
