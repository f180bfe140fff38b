"""The ground floor: a frame, the arrays that travel between packages, and what can be closed."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

Rgb = NDArray[np.uint8]
"""An image or a frame's pixels: uint8 [H, W, 3], red first."""

ClassMap = NDArray[np.uint8] | NDArray[np.uint16]
"""The class of each pixel [H, W]: uint8, or uint16 beyond 256 classes."""

Size = tuple[int, int]
"""Height and width in pixels."""

Task = Literal["semantic", "instance", "panoptic"]
"""What a network finds: the class of each pixel, single objects, or both."""

Metric = Literal["mIoU", "AP", "PQ"]
METRICS: dict[Task, Metric] = {"semantic": "mIoU", "instance": "AP", "panoptic": "PQ"}
"""The score of each task, in percent."""

MAX_PIXELS = 200_000_000
"""A larger image is refused: as RGB it would take more than 600 MB, and a header can lie."""


@dataclass(frozen=True)
class RosHeader:
    """What the ROS message of a frame says: ``stamp``, its header's time in nanoseconds since the
    epoch (0 where nobody set it), ``frame_id``, and when it was ``logged``, in nanoseconds too."""

    stamp: int
    frame_id: str
    logged: int

    @property
    def parts(self) -> tuple[int, int]:
        """The stamp as ROS writes it: whole seconds, and nanoseconds."""
        return divmod(self.stamp, 10**9)

    def later(self, seconds: Fraction) -> RosHeader:
        """The header of the same frame so much later; a stamp that nobody set stays 0."""
        shift = round(seconds * 10**9)
        stamp = self.stamp and self.stamp + shift
        return RosHeader(stamp, self.frame_id, self.logged + shift)


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame of a source.

    ``image`` is uint8 [H, W, 3] RGB, contiguous and the frame's own. ``index`` counts the frames
    that are handed on, from 0. ``pts`` is the time in seconds since the source's start, exact, or
    None where the source has no time (images) or left it out. ``name`` differs between all frames
    of a source: the image's stem (``as_utf8``), or the index with at least six digits. ``wall`` is
    when a live frame arrived, in seconds since the epoch. ``stale`` marks a frame that is handed on
    again because no newer one came. ``ros`` is there for frames out of a bag. ``scene`` counts how
    often the source has begun anew, as a file does that is played in a loop: of what was in another
    scene nothing goes on.

        >>> from knet_deploy import open_source
        >>> with open_source("drive.mp4") as source:
        ...     frame = list(source)[5]
        >>> frame.name, frame.pts, frame.image.shape
        ('000005', Fraction(1, 5), (360, 480, 3))
    """

    image: Rgb
    index: int
    pts: Fraction | None
    name: str
    wall: float | None = None
    stale: bool = False
    ros: RosHeader | None = None
    scene: int = 0


def as_utf8(name: str) -> str:
    """A file's name as text that can be written: bytes of it that are no UTF-8, which Python holds
    as lone surrogates, become "\\xe9"; every other text stays as it is."""
    return re.sub("[\ud800-\udfff]", lambda half: _escaped(ord(half[0])), name)


def _escaped(half: int) -> str:
    byte = half - 0xDC00
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else "\ufffd"


_Self = TypeVar("_Self", bound="Closeable")


class Closeable(ABC):
    """Whoever holds a file, an engine or a connection: a context manager that closes itself."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything; a second call does nothing."""

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
