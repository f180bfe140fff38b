"""A video file (MP4 or Matroska) that a killed process leaves playable."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Literal

import av

from knet_runtime.output.encoder import ENCODERS, add_stream, video_frame
from knet_runtime.overlay import Rgb

VideoFormat = Literal["mp4", "matroska"]

INDEXED_FRAMES = 100_000
"""An MP4 of more pictures than this stays in fragments: its index would be kept in memory, 72 bytes
a picture, until the end."""

WRITE_ERRORS = (av.FFmpegError, OSError)

# MP4: fragments while it is written, so that a killed process leaves a file that plays up to the
# last whole group of pictures; the trailer then turns it into an ordinary MP4. Fragments have no
# edit list (asking for one breaks them in several FFmpeg versions), so there must be no B-frames,
# which would delay the first picture, and the first time must be 0.
# Matroska: a cluster is written when it is whole, so they are kept short.
_MUXER: dict[VideoFormat, dict[str, str]] = {
    "mp4": {"movflags": "hybrid_fragmented+frag_keyframe", "flush_packets": "1"},
    "matroska": {"cluster_time_limit": "1000", "flush_packets": "1"},
}
_ENDLESS_MP4 = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}


class VideoWriter:
    """An H.264 or HEVC file of pictures of one size, odd sides padded to even ones.

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

    def write(self, picture: Rgb, ticks: int) -> None:
        """Add uint8 [H, W, 3] RGB at a time that is later than the last one's; the first is 0."""
        try:
            frame = video_frame(picture, ticks, self._tick)
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
    """Whether at least one picture of the file can be decoded."""
    try:
        with av.open(f"file:{path}", "r", format=video_format) as container:
            return next(container.decode(video=0), None) is not None
    except (av.FFmpegError, OSError, IndexError):
        return False
