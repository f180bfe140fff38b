"""What every source is: how it is read, what is known of it, how one that is live fares, and how
long to wait before one that was lost is tried again."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from knet_runtime.errors import ConfigError
from knet_runtime.types import Frame, Size

Transport = Literal["tcp", "udp"]
SourceKind = Literal["video", "image", "images", "bag", "camera", "stream"]

_FIRST_DELAY, _LONGEST_DELAY, _REFUSED_DELAY = 0.25, 5.0, 60.0


class SourceOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What ``open_source`` is told besides the name. Raises ConfigError for what cannot be.

    For video files, stdin and bags: ``start`` and ``end``, seconds on the clock of ``Frame.pts``;
    frames with start <= pts < end are read. For any source: ``every``, each n-th frame, counted
    from the first one read. For videos: ``hwaccel`` tries the hardware decoders that FFmpeg has,
    and decodes in software where none works.

    For stdin: ``raw_input`` says what frames come, as "1280x720:rgb24" or "1280x720:rgb24@30".
    For a bag: ``topic`` is the one whose images are read; without it there must be just one.

    For files: ``loop`` plays them again and again, until they are stopped. For files of videos and
    bags: ``realtime`` hands on no frame before it is due by its time, counted from the first one;
    one that is late comes at once, and more than a second is not made up for.

    For an HTTP(S) address that gives one image: ``every_seconds`` makes a live source of it, which
    asks for the image again and again.

    For live sources: ``transport`` of RTSP; ``connect_timeout`` and ``read_timeout``, seconds that
    a server may be silent; ``max_downtime``, seconds without a frame after which SourceError
    ends it (None: it goes on trying for ever).

        >>> from knet_deploy import SourceOptions, open_source
        >>> with open_source("drive.mp4", SourceOptions(start=0.1, every=2)) as source:
        ...     [frame.name for frame in source]
        ['000000', '000001', '000002']
    """

    start: float | None = None
    end: float | None = None
    every: int = 1
    every_seconds: float | None = None
    raw_input: str | None = None
    topic: str | None = None
    loop: bool = False
    realtime: bool = False
    transport: Transport = "tcp"
    connect_timeout: float = 5.0
    read_timeout: float = 3.0
    max_downtime: float | None = None
    hwaccel: bool = False

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"every is {self.every}; take each n-th frame with n of 1 or more")
        for name in ("start", "end"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} is {value}; give seconds from the video's beginning")
        if self.start is not None and self.end is not None and self.end <= self.start:
            raise ConfigError(
                f"end ({self.end:g} s) is not after start ({self.start:g} s); nothing would be read"
            )
        for name in ("every_seconds", "connect_timeout", "read_timeout", "max_downtime"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} is {value}; give seconds, more than 0")
        if self.transport not in ("tcp", "udp"):
            raise ConfigError(f"transport is {self.transport!r}; RTSP goes over tcp or udp")


class SourceStatus(msgspec.Struct, frozen=True):
    """How a source fares just now; files are always connected.

    ``reconnects`` counts the times that frames came again after they had stopped.
    ``down_seconds`` is how long there has been no frame; 0 while connected.
    """

    connected: bool = True
    reconnects: int = 0
    down_seconds: float = 0.0


@dataclass(frozen=True)
class SourceInfo:
    """What is known before the first frame is taken.

    ``hw`` is the (height, width) of the first frame; later ones may differ. ``rate`` is frames per
    second where one is stated. ``frames`` is a hint for progress bars: files state it wrongly.
    ``time_base`` is the unit in seconds of which every ``Frame.pts`` is a multiple. ``path`` is the
    file, folder or device that is read. ``sample_aspect`` is how much wider than high a pixel of an
    upright frame is to be shown, as in the anamorphic video of a DVD; arrays keep the coded size.
    ``topic`` is that of a bag, and ``loops`` says that it begins anew at its end.

        >>> from knet_deploy import open_source
        >>> with open_source("drive.mp4") as source:
        ...     source.info.kind, source.info.hw, source.info.live
        ('video', (360, 480), False)
    """

    kind: SourceKind
    hw: Size
    rate: Fraction | None
    frames: int | None
    time_base: Fraction | None = None
    path: Path | None = None
    sample_aspect: Fraction = Fraction(1)
    topic: str | None = None
    loops: bool = False

    @property
    def period(self) -> float:
        """Seconds from frame to frame; 0 where no rate is stated."""
        return float(1 / self.rate) if self.rate else 0.0

    @property
    def live(self) -> bool:
        """Whether frames come when they come, and wait for nobody."""
        return self.kind in ("camera", "stream")

    @property
    def endless(self) -> bool:
        """Whether frames come until somebody stops them."""
        return self.live or self.loops


class Source(Iterable[Frame], AbstractContextManager["Source"], Protocol):
    """Frames, once and in order, from something that is open until it is closed.

    Iterating raises SourceError where the source is damaged; what came before stays valid.
    A second loop goes on where the first one stopped. A live source has no end: it reconnects.

        >>> from knet_deploy import open_source
        >>> with open_source("photos") as source:
        ...     [frame.name for frame in source]
        ['a', 'b']
    """

    @property
    def info(self) -> SourceInfo: ...

    @property
    def status(self) -> SourceStatus:
        """How a live source fares; may be asked from any thread."""
        ...

    def stop(self) -> None:
        """End the iteration, from any thread: at the next frame, or when a read times out."""
        ...

    def close(self) -> None:
        """Let go of everything; only when no thread is iterating."""
        ...


class SourceLost(Exception):
    """A live source cannot be opened or read just now.

    ``reason`` may be shown: it holds no address and no password. ``refused`` says that the server
    does not take the credentials, ``foreign`` that what comes is no stream that is known.
    """

    def __init__(self, reason: str, *, refused: bool = False, foreign: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.refused = refused
        self.foreign = foreign


class Backoff:
    """Seconds before each next try: 0.25, doubled up to 5, of which a random half is taken off so
    that many boxes do not come back in one moment.

    A server that refuses the credentials is asked once a minute: many lock the account otherwise.
    """

    def __init__(self) -> None:
        self._next = _FIRST_DELAY

    def delay(self, *, refused: bool = False) -> float:
        """Seconds to wait now."""
        if refused:
            return _REFUSED_DELAY
        delay = self._next
        self._next = min(2 * delay, _LONGEST_DELAY)
        return delay * random.uniform(0.5, 1)

    def lasted(self, seconds: float) -> None:
        """Frames came for so long: after more than 5 s the next loss begins at 0.25 again."""
        if seconds > _LONGEST_DELAY:
            self._next = _FIRST_DELAY
