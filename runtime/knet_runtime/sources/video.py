"""A video that has an end as a source of frames: a file, or what a server holds.

Where it is damaged, and what could be read all the same, is counted by ``DamageReport``; its times
are those of ``PacketClock``.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
from av.container import InputContainer

from knet_runtime.errors import SourceError
from knet_runtime.sources.base import SourceInfo, SourceOptions, SourceStatus
from knet_runtime.sources.container import close_input
from knet_runtime.sources.damage import DamageReport, is_cut_off
from knet_runtime.sources.decoder import READ_ERRORS, Decoder
from knet_runtime.sources.times import Packet, PacketClock, stamps_decoding
from knet_runtime.types import Closeable, Frame

_log = logging.getLogger(__name__)

TimedFrame = tuple[av.VideoFrame, Fraction | None]


_BEFORE = 10  # seconds
_HELD = 1 << 26  # bytes of packets that wait for the part to begin
# Those with an index, which a seek goes by; others guess, or go by clocks that may jump.
_SEEKABLE = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "asf", "mxf", "nut", "ogg", "hls")


class VideoSource(Closeable):
    """Frames of an opened video, upright, deinterlaced, with exact times; a context manager.

    ``path`` is the file, or None where ``name`` is an address. Times count from the start of the
    video (its earliest stream), also when only the part from ``options.start`` to ``options.end``
    is read; ``Frame.index`` counts the frames that are handed on. What cannot be decoded inside a
    damaged file is passed over, and after the last readable frame SourceError says where the damage
    began. Frames that the decoder had to patch up are handed on and counted in a logged warning.
    Frames have the coded size (``info.sample_aspect`` says how they are to be shown), and mirrored
    recordings are taken as they are.

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
            if others := self._decoder.others:
                _log.warning(
                    "%s: has %d videos in it, of which one is read; take the others out with "
                    "FFmpeg (-map) to read them",
                    name,
                    others + 1,
                )
            self._damage = DamageReport()
            self._broken = False
            packets = container.demux(self._decoder.stream)
            first_packet = self._next(packets)
            self._clock = PacketClock(container, self._decoder.stream, first_packet, name)
            self._packets = self._placed(chain([first_packet] if first_packet else [], packets))
            self._reading = self._read()
            # Only a decoded frame shows the size (after rotation), and that there is any.
            first = next(self._reading, None)
            if first is None:
                raise SourceError(self._nothing())
            self._frames: Iterator[Frame] = chain([first], self._reading)
            rate, base = self._decoder.rate(options.every), self._decoder.stream.time_base
            hint = self._frame_hint(rate)
            hw, aspect = first.image.shape[:2], self._decoder.sample_aspect
            self.info = SourceInfo("video", hw, rate, hint, base, path, aspect)
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
        # The decoder's threads live as long as these.
        del self._container, self._decoder, self._packets

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
            self._report()

    def _report(self) -> None:
        transport = self._path if self._container.format.name == "mpegts" else None
        self._damage.report(self._name, transport, self._decoder.stream)

    def _part(self) -> Iterator[TimedFrame]:
        """The frames from start to end, with their times."""
        start, end = self._options.start, self._options.end
        if not self._clock.states_times and (start is not None or end is not None):
            raise SourceError(
                f"{self._name}: its frames state no times, so no part can be chosen; "
                "convert it to MP4"
            )
        for decoded, time in self._sought(start) if start else self._timed_frames():
            # As floats, or a start of 0.1 (a little more than 1/10) would miss the frame there.
            if start is not None and time is not None and float(time) < start:
                continue
            if end is not None and time is not None and float(time) >= end:
                return
            yield decoded, time

    def _sought(self, start: float) -> Iterator[TimedFrame]:
        """Frames from one at or before ``start`` on.

        Where a seek lands is the demuxer's affair (a packet without a key frame, or one whose
        frame is shown later), so it is tried further back until a frame is early enough.
        """
        base = self._decoder.stream.time_base
        back = Fraction(0)
        seekable = base is not None and self._container.format.name in _SEEKABLE
        if seekable and self._decoder.stream.codec_context.has_b_frames:
            next(self._decoded_frames(), None)  # which shows the decoder's delay
        while base is not None and seekable:
            at = max(Fraction(0), Fraction(start) - back)
            # Demuxers go by decoding times, which begin before the first frame's.
            target = self._clock.start + at if at else self._clock.start - _BEFORE
            try:
                self._container.seek(target // base, stream=self._decoder.stream)
            except READ_ERRORS as error:
                if back == 0:  # cannot be sought in: it is still where it was, at its beginning
                    break
                raise SourceError(
                    f"{self._name}: cannot be sought in; leave the start out, or copy the file"
                ) from error
            self._decoder.restart()
            self._clock.restart()
            self._damage, self._broken = DamageReport(), False
            self._packets = self._placed(self._container.demux(self._decoder.stream))
            frames = self._timed_frames()
            first = next(frames, None)
            if first is not None and (at == 0 or self._is_early(first[1], start)):
                return chain([first], frames)
            if at == 0:
                return iter(())
            back = max(Fraction(1), 2 * back)
        if not stamps_decoding(self._container):  # there a frame's time needs all before it
            self._packets = self._passed_over(self._packets, start)
        return self._timed_frames()

    def _is_early(self, time: Fraction | None, start: float) -> bool:
        # Deinterlacing looks at the frame before.
        return (
            time is None or float(time) < start or (float(time) == start and not self.deinterlaces)
        )

    def _passed_over(self, packets: Iterator[Packet], start: float) -> Iterator[Packet]:
        """The packets from the last key frame but one before ``start`` on: what is shown between
        the two may need frames that are not there."""
        older: list[Packet] = []
        newer: list[Packet] = []
        held = 0
        for packet in packets:
            if packet.is_keyframe:
                held -= sum(passed.size for passed in older)
                older, newer = newer, []
            newer.append(packet)
            held += packet.size
            time = self._clock.seconds(packet)
            begun = time is not None and float(time) >= start
            if begun or held > _HELD or not packet.size or self._stop.is_set():
                break
        yield from chain(older, newer, packets)

    def _timed_frames(self) -> Generator[TimedFrame, None, None]:
        """Frames with times that always rise; one that states none follows the last at its pace."""
        clock, last, step = self._clock, None, self._clock.period
        tick = Fraction(self._decoder.stream.time_base or 1)
        for decoded in self._decoded_frames():
            time = self._decoder.time_of(decoded)
            if time is not None:
                time -= clock.start
            elif clock.states_times:
                time = Fraction(0) if last is None else last + step
            if time is not None and last is not None:
                time = max(time, last + tick)
                step = time - last
            last = time
            yield decoded, time

    def _decoded_frames(self) -> Generator[av.VideoFrame, None, None]:
        damage = self._damage
        while not self._stop.is_set():
            packet = self._next(self._packets)
            if packet is None:
                break
            frames = self._decoder.decode(packet)
            damage.count(packet, frames)
            yield from frames or ()
        if self._broken:  # of whole packets no frame is lost
            held = self._decoder.drain()
            damage.frames += len(held)
            yield from held
        if self._path is None:
            if self._broken:  # raised here, as FFmpeg's error holds the address with its password
                raise SourceError(self._broke_off())
        elif self._broken:
            damage.began()
        elif damage.at is None and "mp4" in self._container.format.name and is_cut_off(self._path):
            damage.at = damage.frames

    def _broke_off(self) -> str:
        return (
            f"{self._name}: the connection broke off after {self._damage.frames} frames; "
            "run it again, or download the video first"
        )

    def _next(self, packets: Iterator[Packet]) -> Packet | None:
        try:
            return next(packets, None)
        except READ_ERRORS:
            self._broken = True
            return None

    def _placed(self, packets: Iterable[Packet]) -> Iterator[Packet]:
        for packet in packets:
            self._clock.place(packet)
            yield packet
