"""320 bad videos: each ends as frames or as one line, in time and within memory."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from corpus import make_videos
from corpus.measured import read_apart

SECONDS = 10  # for one video
MEMORY_MIB = 1200  # for any: a frame of a hundred megapixels is 286 MiB as RGB
SMALL_MIB = 200


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_videos.make_videos(tmp_path_factory.mktemp("corpus"))


def read(videos: list[Path]) -> list[dict[str, Any]]:
    return read_apart("read_videos.py", videos, timeout=SECONDS * 10)


def test_every_bad_video_ends_as_frames_or_as_one_line(corpus: list[Path]) -> None:
    assert len(corpus) == 320
    small = [path for path in corpus if not path.name.startswith("large")]
    seen = read(small)
    assert [line["name"] for line in seen] == [path.name for path in small]
    for line in seen:
        assert line["frames"] or line["error"], line
        assert "\n" not in str(line["error"]), line
        assert float(str(line["seconds"])) < SECONDS, line
    assert seen[-1]["peak_mib"] < SMALL_MIB
    # A corpus that all fails to open, or all reads well, would test nothing.
    assert sum(bool(line["frames"]) for line in seen) > 100
    assert sum(bool(line["error"]) for line in seen) > 100


def test_frames_of_a_hundred_megapixels_stay_within_the_cap(corpus: list[Path]) -> None:
    for path in corpus:
        if path.name.startswith("large"):
            (line,) = read([path])
            assert line["frames"] == 1
            assert line["peak_mib"] < MEMORY_MIB, line


def test_the_corpus_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    maker = make_videos
    name = "h264.mkv"
    codec, pixels, options = maker.CLIPS[name]
    first, second = (maker.encode(tmp_path / name, codec, pixels, options) for _ in range(2))
    assert first == second
    changes = (maker.flip_bits, maker.cut, maker.wreck_header, maker.shuffle, maker.join)
    for change in changes:
        assert change(first, random.Random("a")) == change(second, random.Random("a"))
        assert len({change(first, random.Random(seed)) for seed in "abcd"}) > 1
