"""What a full disk and a killed process leave behind, each tried in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import pytest

import knet_runtime
from knet_runtime.sinks import OverlayVideo
from knet_runtime.sources import open_source
from knet_runtime.sources.base import SourceInfo

FILL_THE_DISK = """
import resource, sys
from fractions import Fraction
import numpy as np
from knet_runtime.errors import OutputError
from knet_runtime.types import Frame
from knet_runtime.sources.base import SourceInfo
from knet_runtime.labels import LabelMap
from knet_runtime.segmentation import Segmentation
from knet_runtime.sinks import JsonLines, OverlayVideo

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
info = SourceInfo("video", (96, 128), Fraction(5), None, Fraction(1, 5))
labels = LabelMap(tuple("abcdefghijk"), ((9, 9, 9),) * 11, 255)
mask = Segmentation(np.zeros((96, 128), np.uint8), labels, {})
random = np.random.default_rng(0)
video = OverlayVideo(sys.argv[1] + "/o." + sys.argv[3], info)
for sink in (video, JsonLines(sys.argv[1] + "/o.jsonl", "m")):
    try:
        for i in range(300):
            image = random.integers(0, 256, (96, 128, 3), np.uint8)
            sink.write(Frame(image, i, Fraction(i, 5), str(i)), mask)
        sys.exit("the disk never filled")
    except OutputError as error:
        assert "free some space" in str(error), error
    sink.close(complete=False)
"""
ROOM = str(Path(knet_runtime.__file__).parent.parent)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("limit", [40, 60_000])
def test_a_full_disk_is_an_output_error_and_leaves_only_what_plays(
    tmp_path: Path, limit: int, suffix: str
) -> None:
    subprocess.run(
        [sys.executable, "-c", FILL_THE_DISK, str(tmp_path), str(limit), suffix],
        env={**os.environ, "PYTHONPATH": ROOM},
        check=True,
        timeout=60,
    )
    if limit == 40:
        assert files_in(tmp_path) == []
        return
    assert files_in(tmp_path) == ["o.partial.jsonl", f"o.partial.{suffix}"]
    lines = (tmp_path / "o.partial.jsonl").read_text().splitlines()
    assert [json.loads(line)["frame"] for line in lines] == list(range(len(lines)))
    with av.open(str(tmp_path / f"o.partial.{suffix}")) as container:
        assert next(container.decode(video=0)).width == 128


def test_a_killed_process_leaves_a_hidden_file_that_plays(tmp_path: Path) -> None:
    program = FILL_THE_DISK.replace("range(300)", "range(60)").replace(
        'sys.exit("the disk never filled")', "__import__('os').kill(__import__('os').getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), "100000000", "mp4"],
        env={**os.environ, "PYTHONPATH": ROOM},
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    (name,) = files_in(tmp_path)
    assert name.startswith(".o.mp4.")
    assert name.endswith(".part")
    with av.open(f"file:{tmp_path / name}", format="mp4") as container:
        assert sum(1 for _ in container.decode(video=0)) >= 10
    info = SourceInfo("video", (96, 128), Fraction(5), None, Fraction(1, 5))
    OverlayVideo(tmp_path / "o.mp4", info).close()
    assert files_in(tmp_path) == ["o.partial.mp4"]
    with open_source(tmp_path / "o.partial.mp4") as source:
        assert len(list(source)) >= 10
