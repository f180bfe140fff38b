"""The frames that are timed: of a synthetic street, or somebody's own."""

from __future__ import annotations

from itertools import islice

import numpy as np
from numpy.typing import NDArray

from knet_runtime.errors import SourceError
from knet_runtime.preprocess import resize
from knet_runtime.source.address import redacted, scheme_of
from knet_runtime.synthetic import Street
from knet_runtime.video import open_source

_SEED = 2_000_000_000  # a street that training has not seen
_LIVE = ("rtsp", "rtsps")
_DRAWN = 360  # rows: a larger picture is drawn at about this size and enlarged, which is faster


def street_frames(size: tuple[int, int], count: int) -> list[NDArray[np.uint8]]:
    """``count`` frames, uint8 [H, W, 3] RGB of ``size`` (height, width), of one drive."""
    shrink = max(1, round(size[0] / _DRAWN))
    street = Street(_SEED, (max(size[0] // shrink, 32), max(size[1] // shrink, 32)))
    return [resize(street.frame(index)[0], size) for index in range(count)]


def read_frames(source: str, count: int) -> list[NDArray[np.uint8]]:
    """The first ``count`` frames of a video or folder, or fewer if it has no more. Raises
    SourceError when it can not be read, has none, or is live."""
    if scheme_of(source) in _LIVE:  # whether it answers or not
        raise _live(source)
    with open_source(source) as opened:
        if opened.info.live:
            raise _live(source)
        frames = [frame.image for frame in islice(opened, count)]
    if not frames:
        raise SourceError(f"{source} has no frames: pass a video or a folder of images")
    return frames


def _live(source: str) -> SourceError:
    return SourceError(
        f"{redacted(source)} is live, and what is timed must be the same frames for everybody: "
        "record some to a file and pass that"
    )
