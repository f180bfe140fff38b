"""The ends of the road, which all engines share: decoding a file, and encoding one."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from knet_runtime.output.encoder import ENCODERS, working_encoder
from knet_runtime.output.video_file import VideoWriter
from knet_runtime.video import open_source

_RATE = 30
Frames = Sequence[NDArray[np.uint8]]


def write_video(path: Path, frames: Frames) -> list[float]:
    """Write uint8 [H, W, 3] RGB frames as H.264 at 30 a second; milliseconds for each."""
    height, width = frames[0].shape[:2]
    path.unlink(missing_ok=True)
    encoder = working_encoder(ENCODERS["h264"], (height, width))
    writer = VideoWriter(path, (height, width), Fraction(1, _RATE), Fraction(_RATE), encoder)
    times = []
    for tick, frame in enumerate(frames):
        started = perf_counter()
        writer.write(frame, tick)
        times.append(1000 * (perf_counter() - started))
    started = perf_counter()
    writer.close()
    # The encoder works behind: what it still holds at the end belongs to all.
    rest = 1000 * (perf_counter() - started) / len(frames)
    return [time + rest for time in times]


class Media:
    """Decodes and encodes files, with nothing else in the process."""

    def lap(self, video: Path, out: Path) -> dict[str, list[float]]:
        """Decode ``video`` to RGB frames, and encode these to ``out``: milliseconds per frame."""
        frames, decode = [], []
        with open_source(video) as source:
            iterator = iter(source)
            while True:
                started = perf_counter()
                frame = next(iterator, None)
                if frame is None:
                    break
                decode.append(1000 * (perf_counter() - started))
                frames.append(frame.image)
        return {"decode": decode, "encode": write_video(out, frames)}
