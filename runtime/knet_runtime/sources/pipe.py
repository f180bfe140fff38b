"""Frames that another program writes into this one's stdin: y4m, or raw ones of a stated kind.

FFmpeg's demuxers cut the bytes into frames, so that what is read is what the same bytes would give
as a file; where the last frame is cut off is found by counting them.
"""

from __future__ import annotations

import logging
import os
import re
import select
import threading
from collections.abc import Iterable, Iterator
from fractions import Fraction

import av

from knet_runtime.errors import ConfigError, SourceError
from knet_runtime.sources.base import SourceOptions
from knet_runtime.sources.decoder import READ_ERRORS
from knet_runtime.sources.times import Packet
from knet_runtime.sources.video import VideoSource
from knet_runtime.types import MAX_PIXELS

_log = logging.getLogger(__name__)

STDIN = "-"
"""What stands for stdin where a source could be named."""

Y4M = "y4m"
Y4M_MAGIC = b"YUV4MPEG2"

PIXEL_FORMATS = {
    **{name: name for name in ("rgb24", "bgr24", "rgba", "bgra", "rgb0", "bgr0")},
    **{name: name for name in ("gray", "gray16le", "yuv420p", "yuv422p", "yuv444p")},
    **{name: name for name in ("nv12", "nv21", "yuyv422", "uyvy422")},
    **{"rgb": "rgb24", "bgr": "bgr24", "rgbx": "rgb0", "bgrx": "bgr0"},
    **{"gray8": "gray", "gray16_le": "gray16le", "i420": "yuv420p", "y42b": "yuv422p"},
    **{"y444": "yuv444p", "yuy2": "yuyv422", "uyvy": "uyvy422"},
}
"""Names of pixel formats, FFmpeg's and then GStreamer's, and FFmpeg's name of each."""

_HEAD = 4096  # bytes in which a y4m header and the mark of its first frame end
_BUFFER = 1 << 20
_TICK_MS = 100


def pixel_format(name: str, option: str) -> str:
    """FFmpeg's name of a pixel format, by any name. Raises ConfigError, which names ``option``."""
    found = PIXEL_FORMATS.get(name.lower())
    if found is None:
        known = ", ".join(dict.fromkeys(PIXEL_FORMATS.values()))
        raise ConfigError(f"{option}: there is no pixel format {name!r}; use one of {known}")
    return found


class PipeSource(VideoSource):
    """Frames from stdin, or from the pipe of another ``descriptor``; a context manager.

    ``options.raw_input`` says what they are: WIDTHxHEIGHT:FORMAT, a name of ``PIXEL_FORMATS``, and
    perhaps @RATE in frames per second, 25 by default. Without it y4m is expected, whose header says
    all that. A pipe is not live: whoever writes waits, and no frame is lost. The part of a frame at
    the end is left out, and logged as a warning. The descriptor stays open.

    Raises ConfigError for another ``raw_input``, and SourceError where no whole frame comes.
    """

    def __init__(self, options: SourceOptions, descriptor: int = 0) -> None:
        self._raw = options.raw_input
        demuxer = _raw_demuxer(self._raw) if self._raw is not None else {}
        self._reader = _Reader(descriptor)
        head = self._reader.head()
        y4m = head.startswith(Y4M_MAGIC)
        if not head:
            raise SourceError("stdin: nothing came; see what the program before the pipe says")
        if y4m and self._raw is not None:
            raise ConfigError("stdin: y4m comes, which says what it is: leave --raw-input out")
        if not y4m and self._raw is None:
            raise SourceError(
                "stdin: what comes is no y4m; say what raw frames they are, such as --raw-input "
                "1280x720:rgb24, or let ffmpeg write -f yuv4mpegpipe"
            )
        header, mark, *_ = [*head.split(b"\n", 2), b""] if y4m else (b"", b"")
        self._mark = len(mark) + 1 if y4m else 0
        self._whole = len(header) + 1 if y4m else 0  # bytes of the header and of whole frames
        self._exhausted = False
        try:
            container = av.open(
                self._reader,
                "r",
                format="yuv4mpegpipe" if y4m else "rawvideo",
                container_options=demuxer,
                buffer_size=_BUFFER,
            )
        except READ_ERRORS as error:
            raise SourceError(
                "stdin: its y4m header cannot be read; see what the program before the pipe writes"
            ) from error
        super().__init__(container, "stdin", options)

    def stop(self) -> None:
        """End the iteration, from any thread, also while nothing comes."""
        super().stop()
        self._reader.stopped.set()

    def _placed(self, packets: Iterable[Packet]) -> Iterator[Packet]:
        for packet in super()._placed(packets):
            if packet.size and not packet.is_corrupt:
                self._whole += self._mark + packet.size
            yield packet
        self._exhausted = True

    def _report(self) -> None:
        left = self._reader.count - self._whole
        if self._exhausted and left:
            _log.warning(
                "stdin: ends within a frame; the %d whole frames before it are kept, %d bytes are "
                "left out%s",
                self._damage.frames,
                left,
                "" if self._raw is None else f" (do {self._raw} frames come?)",
            )

    def _broke_off(self) -> str:
        return (
            f"stdin: what comes after {self._damage.frames} frames is no frame of y4m; see what "
            "the program before the pipe writes (GStreamer pads rows: let the width be a multiple "
            "of 8 there)"
        )

    def _nothing(self) -> str:
        if not self._exhausted or self._damage.frames:
            return super()._nothing()
        kind = "y4m" if self._raw is None else self._raw
        return (
            f"stdin: only {self._reader.count} bytes came, which is less than one frame of {kind}; "
            "see what the program before the pipe writes"
        )


