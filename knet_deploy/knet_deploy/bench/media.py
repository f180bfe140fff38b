"""The frames that are timed, of a synthetic street or somebody's own, and the video files of them.

Decoding and encoding are timed alone, as they are the same for every engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path
from time import perf_counter

from knet_runtime.errors import SourceError
from knet_runtime.preprocess import resize
from knet_runtime.sinks.encoder import ENCODERS, VideoWriter, working_encoder
from knet_runtime.sources import open_source
from knet_runtime.sources.container import redacted, scheme_of
from knet_runtime.types import Rgb, Size
from knet_synthetic import Street

_RATE = 30
_SEED = 2_000_000_000  # a street that training has not seen
_DRAWN = 360  # rows: a larger frame is drawn at about this size and enlarged, which is faster


def street_frames(size: Size, count: int) -> list[Rgb]:
    """``count`` frames, uint8 [H, W, 3] RGB of ``size`` (height, width), of one drive."""
    shrink = max(1, round(size[0] / _DRAWN))
    street = Street(_SEED, (max(size[0] // shrink, 32), max(size[1] // shrink, 32)))
    return [resize(street.frame(index)[0], size) for index in range(count)]


def read_frames(source: str, count: int) -> list[Rgb]:
    """The first ``count`` frames of a video or folder, or fewer if it has no more. Raises
    SourceError when it cannot be read, has none, or is live."""
    live = SourceError(
        f"{redacted(source)} is live, and what is timed must be the same frames for everybody: "
        "record some to a file and pass that"
    )
    if scheme_of(source) in ("rtsp", "rtsps"):  # whether it answers or not
        raise live
    with open_source(source) as opened:
        if opened.info.live:
            raise live
        frames = [frame.image for frame in islice(opened, count)]
    if not frames:
        raise SourceError(f"{source} has no frames: pass a video or a folder of images")
    return frames


def write_video(path: Path, frames: Sequence[Rgb]) -> list[float]:
    """Write uint8 [H, W, 3] RGB frames as H.264 at 30 a second; milliseconds for each."""
    height, width = frames[0].shape[:2]
    path.unlink(missing_ok=True)
    encoder = working_encoder(ENCODERS["h264"], (height, width))
    writer = VideoWriter(path, (height, width), Fraction(1, _RATE), Fraction(_RATE), encoder)
    times = []
    for tick, frame in enumerate(frames):
        began = perf_counter()
        writer.write(frame, tick)
        times.append(1000 * (perf_counter() - began))
    began = perf_counter()
    writer.close()
    # The encoder lags behind: what it still holds at the end is shared by all frames.
    rest = 1000 * (perf_counter() - began) / len(frames)
    return [time + rest for time in times]


class Media:
    """Decodes and encodes files, with nothing else in the process."""

    def measure(self, video: Path, out: Path) -> dict[str, list[float]]:
        """Decode ``video`` to RGB frames, and encode these to ``out``: milliseconds per frame."""
        frames, decode = [], []
        with open_source(video) as source:
            began = perf_counter()
            for frame in source:
                decode.append(1000 * (perf_counter() - began))
                frames.append(frame.image)
                began = perf_counter()
        return {"decode": decode, "encode": write_video(out, frames)}
