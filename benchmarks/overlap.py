"""How much of its slowest stage's speed a whole run has: file to file, against each stage alone.

    python benchmarks/overlap.py --output benchmarks/results/overlap.json

A 1280×720 H.264 file of a synthetic street is decoded, segmented by the packaged bundle, and
written as an overlay, once by the pipeline and once stage by stage, with the same settings. Rounds
go in turns, so that whatever else the machine does meets all.
README.md beside this file says what the numbers mean.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
from result import parser_of, write_result

from knet_runtime.engines.hardware import cpu_budget
from knet_runtime.pipeline import Feed, run
from knet_runtime.segmentation import Segmentation
from knet_runtime.segmenter import Segmenter
from knet_runtime.sinks import Look, OverlayVideo
from knet_runtime.sources import open_source
from knet_runtime.sources.base import SourceInfo
from knet_runtime.types import Frame
from knet_synthetic import Street

SIZE = (720, 1280)
RATE = Fraction(30)


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--engine", default="onnxruntime-cpu")
    parser.add_argument("--frames", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def make_video(path: Path, segmenter: Segmenter, frames: int) -> None:
    """A drive through a synthetic street, drawn small and enlarged: drawing is not measured."""
    street = Street(7, (SIZE[0] // 2, SIZE[1] // 2))
    info = SourceInfo("video", SIZE, RATE, frames, 1 / RATE)
    sink = OverlayVideo(path, info, Look(alpha=0.0))
    for index in range(frames):
        image, _ = street.frame(index)
        large = np.asarray(cv2.resize(image, (SIZE[1], SIZE[0])), np.uint8)
        empty = Segmentation(np.zeros(SIZE, np.uint8), segmenter.labels)
        sink.write(Frame(large, index, index / RATE, f"{index:06d}"), empty)
    sink.close()


def overlay(path: Path, info: SourceInfo) -> OverlayVideo:
    path.unlink(missing_ok=True)
    return OverlayVideo(path, info, Look(alpha=0.5))


def times(frames: int, work: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds a frame: of the clock, and of all cores together."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return 1000 * wall / frames, 1000 * cpu / frames


def measure(options: argparse.Namespace) -> dict[str, object]:
    names = ("run", "decode", "segment", "write")
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder, Segmenter(None, options.engine) as segmenter:
        video, out = Path(folder) / "in.mp4", Path(folder) / "out.mp4"
        make_video(video, segmenter, options.frames)
        with open_source(video) as source:
            info, frames = source.info, list(source)
        segmenter.warm_up()
        segmented = [segmenter(frame.image) for frame in frames]

        def whole() -> None:
            with open_source(video) as source:
                run([Feed(source, [overlay(out, source.info)])], segmenter)

        def decode() -> None:
            with open_source(video) as source:
                for _ in source:
                    pass

        def segment() -> None:
            for frame in frames:
                segmenter(frame.image)

        def write() -> None:
            sink = overlay(out, info)
            for frame, found in zip(frames, segmented, strict=True):
                sink.write(frame, found)
            sink.close()

        stages = dict(zip(names, (whole, decode, segment, write), strict=True))
        for _ in range(options.rounds):
            for name, work in stages.items():
                one, all_cores = times(len(frames), work)
                wall[name].append(round(one, 3))
                cpu[name].append(round(all_cores, 3))
                time.sleep(0.5)  # threads of the last one that spin still
        engine, model = segmenter.engine, segmenter.model_id
    slowest = max(names[1:], key=lambda name: statistics.median(wall[name]))
    ratios = [one / whole for whole, one in zip(wall["run"], wall[slowest], strict=True)]
    lowest = [
        sum(each) / cpu_budget() for each in zip(*(cpu[name] for name in names[1:]), strict=True)
    ]
    bounds = [one / max(one, low) for low, one in zip(lowest, wall[slowest], strict=True)]
    return {
        "what": "ms per frame, 1280×720 file to overlay MP4; ratio: slowest stage alone / run",
        "model": model,
        "engine": engine,
        "frames": len(frames),
        "slowest": slowest,
        "ratio": round(statistics.median(ratios), 4),
        "ratio_if_no_core_ever_waited": round(statistics.median(bounds), 4),
        "wall_ms": {name: statistics.median(values) for name, values in wall.items()},
        "cpu_ms": {name: statistics.median(values) for name, values in cpu.items()},
        "rounds": {"wall_ms": wall, "cpu_ms": cpu},
    }


def main() -> None:
    options = parse()
    report = measure(options)
    write_result(report, options.output)


if __name__ == "__main__":
    main()
