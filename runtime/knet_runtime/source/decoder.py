"""From packets to upright RGB pictures: what files and live sources share."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from numpy.typing import NDArray

from knet_runtime.errors import SourceError
from knet_runtime.frames import MAX_PIXELS
from knet_runtime.source.deinterlace import Deinterlacer

READ_ERRORS = (av.FFmpegError, OSError)
"""What PyAV raises where it can not open, read or decode."""

_THREADED_PIXELS = 40_000_000


class Decoder:
    """The video stream of an open container, decoded.

    ``stream`` is the one that FFmpeg thinks best. Raises SourceError, naming ``name``, when there
    is none, no decoder for it, or it is larger than ``MAX_PIXELS``.
    """

    def __init__(self, container: InputContainer, name: str, *, live: bool) -> None:
        self._name = name
        self._deinterlacer = Deinterlacer()
        stream = container.streams.best("video")
        # The cover picture of a sound file is a video stream too.
        cover = stream is not None and stream.disposition & Disposition.attached_pic
        if cover or not isinstance(stream, av.VideoStream):
            raise SourceError(f"{name}: has no video in it; name a file that has one")
        context = stream.codec_context
        if context is None:
            raise SourceError(f"{name}: there is no decoder for its video; convert it to H.264")
        self._check_size(context.height, context.width)
        # So that a size that changes midway is refused before memory is taken for it.
        context.options = {**context.options, "max_pixels": str(MAX_PIXELS)}
        # Frames at once in several threads: faster, but they come out later, so not for live, and
        # each takes a frame's memory.
        if not live and context.height * context.width <= _THREADED_PIXELS:
            context.thread_type = "AUTO"
        self.stream = stream

    @property
    def rate(self) -> Fraction | None:
        """Frames per second, where one is stated that can be."""
        for rate in (self.stream.average_rate, self.stream.guessed_rate):
            if rate is not None and 0 < rate <= 1000:
                return Fraction(rate)
        return None

    def decode(self, packet: av.Packet[av.VideoStream]) -> list[av.VideoFrame] | None:
        """The pictures that a packet completes; None when it can not be decoded.

        The empty packet at the end completes all that were held back.
        """
        if packet.is_corrupt:  # cut short: it could decode to half a picture
            return None
        try:
            decoded = packet.decode()
        except READ_ERRORS:
            return None
        pictures = [ready for picture in decoded for ready in self._deinterlacer.feed(picture)]
        return pictures if packet.size else pictures + self._deinterlacer.flush()

    @property
    def deinterlaces(self) -> bool:
        """Whether pictures are being made whole out of fields just now."""
        return self._deinterlacer.active

    def restart(self) -> None:
        """Forget what is held back, after a seek."""
        self._deinterlacer = Deinterlacer()

    def time_of(self, picture: av.VideoFrame) -> Fraction | None:
        """The picture's time stamp in seconds, exact, on the container's own clock."""
        base = picture.time_base or self.stream.time_base
        if picture.pts is None or base is None:
            return None
        return picture.pts * Fraction(base)

    def rgb(self, picture: av.VideoFrame) -> NDArray[np.uint8]:
        """uint8 [H, W, 3], upright, of its own. Raises SourceError above ``MAX_PIXELS``."""
        self._check_size(picture.height, picture.width)
        pixels = picture.to_ndarray(format="rgb24")
        # The display matrix turns anticlockwise, as rot90 does; the copy is because PyAV's array
        # can be a view of memory that the decoder still needs.
        turns = round(picture.rotation / 90) % 4
        return np.array(np.rot90(pixels, turns), np.uint8, order="C")

    def _check_size(self, height: int, width: int) -> None:
        if height * width > MAX_PIXELS:
            raise SourceError(
                f"{self._name}: {height}×{width} pixels are more than "
                f"{MAX_PIXELS // 1_000_000} million; scale the video down"
            )
