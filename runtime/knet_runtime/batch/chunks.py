"""Where a video can be cut so that its parts, decoded apart, are the frames of the whole."""

from __future__ import annotations

from bisect import bisect_left
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import msgspec

from knet_runtime.sources.base import SourceOptions
from knet_runtime.sources.container import close_input, open_file
from knet_runtime.sources.decoder import READ_ERRORS, Decoder
from knet_runtime.sources.video import VideoSource, start_time


class Chunk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a video: the frames with ``first`` <= time < ``until``, in ticks of ``tick``
    (numerator and denominator of seconds) on the clock of ``Frame.pts``.

    None is the video's beginning or end. Decoding begins at the key frame ``run_up``, one before
    ``first``, for codecs whose key frames are whole only some frames later. ``times`` are those
    that the frames must have; None says that nothing is known of them.
    """

    number: int = 0
    tick: tuple[int, int] = (1, 1)
    run_up: int | None = None
    first: int | None = None
    until: int | None = None
    times: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """A file name that tells it from every other chunk of the video."""
        if self.is_whole:
            return "whole"
        ends = ("" if end is None else str(end) for end in (self.first, self.until))
        return f"{self.number:05d}_{'_'.join(ends)}"

    @property
    def is_whole(self) -> bool:
        """Whether it is the video uncut."""
        return self.first is None and self.until is None

    def options(self) -> SourceOptions:
        """What opens the source at it; frames before ``first`` are still to be passed over."""
        return SourceOptions(start=self._seconds(self.run_up), end=self._seconds(self.until))

    def ticks(self, time: Fraction | None) -> int | None:
        """A frame's time in ticks, None if it has none or lies between two."""
        if time is None:
            return None
        ticks = time / Fraction(*self.tick)
        return int(ticks) if ticks.denominator == 1 else None

    def _seconds(self, ticks: int | None) -> float | None:
        # A source compares times as floats too: equal ticks are equal floats.
        return None if ticks is None else float(ticks * Fraction(*self.tick))


WHOLE = Chunk()


def cut(path: Path, seconds: float) -> tuple[Chunk, ...]:
    """Chunks of about ``seconds`` each, at least one, in order; all packets are read for it.

    A video whose packets leave doubt about its frames (without times, damaged, hidden
    by an edit list, key frames out of order), or that is interlaced, stays ``WHOLE``. Raises
    SourceError for what is no video.
    """
    with VideoSource(open_file(path), str(path), SourceOptions(), path) as source:
        if source.deinterlaces:  # a frame is made of those beside it
            return (WHOLE,)
    container = open_file(path)
    try:
        stream = Decoder(container, str(path), live=False).stream
        base = stream.time_base
        if base is None:
            return (WHOLE,)
        start = start_time(container, stream) / base
        if start.denominator != 1:
            return (WHOLE,)
        times, keys = [], []
        try:
            for packet in container.demux(stream):
                if not packet.size:
                    continue
                if packet.pts is None or packet.is_corrupt or packet.is_discard:
                    return (WHOLE,)
                times.append(packet.pts - int(start))
                if packet.is_keyframe:
                    keys.append(times[-1])
        except READ_ERRORS:
            return (WHOLE,)
    finally:
        close_input(container)
    times.sort()
    ordered = keys == sorted(set(keys)) and len(set(times)) == len(times)
    if not keys or not ordered or times[0] < 0 or keys[0] != times[0]:
        return (WHOLE,)
    tick = Fraction(base)
    return _chunks(times, keys, (tick.numerator, tick.denominator), seconds)


def _chunks(
    times: list[int], keys: list[int], tick: tuple[int, int], seconds: float
) -> tuple[Chunk, ...]:
    shortest = Fraction(seconds) / Fraction(*tick)
    cuts: list[tuple[int, int]] = []  # the key frame before, and the one that is cut at
    last = times[0]
    for before, key in pairwise(keys):
        if key - last >= shortest:
            cuts.append((before, key))
            last = key
    if not cuts:
        return (WHOLE,)
    begins = [(None, None), *cuts]
    ends = [*(key for _, key in cuts), None]
    chunks = []
    for number, ((run_up, first), until) in enumerate(zip(begins, ends, strict=True)):
        low = 0 if first is None else bisect_left(times, first)
        high = len(times) if until is None else bisect_left(times, until)
        chunks.append(Chunk(number, tick, run_up, first, until, tuple(times[low:high])))
    return tuple(chunks)
