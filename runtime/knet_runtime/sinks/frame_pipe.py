"""The sinks that write frames to stdout as other programs read them: y4m, or raw pixels.

What they write is what ``sources.pipe`` reads. Neither form holds times: a frame follows a frame.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from knet_runtime.errors import ConfigError, OutputError
from knet_runtime.segmentation import Segmentation
from knet_runtime.sinks.look import Look, OverlayPainter
from knet_runtime.sinks.overlay import FrameClock
from knet_runtime.sinks.raw_masks import Pipe
from knet_runtime.sources.base import SourceInfo
from knet_runtime.sources.pipe import Y4M, Y4M_MAGIC, pixel_format
from knet_runtime.types import Frame, Size

_Y4M_COLOURS = {
    "yuv420p": "C420jpeg XYSCSS=420JPEG XCOLORRANGE=LIMITED",
    "gray": "Cmono XCOLORRANGE=FULL",
    "gray16le": "Cmono16 XCOLORRANGE=FULL",
}


class _FramePipe:
    """Frames of one size to a pipe, with y4m's headers where ``form`` is that."""

    path: Path | None = None

    def __init__(self, name: str, info: SourceInfo, form: str, descriptor: int | None) -> None:
        self._y4m = form.lower() == Y4M
        self._form = "yuv420p" if self._y4m else pixel_format(form, "--raw-output")
        self.name = f"{name} on stdout" if descriptor is None else name
        self._pipe = Pipe(self.name, descriptor)
        if self._pipe.is_terminal:
            raise ConfigError(f"{name} are no text for a terminal: pipe them into a program")
        self._rate = FrameClock(info).rate
        self._aspect = info.sample_aspect
        self._hw: Size | None = None

    def _send(self, hw: Size, *pixels: bytes | memoryview) -> None:
        if self._hw not in (None, hw):
            raise OutputError(
                f"{self.name}: a frame is {hw[0]}×{hw[1]}, and the first one is not, as all in a "
                "pipe must be; scale the source"
            )
        header = b"" if self._hw or not self._y4m else self._header(hw)
        self._hw = hw
        self._pipe.send(header + b"FRAME\n" if self._y4m else b"", *pixels)

    def _header(self, hw: Size) -> bytes:
        rate, aspect = (f"{n.numerator}:{n.denominator}" for n in (self._rate, self._aspect))
        colours = _Y4M_COLOURS[self._form]
        words = (Y4M_MAGIC.decode(), f"W{hw[1]}", f"H{hw[0]}", f"F{rate}", "Ip", f"A{aspect}")
        return " ".join((*words, colours)).encode() + b"\n"

    def close(self, *, complete: bool = True) -> None:
        """Nothing is left to be written; the descriptor is its owner's."""
        self._pipe.close()


class OverlayPipe(_FramePipe):
    """Writes each frame under its colours to stdout, or to the pipe of another descriptor.

    ``form`` is "y4m" (4:2:0, BT.601, with a header that players and encoders know) or the name of
    a pixel format, such as "rgb24" or "nv12", for bare pixels, row by row. ``info`` is the
    source's: y4m states its rate (30 a second where there is none). Frames of another size than the
    first are letterboxed into it. ``raw_masks.Pipe`` says what becomes of a slow reader. Raises
    ConfigError for another form, and for a terminal.

        >>> from knet_deploy import OverlayPipe, Segmenter, open_source
        >>> with open("overlay.y4m", "wb") as file, open_source("drive.mp4") as source:
        ...     sink = OverlayPipe(source.info, descriptor=file.fileno())
        ...     with Segmenter() as segment:
        ...         for frame in source:
        ...             sink.write(frame, segment(frame.image))
        ...     sink.close()
        >>> with open_source("overlay.y4m") as source:
        ...     len(list(source))
        8
    """

    def __init__(
        self,
        info: SourceInfo,
        look: Look = Look(),
        *,
        form: str = Y4M,
        descriptor: int | None = None,
    ) -> None:
        super().__init__("frames", info, form, descriptor)
        if self._form == "gray16le":  # of FFmpeg's ways there, the threaded one leaves holes
            raise ConfigError(f"--raw-output is {form!r}, and frames have 8 bits: take gray")
        self._painter = OverlayPainter(look, steady=True)
        self._encoder: av.VideoCodecContext | None = None

    def write(self, frame: Frame, result: Segmentation) -> None:
        """Write one frame. Raises OutputError and OutputClosed."""
        image = self._painter.paint(frame, result)
        if self._encoder is None:
            self._encoder = _encoder(image.shape[:2], self._form)
        picture = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format=self._form)
        self._send(image.shape[:2], *map(bytes, self._encoder.encode(picture)))


class MaskPipe(_FramePipe):
    """Writes each class map to stdout, or to the pipe of another descriptor, as grey pixels that
    are class indices: 8 bits, or 16 (little-endian) beyond 256 classes.

    ``form`` is "y4m" (Cmono) or "gray" for bare pixels. All frames must have one size. Stale frames
    are left out. ``RawMasks`` writes class maps with their times. Raises as ``OverlayPipe`` does.

        >>> from knet_deploy import MaskPipe, Segmenter, open_source
        >>> with open("masks.gray", "wb") as file, open_source("street.png") as source:
        ...     sink = MaskPipe(source.info, form="gray", descriptor=file.fileno())
        ...     with Segmenter() as segment:
        ...         for frame in source:
        ...             sink.write(frame, segment(frame.image))
        ...     sink.close()
        >>> import os
        >>> os.path.getsize("masks.gray") == 360 * 480
        True
    """

    def __init__(self, info: SourceInfo, *, form: str = Y4M, descriptor: int | None = None) -> None:
        super().__init__("masks", info, form, descriptor)
        if not self._y4m and self._form != "gray":
            raise ConfigError(
                f"--raw-output is {form!r}, and masks are class indices: take y4m or gray"
            )

    def write(self, frame: Frame, result: Segmentation) -> None:
        """Write one class map. Raises OutputError and OutputClosed."""
        if frame.stale:
            return
        depth = result.class_map.itemsize
        self._form = "gray" if depth == 1 else "gray16le"
        pixels = np.ascontiguousarray(result.class_map, f"<u{depth}")
        self._send(result.size, pixels.data.cast("B"))


def _encoder(hw: Size, form: str) -> av.VideoCodecContext:
    """What writes a frame's planes one after the other, without padding."""
    encoder = av.CodecContext.create("rawvideo", "w")
    assert isinstance(encoder, av.VideoCodecContext)
    encoder.height, encoder.width = hw
    encoder.pix_fmt, encoder.time_base = form, Fraction(1, 25)
    return encoder