def _raw_demuxer(text: str) -> dict[str, str]:
    """FFmpeg's options for such frames. Raises ConfigError."""
    found = re.fullmatch(r"(\d{1,6})[x×](\d{1,6}):([A-Za-z0-9_]+)(?:@([\d./]+))?", text.strip())
    if found is None:
        raise ConfigError(
            f"--raw-input is {text!r}: write WIDTHxHEIGHT:FORMAT, such as 1280x720:rgb24, and "
            "@RATE if it is known: 1280x720:rgb24@30"
        )
    width, height = int(found[1]), int(found[2])
    if not 0 < width * height <= MAX_PIXELS:
        raise ConfigError(
            f"--raw-input: {width}×{height} pixels must be 1 to {MAX_PIXELS // 1_000_000} million"
        )
    return {
        "video_size": f"{width}x{height}",
        "pixel_format": pixel_format(found[3], "--raw-input"),
        "framerate": str(_rate(found[4] or "25")),
    }


def _rate(text: str) -> Fraction:
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not 0 < rate <= 1000 or rate.denominator > 1_000_000:
        raise ConfigError(
            f"--raw-input: the rate {text!r} must be frames per second, such as 30 or 30000/1001"
        )
    return rate


class _Reader:
    """What FFmpeg reads from: a descriptor, whose first bytes were looked at already, and which is
    at its end once ``stopped`` is set. ``count`` is how many bytes came."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.stopped = threading.Event()
        self.count = 0
        self._ahead = b""
        if os.isatty(descriptor):
            raise SourceError("stdin is a terminal: let a program write frames into a pipe to it")

    def head(self) -> bytes:
        """The first bytes, which ``read`` gives once more: up to the end of the second line where
        they begin like y4m."""
        head = b""
        while len(head) < len(Y4M_MAGIC) or (
            head.startswith(Y4M_MAGIC) and head.count(b"\n") < 2 and len(head) < _HEAD
        ):
            more = self._take(_HEAD)
            if not more:
                break
            head += more
        self._ahead = head
        return head

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes, as soon as there are some; none at the end."""
        if self._ahead:
            data, self._ahead = self._ahead[:size], self._ahead[size:]
            return data
        return self._take(size)

    def _take(self, size: int) -> bytes:
        if hasattr(select, "poll"):  # else it can be stopped when something comes
            poll = select.poll()
            poll.register(self._descriptor, select.POLLIN)
            while not self.stopped.is_set() and not poll.poll(_TICK_MS):
                pass
        if self.stopped.is_set():
            return b""
        try:
            data = os.read(self._descriptor, size)
        except OSError as error:
            raise SourceError(f"stdin: {error.strerror}; run it in a pipe") from error
        self.count += len(data)
        return data
