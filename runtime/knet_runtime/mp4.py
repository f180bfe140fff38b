"""RGB pictures to an H.264 MP4 that plays everywhere and survives a killed process."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from knet_runtime.errors import OutputError
from knet_runtime.overlay import Rgb

ENCODERS = ("libx264", "libopenh264", "h264_nvenc", "h264_qsv", "h264_v4l2m2m", "h264_amf")
WRITE_ERRORS = (av.FFmpegError, OSError)

_OPTIONS = {"libx264": {"preset": "veryfast", "crf": "20"}}
# Fragments while it is written, so that a killed process leaves a file that plays up to the last
# whole group of pictures; the trailer then turns it into an ordinary MP4. Fragments have no edit
# list (asking for one breaks them in several FFmpeg versions), so there must be no B-frames, which
# would delay the first picture, and the first time must be 0.
_MUXER = {"movflags": "hybrid_fragmented+frag_keyframe", "flush_packets": "1"}
_BT709 = 1


class Mp4Writer:
    """An H.264 (yuv420p, BT.709) MP4 of pictures of one size, odd sides padded to even ones.

    ``hw`` is that size, ``tick`` the unit of times in seconds, ``rate`` the nominal frames per
    second (it guides the encoder only), ``encoder`` a name from ``working_encoder``. All methods
    raise one of ``WRITE_ERRORS``.
    """

    def __init__(
        self, path: Path, hw: tuple[int, int], tick: Fraction, rate: Fraction, encoder: str
    ) -> None:
        self._tick = tick
        self._failed = False
        # Without "file:" a colon in the name would be taken for a protocol.
        self._container = av.open(f"file:{path}", "w", format="mp4", options=_MUXER)
        options = _OPTIONS.get(encoder, {})
        stream = self._container.add_stream(encoder, rate=rate, options=options)
        assert isinstance(stream, av.VideoStream)
        self._stream = stream
        context = stream.codec_context
        _configure(context, hw, tick)
        # A key frame every two seconds: what a killed process loses at most.
        context.gop_size = max(1, min(250, round(2 * rate)))
        context.color_range = 1  # limited, as nearly all video
        context.colorspace = context.color_primaries = context.color_trc = _BT709

    def write(self, picture: Rgb, ticks: int) -> None:
        """Add uint8 [H, W, 3] RGB at a time that is later than the last one's; the first is 0."""
        frame = av.VideoFrame.from_ndarray(_pad_to_even(picture), "rgb24")
        # Naming the matrix matters: unmarked video is read as BT.601 here and BT.709 there.
        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
        frame.pts, frame.time_base = ticks, self._tick
        try:
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


def working_encoder(encoders: Sequence[str], hw: tuple[int, int]) -> str:
    """The first of ``encoders`` that really opens for pictures of this size.

    A build lists encoders whose hardware is absent, so each is tried. Raises OutputError.
    """
    for name in encoders:
        try:
            context = av.CodecContext.create(name, "w")
            assert isinstance(context, av.VideoCodecContext)
            _configure(context, hw, Fraction(1, 30))
            context.framerate = Fraction(30)
            context.open()
        except (av.FFmpegError, OSError, ValueError):
            continue
        return name
    raise OutputError(
        f"no H.264 encoder works for {hw[0]}×{hw[1]} (tried {', '.join(encoders)}); "
        "install PyAV's own build: pip install --force-reinstall --only-binary av av"
    )


def is_playable(path: Path) -> bool:
    """Whether at least one picture of the file can be decoded."""
    try:
        with av.open(f"file:{path}", "r", format="mp4") as container:
            return next(container.decode(video=0), None) is not None
    except (av.FFmpegError, OSError, IndexError):
        return False


def _configure(context: av.VideoCodecContext, hw: tuple[int, int], tick: Fraction) -> None:
    context.height, context.width = _even(hw[0]), _even(hw[1])
    context.pix_fmt = "yuv420p"
    context.max_b_frames = 0
    context.time_base = tick


def _even(side: int) -> int:
    return side + side % 2


def _pad_to_even(picture: Rgb) -> Rgb:
    bottom, right = picture.shape[0] % 2, picture.shape[1] % 2
    if not bottom and not right:
        return picture
    # Repeating the last row and column shows no dark seam.
    padded = cv2.copyMakeBorder(picture, 0, bottom, 0, right, cv2.BORDER_REPLICATE)
    return np.asarray(padded, np.uint8)
