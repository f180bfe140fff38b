"""The sink for the overlay as a video, with the source's own timing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from knet_runtime.errors import ConfigError
from knet_runtime.frames import Frame, SourceInfo
from knet_runtime.mp4 import ENCODERS, WRITE_ERRORS, Mp4Writer, is_playable, working_encoder
from knet_runtime.overlay import Rgb, blend, legend_strip
from knet_runtime.pending import Keep, PendingFile, output_error

if TYPE_CHECKING:
    from knet_runtime.segmenter import Mask

_log = logging.getLogger(__name__)

_SLIDESHOW_RATE = Fraction(2)
_DEFAULT_RATE = Fraction(30)
_FINEST_TICK = Fraction(1, 1_000_000_000)  # MP4 counts ticks per second in 31 bits


class OverlayVideo:
    """Writes each frame under its colours to ``path``, an H.264 MP4.

    ``info`` is the source's; ``alpha`` the colours' opacity (0 … 1); ``legend`` adds a strip of
    class names and shares below the picture. The first frame sets the size: odd sides are padded to
    even ones, and frames of another size are letterboxed. Times are the frames' own, counted
    from the first frame, to the tick of ``info.time_base``; a missing one follows the last at the
    source's rate, or at 30 a second. Images become a slideshow of two a second.

    Until ``close`` the file has a hidden name beside ``path``. Raises OutputError when it can
    not be written or no H.264 encoder works, ConfigError for a name without .mp4 or a wrong alpha.
    """

    def __init__(
        self,
        path: str | Path,
        info: SourceInfo,
        *,
        alpha: float = 0.5,
        legend: bool = False,
        encoders: Sequence[str] = ENCODERS,
    ) -> None:
        self._path = Path(path)
        if self._path.suffix.lower() != ".mp4":
            raise ConfigError(f"{path}: the overlay is written as MP4; let its name end in .mp4")
        if not 0 <= alpha <= 1:
            raise ConfigError(f"alpha is {alpha}; the overlay's opacity lies between 0 and 1")
        self._alpha = alpha
        self._legend = legend
        self._encoder = working_encoder(encoders, info.hw)
        still = info.kind in ("image", "images")
        self._rate = info.rate or (_SLIDESHOW_RATE if still else _DEFAULT_RATE)
        self._clock = _Clock(info.time_base, self._rate)
        self._hw = (0, 0)
        self._failed = False
        self._writer: Mp4Writer | None = None
        self._pending: PendingFile | None = PendingFile(self._path)

    @property
    def path(self) -> Path:
        """Where the finished file will be."""
        return self._path

    @property
    def retimed(self) -> int:
        """How many frames had a time that is not after the last one's, and were moved."""
        return self._clock.retimed

    def write(self, frame: Frame, mask: Mask) -> None:
        """Add one frame; ``mask`` has its size. Raises OutputError when it can not be written."""
        if self._pending is None:
            raise ValueError(f"{self._path} is closed")
        picture = blend(frame.image, mask.class_map, mask.labels, self._alpha)
        if self._writer is None:
            self._hw = (picture.shape[0], picture.shape[1])
        picture = letterbox(picture, self._hw)
        if self._legend:
            strip = legend_strip(mask.labels, self._hw[1], mask.shares())
            picture = np.concatenate([picture, strip])
        try:
            if self._writer is None:
                hw = (picture.shape[0], picture.shape[1])
                tick = self._clock.tick(frame.pts)
                self._pending.start()
                self._writer = Mp4Writer(
                    self._pending.temporary, hw, tick, self._rate, self._encoder
                )
            self._writer.write(picture, self._clock.ticks(frame.pts))
        except WRITE_ERRORS as error:
            self._failed = True
            raise output_error(self._path, error) from error

    def close(self, keep: Keep = "complete") -> None:
        """Finish the file and rename it to ``path``, or for "partial" to ``NAME.partial.mp4``.

        Without frames nothing is left. A second call does nothing. Raises OutputError when it can
        not be finished; if it plays all the same it is kept as partial.
        """
        pending, self._pending = self._pending, None
        writer, self._writer = self._writer, None
        if pending is None:
            return
        if writer is None:
            pending.discard()
            return
        problem: Exception | None = None
        try:
            writer.close()
        except WRITE_ERRORS as error:
            problem = error
        if self.retimed:
            _log.warning("%s: moved %d frames whose time ran back", self._path, self.retimed)
        if problem is None and not self._failed:
            pending.commit(keep)
        elif is_playable(pending.temporary):
            pending.commit("partial")
        else:
            pending.discard()
        if problem is not None and not self._failed:  # else write() has raised it already
            raise output_error(self._path, problem) from problem


class _Clock:
    """Times of frames as ever later whole ticks from 0, which is what the MP4 takes."""

    def __init__(self, tick: Fraction | None, rate: Fraction) -> None:
        self._tick = tick if tick is not None and _FINEST_TICK <= tick <= 1 else None
        self._rate = rate
        self._last: int | None = None
        self._offset = 0
        self.retimed = 0

    def tick(self, first: Fraction | None) -> Fraction:
        """The unit in seconds, chosen once, with the first frame's time in hand."""
        if self._tick is None:
            self._tick = 1 / self._rate if first is None else Fraction(1, 90_000)
        return self._tick

    def ticks(self, time: Fraction | None) -> int:
        tick = self.tick(time)
        last = self._last
        period = max(1, round(1 / self._rate / tick))
        if time is None:
            now = 0 if last is None else last + period
        else:
            if last is None:
                self._offset = -round(time / tick)
            now = round(time / tick) + self._offset
        if last is not None and now <= last:
            self.retimed += 1
            if (last - now) * tick > 1:  # the source's clock began anew: go on from here
                self._offset += last + period - now
                now = last + period
            else:
                now = last + 1
        self._last = now
        return now


def letterbox(picture: Rgb, hw: tuple[int, int]) -> Rgb:
    """Scale uint8 [h, w, 3] to fit (height, width), centred on black; the same array if it fits."""
    height, width = picture.shape[:2]
    if (height, width) == hw:
        return picture
    scale = min(hw[0] / height, hw[1] / width)
    inner = max(1, min(hw[0], round(height * scale))), max(1, min(hw[1], round(width * scale)))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    canvas = np.zeros((*hw, 3), np.uint8)
    top, left = (hw[0] - inner[0]) // 2, (hw[1] - inner[1]) // 2
    canvas[top : top + inner[0], left : left + inner[1]] = cv2.resize(
        picture, (inner[1], inner[0]), interpolation=method
    )
    return canvas
