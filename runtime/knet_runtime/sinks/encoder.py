"""RGB frames to H.264 or HEVC that plays everywhere, with whichever encoder works here.

``add_stream`` and ``video_frame`` serve any container; ``VideoWriter`` writes files that stay
playable when the process is killed.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import cv2
import numpy as np
from av.container import OutputContainer

from knet_runtime.errors import OutputError
from knet_runtime.types import Rgb, Size

Codec = Literal["h264", "hevc"]
VideoFormat = Literal["mp4", "matroska"]

ENCODERS: dict[Codec, tuple[str, ...]] = {
    "h264": ("libx264", "libopenh264", "h264_nvenc", "h264_qsv", "h264_v4l2m2m", "h264_amf"),
    "hevc": ("libx265", "hevc_nvenc", "hevc_qsv", "hevc_v4l2m2m", "hevc_amf"),
}
"""By codec, in the order in which they are tried."""

_OPTIONS = {
    "libx264": {"preset": "veryfast", "crf": "20"},
    # It would write its settings to stderr.
    "libx265": {"preset": "veryfast", "crf": "23", "x265-params": "log-level=error"},
}
_LIVE_OPTIONS = {"libx264": {"tune": "zerolatency"}, "libx265": {"tune": "zerolatency"}}
_BT709 = 1

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


def add_stream(
    container: OutputContainer,
    encoder: str,
    hw: Size,
    tick: Fraction,
    rate: Fraction,
    *,
    live: bool,
    aspect: Fraction = Fraction(1),
) -> av.VideoStream:
    """A stream (yuv420p, BT.709) of frames of size ``hw``, odd sides padded to even ones.

    ``tick`` is the unit of times in seconds, ``rate`` the nominal frames per second, which guides
    the encoder only. ``live`` frames come out as soon as they are in. ``aspect`` is how much wider
    than high a pixel is to be shown.
    """
    options = _OPTIONS.get(encoder, {}) | (_LIVE_OPTIONS.get(encoder, {}) if live else {})
    stream = container.add_stream(encoder, rate=rate, options=options)
    assert isinstance(stream, av.VideoStream)
    context = stream.codec_context
    _configure(context, hw, tick)
    # Key frames every two seconds, live every second: what a killed process loses at most, and how
    # long who joins a stream waits.
    context.gop_size = max(1, min(250, round((1 if live else 2) * rate)))
    context.sample_aspect_ratio = aspect
    context.color_range = 1  # limited, as nearly all video
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    return stream


def video_frame(image: Rgb, ticks: int, tick: Fraction) -> av.VideoFrame:
    """uint8 [H, W, 3] RGB as what such a stream encodes, at ``ticks`` · ``tick`` seconds."""
    frame = av.VideoFrame.from_ndarray(_pad_to_even(image), "rgb24")
    # Naming the matrix matters: unmarked video is read as BT.601 here and BT.709 there.
    frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
    frame.pts, frame.time_base = ticks, tick
    return frame


def working_encoder(encoders: Sequence[str], hw: Size) -> str:
    """The first of ``encoders`` that really opens for frames of this size.

    A build lists encoders whose hardware is absent, so each is tried. Raises OutputError.
    """
    for name in encoders:
        try:
            context = av.CodecContext.create(name, "w")
            assert isinstance(context, av.VideoCodecContext)
            _configure(context, hw, Fraction(1, 30))
            context.framerate = Fraction(30)
            context.options = _OPTIONS.get(name, {})
            context.open()
        except (av.FFmpegError, OSError, ValueError):
            continue
        return name
    raise OutputError(
        f"no encoder works for {hw[0]}×{hw[1]} (tried {', '.join(encoders)}); "
        "install PyAV's own build: pip install --force-reinstall --only-binary av av"
    )


def _configure(context: av.VideoCodecContext, hw: Size, tick: Fraction) -> None:
    context.height, context.width = _even(hw[0]), _even(hw[1])
    context.pix_fmt = "yuv420p"
    context.max_b_frames = 0
    context.time_base = tick


def _even(side: int) -> int:
    return side + side % 2


def _pad_to_even(image: Rgb) -> Rgb:
    bottom, right = image.shape[0] % 2, image.shape[1] % 2
    if not bottom and not right:
        return image
    # Repeating the last row and column shows no dark seam.
    padded = cv2.copyMakeBorder(image, 0, bottom, 0, right, cv2.BORDER_REPLICATE)
    return np.asarray(padded, np.uint8)


class VideoWriter:
    """An H.264 or HEVC file of frames of one size, odd sides padded to even ones.

    ``hw`` is that size, ``tick`` the unit of times in seconds (Matroska knows milliseconds only),
    ``rate`` the nominal frames per second (it guides the encoder only), ``encoder`` a name from
    ``working_encoder``; ``aspect`` is how much wider than high a pixel is shown, ``live`` sets
    the encoder to low latency, ``endless`` keeps an MP4 in fragments, so that memory does not grow
    with its length. All methods raise one of ``WRITE_ERRORS``.
    """

    def __init__(
        self,
        path: Path,
        hw: Size,
        tick: Fraction,
        rate: Fraction,
        encoder: str,
        *,
        video_format: VideoFormat = "mp4",
        aspect: Fraction = Fraction(1),
        live: bool = False,
        endless: bool = False,
    ) -> None:
        self._tick = tick
        self._failed = False
        muxer = _ENDLESS_MP4 if endless and video_format == "mp4" else _MUXER[video_format]
        # Without "file:" a colon in the name would be taken for a protocol.
        self._container = av.open(f"file:{path}", "w", format=video_format, options=muxer)
        self._stream = add_stream(
            self._container, encoder, hw, tick, rate, live=live, aspect=aspect
        )
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
