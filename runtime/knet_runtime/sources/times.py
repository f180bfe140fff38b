"""When the frames of a video are shown, also where its container does not say it.

``PacketClock`` makes one rising line of the packets' stamps, over the joints of what was put
together; ``FrameOrder`` gives each decoded frame the stamp that is its own. All are whole ticks of
the stream's time base.
"""

from __future__ import annotations

import logging
from collections import deque
from fractions import Fraction
from typing import TypeAlias

import av
from av.container import InputContainer

_log = logging.getLogger(__name__)

Packet: TypeAlias = "av.Packet[av.VideoStream]"

# A clock that goes back by more than so much begins anew, and so does one of a broadcast that
# leaps ahead, which is FFmpeg's rule too. Periods of a frame count where frames are rare.
_BACK, _BACK_PERIODS = Fraction(1, 10), 4
_AHEAD, _AHEAD_PERIODS = Fraction(10), 10
_DEFAULT_RATE = Fraction(30)
_NO_TIMESTAMPS, _TS_DISCONT = 0x80, 0x200  # FFmpeg's AVFMT_NOTIMESTAMPS and AVFMT_TS_DISCONT
_WRAP = 1 << 33  # where the clock of a broadcast, of 90 kHz, begins anew
_DEEPEST = 16  # frames that a decoder may hold back to put them in order


def is_broadcast(container: InputContainer) -> bool:
    """Whether the format is one of streams (MPEG-TS and -PS, HLS): its clock may jump, and a packet
    that is marked as corrupt may be whole."""
    return bool(container.format.flags & _TS_DISCONT)


def stamps_decoding(container: InputContainer) -> bool:
    """Whether the format says when frames are decoded, but not when they are shown."""
    raw = bool(container.format.flags & _NO_TIMESTAMPS)
    return raw or container.format.name in ("avi", "asf")


class PacketClock:
    """Puts the stamps of packets, in the order of the file, on one line that rises.

    Where the container's clock jumps (what was joined begins anew), the line goes on with the next
    frame, and a warning is logged. ``first`` is the stream's first packet, ``start`` the video's
    beginning in seconds, ``states_times`` whether there are times at all: a raw stream may have
    none.
    """

    def __init__(
        self, container: InputContainer, stream: av.VideoStream, first: Packet | None, name: str
    ) -> None:
        self._tick = Fraction(1) if stream.time_base is None else Fraction(stream.time_base)
        self._name = name
        self._leaps = is_broadcast(container)
        stated = first is not None and first.pts == stream.start_time
        self._decoding = stamps_decoding(container) and not stated
        rate = stream.average_rate or _DEFAULT_RATE
        self._period = max(1, round(1 / (Fraction(rate) * self._tick)))
        if first is not None and self._decoding:
            first.pts = first.dts
        stamp = None if first is None else _stamp(first)
        self.states_times = stamp is not None or stream.start_time is not None
        self.start = _start_time(container, stream, stamp)
        self.restart()

    def restart(self) -> None:
        """Forget what was read; after a seek."""
        self._last: int | None = None  # when the last packet is decoded, as the container says
        self._top: int | None = None  # the latest time on the line
        self._offset = 0

    def place(self, packet: Packet) -> None:
        """Move the packet's stamps to the line."""
        if self._decoding:
            packet.pts = packet.dts
        if self._leaps:
            packet.dts = _unwrapped(packet.dts, self._last)
            packet.pts = _unwrapped(packet.pts, packet.dts)
        if packet.dts is not None:
            if self._last is not None and self._jumps(packet.dts - self._last):
                self._join(packet, packet.dts - self._last)
            self._last = packet.dts
            packet.dts += self._offset
        if packet.duration:
            self._period = packet.duration
        if packet.pts is not None:
            packet.pts += self._offset
            self._top = packet.pts if self._top is None else max(self._top, packet.pts)

    @property
    def period(self) -> Fraction:
        """How long a frame is shown just now, in seconds."""
        return self._period * self._tick

    def seconds(self, packet: Packet) -> Fraction | None:
        """When a placed packet is shown, in seconds since the start."""
        stamp = _stamp(packet)
        return None if stamp is None else stamp * self._tick - self.start

    def _jumps(self, step: int) -> bool:
        seconds, periods = step * self._tick, Fraction(step, self._period)
        if step < 0:
            return seconds < -_BACK and periods < -_BACK_PERIODS
        return self._leaps and seconds > _AHEAD and periods > _AHEAD_PERIODS

    def _join(self, packet: Packet, step: int) -> None:
        stamp = _stamp(packet)
        if self._top is None or stamp is None:
            return
        self._offset = self._top + self._period - stamp
        at = float(self._top * self._tick - self.start)
        jump = float(step * self._tick)
        _log.warning("%s: its clock jumps by %+.1f s at %.1f s; times go on", self._name, jump, at)


