"""A very long run: memory, handles and threads must stay where they were after its beginning.

    python benchmarks/soak.py --bundle small.knet --output benchmarks/results/soak.json

A long video of small frames goes through the pipeline to an overlay MP4 and JSON lines. Ends with
1 if memory grew by more than 2 % after the first fifth, or if the run left a handle or a thread.
README.md beside this file says what the numbers mean.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import psutil
from result import parser_of, write_result

from knet_runtime.pipeline import Feed, run
from knet_runtime.segmentation import Segmentation
from knet_runtime.segmenter import Segmenter
from knet_runtime.sinks import JsonLines, OverlayVideo
from knet_runtime.sinks.encoder import ENCODERS, VideoWriter, working_encoder
from knet_runtime.sources import open_source
from knet_runtime.types import Frame
from knet_synthetic import Street

GROWTH = 0.02
SAMPLES = 100
LEFT_SECONDS = 10
DRAWN, SHOWN = 50, 10
"""So many images are drawn, and each is shown so often, again and again: drawing is not tested."""


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--bundle", type=Path, help="the packaged model without it")
    parser.add_argument("--engine", default="onnxruntime-cpu")
    parser.add_argument("--frames", type=int, default=200_000)
    parser.add_argument("--size", default="64x48", help="of the video, WxH")
    return parser.parse_args()


def make_video(path: Path, hw: tuple[int, int], frames: int) -> None:
    writer = VideoWriter(
        path, hw, Fraction(1, 25), Fraction(25), working_encoder(ENCODERS["h264"], hw)
    )
    street = Street(7, (240, 320))
    drawn = [street.frame(index)[0] for index in range(0, DRAWN * SHOWN, SHOWN)]
    images = [np.asarray(cv2.resize(image, (hw[1], hw[0])), np.uint8) for image in drawn]
    for index in range(frames):
        writer.write(images[index // SHOWN % DRAWN], index)
    writer.close()


def held() -> dict[str, int]:
    process = psutil.Process()
    return {"handles": process.num_fds(), "threads": process.num_threads()}


def measure(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    width, height = (int(side) for side in options.size.split("x"))
    video = folder / "long.mp4"
    make_video(video, (height, width), options.frames)
    process, every = psutil.Process(), max(1, options.frames // SAMPLES)
    resident: list[float] = []

    def sample(frame: Frame, _: Segmentation) -> None:
        if frame.index % every == 0:
            resident.append(round(process.memory_info().rss / 2**20, 2))

    with Segmenter(options.bundle, options.engine) as segmenter:
        segmenter.warm_up()
        before = held()
        began = time.monotonic()
        with open_source(video) as source:
            sinks = [
                OverlayVideo(folder / "overlay.mp4", source.info),
                JsonLines(folder / "lines.jsonl", segmenter.model_id),
            ]
            summary = run([Feed(source, sinks)], segmenter, on_frame=sample)
        seconds = time.monotonic() - began
        gc.collect()
        until = time.monotonic() + LEFT_SECONDS
        while any(after > before[what] for what, after in held().items()):
            if time.monotonic() > until:
                break
            time.sleep(0.1)
        after = held()
        model, engine = segmenter.model_id, segmenter.engine
    warm = statistics.median(resident[SAMPLES // 5 :][:10])
    last = statistics.median(resident[-10:])
    return {
        "what": "resident memory (MiB), handles and threads of one long run, file to MP4 and JSON",
        "model": model,
        "engine": engine,
        "size": options.size,
        "frames": summary.frames,
        "hours": round(seconds / 3600, 3),
        "fps": round(summary.frames / seconds, 1),
        "rss_mib": [warm, last],
        "growth": round(last / warm - 1, 5),
        "before": before,
        "after": after,
        "rss_mib_all": resident,
        "passed": summary.frames == options.frames
        and last <= (1 + GROWTH) * warm
        and all(after[what] <= before[what] for what in before),
    }


def main() -> int:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        report = measure(options, Path(folder))
    write_result(report, options.output)
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
