"""How many threads, and whether they spin while they wait: whole runs, and the engine alone.

    python benchmarks/threads.py --output benchmarks/results/threads.json

The file of overlap.py goes through the pipeline with ONNX Runtime's threads set in each way, in
turns. README.md beside this file says what the numbers mean.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import onnxruntime as ort
from overlap import make_video, overlay, times
from result import parser_of, write_result

from knet_runtime.engines.hardware import cpu_budget
from knet_runtime.pipeline import Feed, run
from knet_runtime.segmenter import Segmenter
from knet_runtime.sources import open_source

SPIN = "session.intra_op.allow_spinning"


def open_segmenter(threads: int, spin: bool) -> Segmenter:
    """The packaged model on ONNX Runtime's CPU engine with these settings in place of its own."""

    class Options(ort.SessionOptions):
        def add_session_config_entry(self, key: str, value: str) -> None:
            super().add_session_config_entry(key, str(int(spin)) if key == SPIN else value)

    with (
        mock.patch("knet_runtime.engines.onnxruntime.cpu_budget", return_value=threads),
        mock.patch("onnxruntime.SessionOptions", Options),
    ):
        return Segmenter(None, "onnxruntime-cpu")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--frames", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    cores = cpu_budget()
    settings = [(count, spin) for count in sorted({1, cores}) for spin in (False, True)]
    runs: dict[tuple[int, bool], list[dict[str, float]]] = {setting: [] for setting in settings}
    with tempfile.TemporaryDirectory() as folder:
        video, out = Path(folder) / "in.mp4", Path(folder) / "out.mp4"
        with Segmenter(None, "onnxruntime-cpu") as segmenter:
            make_video(video, segmenter, options.frames)
        with open_source(video) as source:
            images = [frame.image for frame in source]
        for _ in range(options.rounds):
            for setting in settings:
                # Opened anew: threads of another one that still spin would be measured too.
                with open_segmenter(*setting) as segmenter:
                    segmenter.warm_up()

                    def whole(segmenter: Segmenter = segmenter) -> None:
                        with open_source(video) as source:
                            run([Feed(source, [overlay(out, source.info)])], segmenter)

                    def alone(segmenter: Segmenter = segmenter) -> None:
                        for image in images:
                            segmenter(image)

                    wall, cpu = times(options.frames, whole)
                    alone_wall, alone_cpu = times(options.frames, alone)
                    row = {"run_ms": wall, "run_cpu_ms": cpu}
                    row |= {"alone_ms": alone_wall, "alone_cpu_ms": alone_cpu}
                    runs[setting].append({name: round(value, 3) for name, value in row.items()})
                time.sleep(0.5)
    rows = [
        {"threads": threads, "spin": spin}
        | {name: statistics.median(row[name] for row in found) for name in found[0]}
        for (threads, spin), found in runs.items()
    ]
    report = {
        "what": "ms per frame, 1280×720 file to overlay MP4, and the segmenter alone",
        "frames": options.frames,
        "rows": rows,
        "rounds": list(runs.values()),
    }
    write_result(report, options.output)


if __name__ == "__main__":
    main()
