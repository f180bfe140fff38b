"""A video that has an end as a source of frames: a file, or what a server holds.

Where it is damaged, and what could be read all the same, is counted by ``DamageReport``.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
from av.container import InputContainer

from knet_runtime.errors import SourceError
from knet_runtime.sources.base import SourceInfo, SourceOptions, SourceStatus
from knet_runtime.sources.container import close_input
from knet_runtime.sources.decoder import READ_ERRORS, Decoder
from knet_runtime.types import Closeable, Frame

_log = logging.getLogger(__name__)


class DamageReport:
    """Where a file is damaged: in packets, as threads hold some frames back.

    Counting begins at a key frame: a recording that begins between two of them is not damaged for
    that.
    """

    def __init__(self) -> None:
        self.at: int | None = None  # whole packets before the damage
        self.frames = 0
        self._good = 0
        self._patched = 0

    def began(self) -> None:
        """It begins here, unless it did before."""
        if self.at is None:
            self.at = self._good

    def count(self, packet: av.Packet[av.VideoStream], frames: list[av.VideoFrame] | None) -> None:
        """Count a packet and what it was decoded to (None: nothing, it is damaged)."""
        if frames is None:
            if self._good:
                self.began()
            return
        self._good += bool(self._good or packet.is_keyframe)
        self._patched += sum(decoded.is_corrupt for decoded in frames)
        self.frames += len(frames)

    def report(self, name: str) -> None:
        """Warn of patched frames. Raises SourceError where something was damaged."""
        if self._patched:
            _log.warning("%s: %d damaged frames were patched up to be read", name, self._patched)
        if self.at is not None and self.frames:
            whole = min(self.at, self.frames)
            raise SourceError(
                f"{name}: is damaged after {whole} frames ({self.frames} could be read); "
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


_BEFORE = 10  # seconds


class VideoSource(Closeable):
    """Frames of an opened video, upright, deinterlaced, with exact times; a context manager.

    ``path`` is the file, or None where ``name`` is an address. Times count from the start of the
    video (its earliest stream), also when only the part from ``options.start`` to ``options.end``
    is read; ``Frame.index`` counts the frames that are handed on. What cannot be decoded inside a
    damaged file is passed over, and after the last readable frame SourceError says where the damage
    began. Frames that the decoder had to patch up are handed on and counted in a logged warning.
    Pixels are taken as square, mirrored recordings as they are.

    Takes over ``container``. Raises SourceError when it holds no video, or none in that part.
    """

    status = SourceStatus()

    def __init__(
        self, container: InputContainer, name: str, options: SourceOptions, path: Path | None = None
    ) -> None:
        self._name = name
        self._path = path
        self._options = options
        self._closed = False
        self._stop = threading.Event()
        self._container = container
        try:
            self._decoder = Decoder(container, name, live=False)
            self._damage = DamageReport()
            self._start = start_time(container, self._decoder.stream)
            self._reading = self._read()
            # Only a decoded frame shows the size (after rotation), and that there is any.
            first = next(self._reading, None)
            if first is None:
                raise SourceError(self._nothing())
            self._frames: Iterator[Frame] = chain([first], self._reading)
            rate, base = self._decoder.rate(options.every), self._decoder.stream.time_base
            hint = self._frame_hint(rate)
            self.info = SourceInfo("video", first.image.shape[:2], rate, hint, base, path)
        except BaseException:
            close_input(container)
            raise

    @property
    def deinterlaces(self) -> bool:
        """Whether frames are being made of fields just now, which looks at those beside them."""
        return self._decoder.deinterlacer.active

    def __iter__(self) -> Iterator[Frame]:
        return self._frames

    def stop(self) -> None:
        """End the iteration, from any thread."""
        self._stop.set()

    def close(self) -> None:
        """Let go of the file; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._reading.close()
        self._frames = iter(())
        close_input(self._container)
        del self._container, self._decoder  # the decoder's threads live as long as these

    def _duration(self) -> Fraction | None:
        duration = self._container.duration  # in microseconds
        if duration is None or not 0 < duration < 10**13:
            return None
        return Fraction(duration, 1_000_000)

    def _frame_hint(self, rate: Fraction | None) -> int | None:
        stated, options = self._decoder.stream.frames, self._options
        if 0 < stated < 2**31 and options.start is None and options.end is None:
            return -(-stated // options.every)
        duration = self._duration()
        if rate is None or duration is None:
            return None
        end = duration if options.end is None else min(duration, Fraction(options.end))
        return max(1, round(rate * (end - Fraction(options.start or 0))))

    def _nothing(self) -> str:
        start, end = self._options.start, self._options.end
        if start is None and end is None:
            return f"{self._name}: no frame in it can be decoded; export it again"
        duration = self._duration()
        length = "" if duration is None else f" of its {float(duration):.3f} s"
        until = "its end" if end is None else f"{end:g} s"
        return (
            f"{self._name}: there is no frame from {start or 0:g} s to {until}{length}; "
            "choose another start and end"
        )

    def _read(self) -> Generator[Frame, None, None]:
        options, index = self._options, 0
        for number, (decoded, time) in enumerate(self._part()):
            if number % options.every == 0:
                yield Frame(self._decoder.rgb(decoded), index, time, f"{index:06d}")
                index += 1
        if not self._stop.is_set():
            self._damage.report(self._name)

    def _part(self) -> Iterator[tuple[av.VideoFrame, Fraction | None]]:
        """The frames from start to end, with their times."""
        start, end = self._options.start, self._options.end
        frames = self._sought(start) if start else self._decoded_frames()
        for decoded in frames:
            time = self._time(decoded)
            if time is None and (start is not None or end is not None):
                raise SourceError(
                    f"{self._name}: its frames state no times, so no part can be chosen; "
                    "convert it to MP4"
                )
            # As floats, or a start of 0.1 (a little more than 1/10) would miss the frame there.
            if start is not None and time is not None and float(time) < start:
                continue
            if end is not None and time is not None and float(time) >= end:
                return
            yield decoded, time

    def _sought(self, start: float) -> Iterator[av.VideoFrame]:
        """Frames from one at or before ``start`` on.

        Where a seek lands is the demuxer's affair (a packet without a key frame, or one whose
        frame is shown later), so it is tried further back until a frame is early enough.
        """
        base = self._decoder.stream.time_base
        back = Fraction(0)
        while base is not None:
            at = max(Fraction(0), Fraction(start) - back)
            # Demuxers go by decoding times, which begin before the first frame's.
            target = self._start + at if at else self._start - _BEFORE
            try:
                self._container.seek(target // base, stream=self._decoder.stream)
            except READ_ERRORS as error:
                if back == 0:  # cannot be sought in: it is still where it was, at its beginning
                    break
                raise SourceError(
                    f"{self._name}: cannot be sought in; leave the start out, or copy the file"
                ) from error
            self._decoder.restart()
            self._damage = DamageReport()
            frames = self._decoded_frames()
            first = next(frames, None)
            time = None if first is None else self._time(first)
            if first is not None and (at == 0 or time is None or self._is_early(time, start)):
                return chain([first], frames)
            if at == 0:
                return iter(())
            back = max(Fraction(1), 2 * back)
        return self._decoded_frames()

    def _is_early(self, time: Fraction, start: float) -> bool:
        # Deinterlacing looks at the frame before.
        return float(time) < start or (float(time) == start and not self.deinterlaces)

    def _decoded_frames(self) -> Generator[av.VideoFrame, None, None]:
        damage = self._damage
        packets = self._container.demux(self._decoder.stream)
        broken = False
        while not self._stop.is_set():
            try:
                packet = next(packets, None)
            except READ_ERRORS:
                broken = True
                break
            if packet is None:
                break
            frames = self._decoder.decode(packet)
            damage.count(packet, frames)
            yield from frames or ()
        if self._path is None:
            if broken:  # raised here, as FFmpeg's error holds the address with its password
                raise SourceError(
                    f"{self._name}: the connection broke off after {damage.frames} frames; "
                    "run it again, or download the video first"
                )
        elif broken:
            damage.began()
        elif damage.at is None and "mp4" in self._container.format.name and is_cut_off(self._path):
            damage.at = damage.frames

    def _time(self, decoded: av.VideoFrame) -> Fraction | None:
        time = self._decoder.time_of(decoded)
        return None if time is None else time - self._start


def start_time(container: InputContainer, stream: av.VideoStream) -> Fraction:
    """A video's start on the stream's clock, so that times stay exact multiples of ticks.

    ``Frame.pts`` counts from it.
    """
    start, base = stream.start_time, stream.time_base
    if base is None:
        return Fraction(0)
    if container.start_time is None:
        return (start or 0) * base
    earliest = Fraction(container.start_time, 1_000_000)  # rounded to microseconds
    if start is not None and abs(start * base - earliest) <= Fraction(1, 1_000_000):
        return start * base
    return round(earliest / base) * base