class FrameOrder:
    """Gives each frame that comes out of a decoder its stamp.

    A frame bears that of its packet. Where stamps rise from packet to packet although the decoder
    puts frames in order, they are those of decoding: then each frame takes the first one left.

    ``delay`` is how long after a frame's own time the packet is decoded that completes it. The
    first frame shows it at the beginning of a video; one that begins later must know it, as a
    decoder drops frames that need what was before.
    """

    def __init__(self, delay: int | None = None) -> None:
        self.delay = delay
        self._begun = self._keyed = False
        self._sent: deque[int | None] = deque()
        self._highest: int | None = None
        self._presented = False
        self._last: int | None = None
        self._rises = 0

    def sent(self, packet: Packet) -> None:
        """A packet goes to the decoder."""
        if self._presented or packet.is_discard:
            return
        if packet.is_keyframe and not self._keyed:  # what came before it gives no frames
            self._keyed = True
            self._sent.clear()
        stamp = _stamp(packet)
        if stamp is not None and self._highest is not None and stamp < self._highest:
            self._presented = True  # no time of decoding ever falls
            self._sent.clear()
            return
        self._sent.append(stamp)
        self._highest = stamp if stamp is not None else self._highest

    def lost(self) -> None:
        """The last packet gives no frame."""
        if self._sent:
            self._sent.pop()

    def stamp_of(self, decoded: av.VideoFrame, *, reorders: bool) -> int | None:
        """The stamp of the next frame; ``reorders``: the codec says that it puts them in order."""
        own = decoded.pts
        if self._presented:
            return own
        if not self._begun and reorders and decoded.dts is not None:
            self._begin(decoded.dts)
        self._begun = True
        first = self._sent.popleft() if self._sent else own
        if own is None:
            return first
        self._rises = 0 if self._last is not None and own <= self._last else self._rises + 1
        self._last = own
        if reorders and self._rises <= _DEEPEST:
            return first
        # Frames keep the packets' order; those in between were lost in the decoder.
        while self._sent and (left := self._sent[0]) is not None and left <= own:
            self._sent.popleft()
        return own

    def _begin(self, dts: int) -> None:
        if self.delay is None:
            first = self._sent[0] if self._sent else None
            self.delay = None if first is None else dts - first
            return
        while self._sent and (left := self._sent[0]) is not None and left < dts - self.delay:
            self._sent.popleft()


def _stamp(packet: Packet) -> int | None:
    return packet.dts if packet.pts is None else packet.pts


def _unwrapped(stamp: int | None, near: int | None) -> int | None:
    """The stamp of a clock that wraps, nearest to another."""
    if stamp is None or near is None:
        return stamp
    return stamp - round(Fraction(stamp - near, _WRAP)) * _WRAP


def _start_time(container: InputContainer, stream: av.VideoStream, first: int | None) -> Fraction:
    """The video's start (that of its earliest stream) on the stream's clock, a whole multiple of
    its ticks, so that times stay exact; ``first`` is the first packet's stamp."""
    start, base = stream.start_time, stream.time_base
    if base is None:
        return Fraction(0)
    if container.start_time is None:
        return (first or 0 if start is None else start) * Fraction(base)
    earliest = Fraction(container.start_time, 1_000_000)  # rounded to microseconds
    if start is not None and abs(start * base - earliest) <= Fraction(1, 1_000_000):
        return start * Fraction(base)
    return round(earliest / base) * Fraction(base)
