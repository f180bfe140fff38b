"""From packets to upright RGB frames, deinterlaced: what files and live sources share."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

import av
import av.filter
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from numpy.typing import NDArray

from knet_runtime.errors import SourceError
from knet_runtime.sources.times import FrameOrder, is_broadcast
from knet_runtime.types import MAX_PIXELS

_Shape = tuple[int, int, str]


class Deinterlacer:
    """Hands frames on as they are until one says it is interlaced; from then on through bwdif.

    One frame comes out per frame that goes in, with its own time; once active, one frame
    later, as the filter looks ahead. Frames between that are not interlaced are left alone.
    """

    def __init__(self) -> None:
        self._graph: av.filter.Graph | None = None
        self._shape: _Shape | None = None

    @property
    def active(self) -> bool:
        """Whether there were interlaced frames."""
        return self._graph is not None

    def feed(self, decoded: av.VideoFrame) -> list[av.VideoFrame]:
        """The frames that are ready, in order."""
        if self._graph is None and not decoded.interlaced_frame:
            return [decoded]
        shape = (decoded.height, decoded.width, decoded.format.name)
        ready = []
        if shape != self._shape:
            ready = self.flush()
            if not decoded.interlaced_frame or not self._build(decoded):
                return [*ready, decoded]
            self._shape = shape
        assert self._graph is not None
        self._graph.vpush(decoded)
        return ready + self._pull()

    def flush(self) -> list[av.VideoFrame]:
        """The frames held back; the next one begins anew."""
        if self._graph is None:
            return []
        self._graph.vpush(None)
        held = self._pull()
        self._graph = self._shape = None
        return held

    def _build(self, decoded: av.VideoFrame) -> bool:
        if decoded.height < 4 or decoded.width < 3 or decoded.time_base is None:
            return False  # smaller than the filter takes
        graph = av.filter.Graph()
        source = graph.add_buffer(
            width=decoded.width,
            height=decoded.height,
            format=decoded.format,
            time_base=decoded.time_base,
        )
        bwdif = graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced")
        graph.link_nodes(source, bwdif, graph.add("buffersink")).configure()
        self._graph = graph
        return True

    def _pull(self) -> list[av.VideoFrame]:
        assert self._graph is not None
        ready: list[av.VideoFrame] = []
        while True:
            try:
                ready.append(self._graph.vpull())
            except (av.BlockingIOError, av.EOFError):
                return ready


READ_ERRORS = (av.FFmpegError, OSError)
"""What PyAV raises where it cannot open, read or decode."""

_THREADED_PIXELS = 40_000_000
_ODDEST_ASPECT = 20
_ASPECT_TERMS = 65_535  # those of H.264 have 16 bits


class Decoder:
    """The video stream of an open container, decoded.

    ``stream`` is the one that FFmpeg thinks best, ``others`` how many more there are, and
    ``deinterlacer`` makes its frames whole. Raises SourceError, naming ``name``, when there is
    none, no decoder for it, or it is larger than ``MAX_PIXELS``.
    """

    def __init__(self, container: InputContainer, name: str, *, live: bool) -> None:
        self._name = name
        self._turned = False
        self._broadcast = is_broadcast(container)
        self.deinterlacer = Deinterlacer()
        self._order = FrameOrder()
        stream = container.streams.best("video")
        # The cover image of a sound file is a video stream too.
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
        covers = Disposition.attached_pic | Disposition.timed_thumbnails
        self.others = sum(not s.disposition & covers for s in container.streams.video) - 1

    def rate(self, every: int) -> Fraction | None:
        """Frames per second, each ``every``-th counting; None where none is stated that can be."""
        for rate in (self.stream.average_rate, self.stream.guessed_rate):
            if rate is not None and 0 < rate <= 1000:
                return Fraction(rate) / every
        return None

    @property
    def sample_aspect(self) -> Fraction:
        """How much wider than high a pixel of the last upright frame is to be shown."""
        stated = self.stream.sample_aspect_ratio
        if not stated or not 1 / _ODDEST_ASPECT < stated < _ODDEST_ASPECT:
            return Fraction(1)  # unknown, or nonsense
        aspect = Fraction(stated)
        if max(aspect.as_integer_ratio()) > _ASPECT_TERMS:
            aspect = aspect.limit_denominator(_ASPECT_TERMS // _ODDEST_ASPECT)
        return 1 / aspect if self._turned else aspect

    def decode(self, packet: av.Packet[av.VideoStream]) -> list[av.VideoFrame] | None:
        """The frames that a packet completes; None when it cannot be decoded.

        The empty packet at the end completes all that were held back.
        """
        if packet.is_corrupt and not self._broadcast:  # cut short: it could decode to half a frame
            return None
        if packet.size:
            self._order.sent(packet)
        try:
            decoded = packet.decode()
        except READ_ERRORS:
            self._order.lost()
            return None
        frames = self._finish(decoded)
        return frames if packet.size else frames + self.deinterlacer.flush()

    def drain(self) -> list[av.VideoFrame]:
        """The frames that were held back, where no packets come any more."""
        try:
            decoded = self.stream.codec_context.decode(None)
        except READ_ERRORS:
            decoded = []
        return self._finish(decoded) + self.deinterlacer.flush()

    def _finish(self, decoded: Iterable[av.VideoFrame]) -> list[av.VideoFrame]:
        frames = []
        for frame in decoded:
            reorders = self.stream.codec_context.has_b_frames
            frame.pts = self._order.stamp_of(frame, reorders=reorders)
            frames += self.deinterlacer.feed(frame)
        return frames

    def restart(self) -> None:
        """Forget what is held back, after a seek."""
        self.deinterlacer = Deinterlacer()
        self._order = FrameOrder(self._order.delay)

    def time_of(self, decoded: av.VideoFrame) -> Fraction | None:
        """The frame's time stamp in seconds, exact, on the container's own clock."""
        base = decoded.time_base or self.stream.time_base
        if decoded.pts is None or base is None:
            return None
        return decoded.pts * Fraction(base)

    def rgb(self, decoded: av.VideoFrame) -> NDArray[np.uint8]:
        """uint8 [H, W, 3], upright, of its own. Raises SourceError above ``MAX_PIXELS``."""
        self._check_size(decoded.height, decoded.width)
        pixels = decoded.to_ndarray(format="rgb24")
        # The display matrix turns anticlockwise, as rot90 does; the copy is because PyAV's array
        # can be a view of memory that the decoder still needs.
        turns = round(decoded.rotation / 90) % 4
        self._turned = turns % 2 == 1
        return np.array(np.rot90(pixels, turns), np.uint8, order="C")

    def _check_size(self, height: int, width: int) -> None:
        if height * width > MAX_PIXELS:
            raise SourceError(
                f"{self._name}: {height}×{width} pixels are more than "
                f"{MAX_PIXELS // 1_000_000} million; scale the video down"
            )
