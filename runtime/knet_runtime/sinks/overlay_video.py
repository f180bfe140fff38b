"""The sink for the overlay as a video (MP4 or Matroska), with the source's own timing.

From the outside in: ``OverlayVideo`` draws and names the file, ``FrameClock`` says when each frame
is shown, ``VideoWriter`` writes what a killed process leaves playable.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from time import monotonic
from typing import Literal

import av

from knet_runtime.atomic import AtomicFile, output_error
from knet_runtime.errors import ConfigError
from knet_runtime.segmentation import Segmentation
from knet_runtime.sinks.encoder import ENCODERS, Codec, add_stream, video_frame, working_encoder
from knet_runtime.sinks.painter import OverlayPainter
from knet_runtime.sources.base import SourceInfo
from knet_runtime.types import Frame, Rgb

VideoFormat = Literal["mp4", "matroska"]

INDEXED_FRAMES = 100_000
"""An MP4 of more frames than this stays in fragments: its index would be kept in memory, 72 bytes
a frame, until the end."""

WRITE_ERRORS = (av.FFmpegError, OSError)

# MP4: fragments while it is written, so that a killed process leaves a file that plays up to the
# last whole group of frames; the trailer then turns it into an ordinary MP4. Fragments have no
# edit list (asking for one breaks them in several FFmpeg versions), so there must be no B-frames,
# which would delay the first frame, and the first time must be 0.
# Matroska: a cluster is written when it is whole, so they are kept short.
_MUXER: dict[VideoFormat, dict[str, str]] = {
    "mp4": {"movflags": "hybrid_fragmented+frag_keyframe", "flush_packets": "1"},
    "matroska": {"cluster_time_limit": "1000", "flush_packets": "1"},
}
_ENDLESS_MP4 = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}


class VideoWriter:
    """An H.264 or HEVC file of frames of one size, odd sides padded to even ones.

    ``hw`` is that size, ``tick`` the unit of times in seconds (Matroska knows milliseconds only),
    ``rate`` the nominal frames per second (it guides the encoder only), ``encoder`` a name from
    ``working_encoder``; ``live`` sets it to low latency, ``endless`` keeps an MP4 in fragments, so
    that memory does not grow with its length. All methods raise one of ``WRITE_ERRORS``.
    """

    def __init__(
        self,
        path: Path,
        hw: tuple[int, int],
        tick: Fraction,
        rate: Fraction,
        encoder: str,
        *,
        video_format: VideoFormat = "mp4",
        live: bool = False,
        endless: bool = False,
    ) -> None:
        self._tick = tick
        self._failed = False
        muxer = _ENDLESS_MP4 if endless and video_format == "mp4" else _MUXER[video_format]
        # Without "file:" a colon in the name would be taken for a protocol.
        self._container = av.open(f"file:{path}", "w", format=video_format, options=muxer)
        self._stream = add_stream(self._container, encoder, hw, tick, rate, live=live)
        if video_format == "mp4" and encoder in ENCODERS["hevc"]:
            self._stream.codec_context.codec_tag = "hvc1"  # Apple's players know no other

    def write(self, image: Rgb, ticks: int) -> None:
        """Add uint8 [H, W, 3] RGB at a time that is later than the last one's; the first is 0."""
        try:
            frame = video_frame(image, ticks, self._tick)
            self._container.mux(self._stream.encode(frame))
        except WRITE_ERRORS:
            self._failed = True
            raise

    def close(self) -> None:
        """Write what the encoder still holds, and the index; the file is closed in any case."""
        try:
            # After a header that could not be written FFmpeg crashes on the next packet.
            if not self._failed:
                self._container.mux(self._stream.encode(None))
        finally:
            self._container.close()


def is_playable(path: Path, video_format: VideoFormat = "mp4") -> bool:
    """Whether at least one frame of the file can be decoded."""
    try:
        with av.open(f"file:{path}", "r", format=video_format) as container:
            return next(container.decode(video=0), None) is not None
    except (av.FFmpegError, OSError, IndexError):
        return False


