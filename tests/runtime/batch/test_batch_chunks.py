"""Chunks, decoded apart, are the frames of the whole video, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from knet_runtime.batch.records import WHOLE, Chunk
from knet_runtime.batch.worker import cut
from knet_runtime.errors import SourceError
from knet_runtime.sources import open_source
from knet_runtime.types import Frame

Video = Callable[[str], Path]

# What can be cut at all: the others have to stay whole (see the test of them).
CUT = (
    "plain.mp4",
    "b-frames.mp4",
    "b-frames.mkv",
    "b-frames.ts",
    "open-gop.mp4",
    "open-gop.ts",
    "open-gop-hevc.mp4",
    "refresh.mp4",
    "refresh.ts",
    "vfr.mp4",
    "vfr.mkv",
    "late.mp4",
    "all-keys.avi",
    "vp9.webm",
)


def frames_of(path: Path, chunk: Chunk) -> list[Frame]:
    """What a worker keeps of it."""
    with open_source(path, chunk.options()) as source:
        taken = [(chunk.ticks(frame.pts), frame) for frame in source]
    if chunk.first is None:
        return [frame for _, frame in taken]
    return [frame for ticks, frame in taken if ticks is not None and ticks >= chunk.first]


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("seconds", [0.0, 1.2])
def test_chunks_together_are_the_whole(video: Video, name: str, seconds: float) -> None:
    path = video(name)
    whole = frames_of(path, WHOLE)
    chunks = cut(path, seconds)
    assert len(chunks) > 1, name
    parts = []
    for chunk in chunks:
        part = frames_of(path, chunk)
        assert tuple(chunk.ticks(frame.pts) for frame in part) == chunk.times
        parts += part
    assert [frame.pts for frame in parts] == [frame.pts for frame in whole]
    for one, other in zip(parts, whole, strict=True):
        np.testing.assert_array_equal(one.image, other.image)


@pytest.mark.parametrize("name", ["one-key.mp4", "no-index.h264", "interlaced.mp4"])
def test_what_cannot_be_cut_stays_whole(video: Video, name: str) -> None:
    assert cut(video(name), 0.5) == (WHOLE,)


def test_a_long_part_is_one_chunk_and_names_differ(video: Video) -> None:
    path = video("b-frames.mp4")
    assert cut(path, 100) == (WHOLE,)
    chunks = cut(path, 0)
    assert len({chunk.name for chunk in chunks}) == len(chunks)
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    assert all(one.until == two.first for one, two in pairwise(chunks))
    assert sum(len(chunk.times or ()) for chunk in chunks) == 60


def test_no_video_is_a_source_error(tmp_path: Path) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    with pytest.raises(SourceError, match=r"text\.mp4"):
        cut(text, 1)
