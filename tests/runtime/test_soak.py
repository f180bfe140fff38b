"""A long run: memory, file handles and threads stay where they were after the first frames."""

from __future__ import annotations

import gc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil
import pytest

from knet_runtime.bundle import Bundle
from knet_runtime.frames import Frame
from knet_runtime.output.encoder import ENCODERS, working_encoder
from knet_runtime.output.video_file import VideoWriter
from knet_runtime.segmenter import Mask, Segmenter
from knet_runtime.sinks import JsonLines, OverlayVideo
from knet_runtime.stream import Feed, run
from knet_runtime.video import open_source

from .stream_parts import entries, pipeline_threads, wait_until

HEIGHT, WIDTH = 48, 64
GROWTH = 0.02


def write_video(path: Path, frames: int) -> Path:
    encoder = working_encoder(ENCODERS["h264"], (HEIGHT, WIDTH))
    writer = VideoWriter(path, (HEIGHT, WIDTH), Fraction(1, 25), Fraction(25), encoder)
    pictures = np.random.default_rng(0).integers(0, 256, (5, 6, 8, 3)).astype(np.uint8)
    for tick in range(frames):
        writer.write(np.kron(pictures[tick // 10 % 5], np.ones((8, 8, 1), np.uint8)), tick)
    writer.close()
    return path


@pytest.mark.parametrize(
    "frames", [3_000, pytest.param(200_000, marks=[pytest.mark.soak, pytest.mark.timeout(7200)])]
)
def test_a_long_run_takes_no_more_memory_than_its_beginning(
    frames: int, tmp_path: Path, make_bundle: Callable[..., Bundle]
) -> None:
    video = write_video(tmp_path / "long.mp4", frames)
    process = psutil.Process()
    warm, sampled = frames // 5, []

    def sample(frame: Frame, mask: Mask) -> None:
        if frame.index >= warm and frame.index % (frames // 100) == 0:
            sampled.append(process.memory_info().rss)

    with Segmenter(make_bundle(), "onnxruntime-cpu") as segmenter:
        threads, files = entries("/proc/self/task"), entries("/proc/self/fd")
        with open_source(video) as source:
            sinks = [
                OverlayVideo(tmp_path / "o.mp4", source.info),
                JsonLines(tmp_path / "o.jsonl", "m@1"),
            ]
            summary = run([Feed(source, sinks)], segmenter, on_frame=sample)
        assert summary.frames == frames
        assert pipeline_threads() == []
        assert entries("/proc/self/fd") == files
        wait_until(lambda: entries("/proc/self/task") <= threads, "all threads to end")
    gc.collect()
    first, last = np.median(sampled[:10]), np.median(sampled[-10:])
    told = f"{first / 2**20:.1f} MiB after a fifth, {last / 2**20:.1f} MiB at the end"
    assert last <= (1 + GROWTH) * first, told
