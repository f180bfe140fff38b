"""What a source hands on: frames with their timing, and what is known of the source beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from knet_runtime.sources.base import SourceStatus

SourceKind = Literal["video", "image", "images", "camera", "stream"]

MAX_PIXELS = 200_000_000
"""A larger picture is refused: as RGB it would take more than 600 MB, and a header can lie."""


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture of a source.

    ``image`` is uint8 [H, W, 3] RGB, contiguous and the frame's own. ``index`` counts the frames
    that are handed on, from 0. ``pts`` is the time in seconds since the source's start, exact, or
    None where the source has no time (images) or left it out. ``name`` differs between all frames
    of a source: the image's stem, or the index with at least six digits. ``wall`` is when a live
    frame arrived, in seconds since the epoch. ``stale`` marks a picture that is handed on again
    because no newer one came.
    """

    image: NDArray[np.uint8]
    index: int
    pts: Fraction | None
    name: str
    wall: float | None = None
    stale: bool = False


@dataclass(frozen=True)
class SourceInfo:
    """What is known before the first frame is taken.

    ``hw`` is the (height, width) of the first frame; later ones may differ. ``rate`` is frames per
    second where one is stated. ``frames`` is a hint for progress bars: files state it wrongly.
    ``time_base`` is the unit in seconds of which every ``Frame.pts`` is a multiple. ``path`` is the
    file, folder or device that is read.
    """

    kind: SourceKind
    hw: tuple[int, int]
    rate: Fraction | None
    frames: int | None
    time_base: Fraction | None = None
    path: Path | None = None

    @property
    def live(self) -> bool:
        """Whether frames come when they come, and wait for nobody."""
        return self.kind in ("camera", "stream")


class Source(Protocol):
    """Frames, once and in order, from something that is open until it is closed.

    Iterating raises SourceError where the source is damaged; what came before stays valid.
    A second loop goes on where the first one stopped. A live source has no end: it reconnects.
    """

    @property
    def info(self) -> SourceInfo: ...

    @property
    def status(self) -> SourceStatus:
        """How a live source fares; may be asked from any thread."""
        ...

    def __iter__(self) -> Iterator[Frame]: ...

    def stop(self) -> None:
        """End the iteration, from any thread: at the next picture, or when a read times out."""
        ...

    def close(self) -> None:
        """Let go of everything; only when no thread is iterating."""
        ...

    def __enter__(self) -> Source: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