_SLIDESHOW_RATE = Fraction(2)
_DEFAULT_RATE = Fraction(30)
_FINEST_TICK = Fraction(1, 1_000_000_000)  # MP4 counts ticks per second in 31 bits


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
        now, arrived = self._ticks(frame), monotonic()
        if not frame.stale:
            self._fresh = (now, arrived)
        self._last = now
        return now

    def _ticks(self, frame: Frame) -> int:
        tick = self.tick(frame.pts)
        last = self._last
        period = max(1, round(1 / self.rate / tick))
        if last is not None and frame.stale:
            # It has the time of the frame that it repeats; it is shown now.
            since = Fraction(monotonic() - self._fresh[1])
            return max(last + 1, self._fresh[0] + round(since / tick))
        if frame.pts is None:
            now = 0 if last is None else last + period
        else:
            if last is None:
                self._offset = -round(frame.pts / tick)
            now = round(frame.pts / tick) + self._offset
        if last is not None and now <= last:
            self.retimed += 1
            if (last - now) * tick > 1:  # the source's clock began anew: go on from here
                self._offset += last + period - now
                return last + period
            return last + 1
        return now


_log = logging.getLogger(__name__)

_FORMATS: dict[str, VideoFormat] = {".mp4": "mp4", ".mkv": "matroska"}
_MILLISECOND = Fraction(1, 1000)


class OverlayVideo:
    """Writes each frame under its colours to ``path``, an MP4 or MKV by its suffix.

    ``info`` is the source's; ``alpha`` the colours' opacity (0 … 1); ``legend`` adds a strip of
    class names and shares below the frame; ``classes`` names those that are drawn (none: all).
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

        >>> from knet_deploy import OverlayVideo, Segmenter, open_source
        >>> with open_source("drive.mp4") as source, Segmenter() as segment:
        ...     sink = OverlayVideo("overlay.mp4", source.info, legend=True)
        ...     for frame in source:
        ...         sink.write(frame, segment(frame.image))
        ...     sink.close()
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
        self.path = Path(path)
        self.name = str(path)
        video_format = _FORMATS.get(self.path.suffix.lower())
        if video_format is None:
            raise ConfigError(f"{path}: the overlay is a video: let its name end in .mp4 or .mkv")
        if codec not in ENCODERS:
            raise ConfigError(f"the codec is {codec!r}; use h264 or hevc")
        self._format: VideoFormat = video_format
        self._painter = OverlayPainter(alpha=alpha, legend=legend, classes=classes)
        self._encoder = working_encoder(encoders or ENCODERS[codec], info.hw)
        self._live = info.live
        self._endless = info.live or (info.frames or 0) > INDEXED_FRAMES
        self._clock = FrameClock(info, _MILLISECOND if video_format == "matroska" else None)
        self._failed = False
        self._writer: VideoWriter | None = None
        self._pending: AtomicFile | None = AtomicFile(self.path)

    @property
    def retimed(self) -> int:
        """How many frames had a time that is not after the last one's, and were moved."""
        return self._clock.retimed

    def write(self, frame: Frame, result: Segmentation) -> None:
        """Add one frame; ``result`` has its size. Raises OutputError when it cannot be written."""
        if self._pending is None:
            raise ValueError(f"{self.path} is closed")
        image = self._painter.paint(frame, result)
        try:
            if self._writer is None:
                self._pending.start()
                self._writer = VideoWriter(
                    self._pending.temporary,
                    (image.shape[0], image.shape[1]),
                    self._clock.tick(frame.pts),
                    self._clock.rate,
                    self._encoder,
                    video_format=self._format,
                    live=self._live,
                    endless=self._endless,
                )
            self._writer.write(image, self._clock.ticks(frame))
        except WRITE_ERRORS as error:
            self._failed = True
            raise output_error(self.path, error) from error

    def close(self, *, complete: bool = True) -> None:
        """Finish the file and rename it to ``path``, or, unless complete, to
        ``NAME.partial.SUFFIX``.

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
            _log.warning("%s: moved %d frames whose time ran back", self.path, self.retimed)
        if problem is None and not self._failed:
            pending.commit(complete=complete)
        elif is_playable(pending.temporary, self._format):
            pending.commit(complete=False)
        else:
            pending.discard()
        if problem is not None and not self._failed:  # else write() has raised it already
            raise output_error(self.path, problem) from problem
