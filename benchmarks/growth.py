"""What the cost grows with: input area, classes, batch and sources.

    python benchmarks/growth.py --output benchmarks/results/growth.json --plot docs/growth.png

Networks of random weights in the runtime, in rounds that take turns among all points. The slope
beside each step is the exponent of its growth: 1 is linear.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

from random_bundle import random_model, write_random
from result import parser_of, write_result

from knet_deploy.bench.benchmark import street_frames, write_video
from knet_deploy.bench.report import TOTAL, Measurement, interleave, stages
from knet_export.spec import MULTIPLE
from knet_runtime.bundle.manifest import SizeRange
from knet_runtime.pipeline import Feed, run
from knet_runtime.segmenter import Segmenter
from knet_runtime.sinks import OverlayVideo
from knet_runtime.sources import open_source
from knet_runtime.types import Size

AREAS = ("256x256", "360x480", "512x512", "720x1280", "1024x1024", "1024x2048")
CLASSES = (11, 19, 50, 150, 500, 1000)
BATCHES = (1, 2, 4, 8, 16)
SOURCES = (1, 2, 4, 8)
Measure = Callable[[], dict[str, list[float]]]


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--preset", default="knet-edge")
    parser.add_argument("--engine", default="onnxruntime-cpu")
    parser.add_argument("--areas", nargs="+", default=list(AREAS), help="HEIGHTxWIDTH")
    parser.add_argument("--classes", nargs="+", type=int, default=list(CLASSES))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--sources", nargs="+", type=int, default=list(SOURCES))
    parser.add_argument("--size", default="256x256", help="of all but the areas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--plot", type=Path, help="PNG")
    return parser.parse_args()


def size_of(text: str) -> Size:
    height, width = (int(side) for side in text.split("x"))
    return height, width


def span_of(sizes: Sequence[Size]) -> SizeRange | None:
    """All of these sizes; None where they are one."""
    heights, widths = zip(*sizes, strict=True)
    if len(set(sizes)) == 1:
        return None
    return SizeRange((min(heights), min(widths)), (max(heights), max(widths)), MULTIPLE)


class Points:
    """Every point of every curve: its name, where it lies, and how it is measured."""

    def __init__(self, options: argparse.Namespace, stack: ExitStack) -> None:
        self.options, self.stack = options, stack
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.size = size_of(options.size)
        self.found: dict[tuple[str, float], Measure] = {}

    def prepare(self) -> dict[tuple[str, float], Measure]:
        options = self.options
        sizes = [size_of(text) for text in options.areas]
        bundle = write_random(
            self.folder / "free.knet",
            random_model(options.preset, options.classes[0]),
            options.preset,
            size=self.size,
            sizes=span_of([*sizes, self.size]),
            max_batch=max(options.batches),
        )
        free = self.opened(bundle)
        for size in sizes:
            found = self.opened(bundle.with_input_size(size))
            self.found["area", size[0] * size[1]] = self.frame_by_frame(found, size)
        for count in options.classes:  # graphs of one size and one image, which the free one is not
            model = random_model(options.preset, count)
            name = self.folder / f"{count}.knet"
            other = write_random(name, model, options.preset, size=self.size)
            found = self.opened(other)
            self.found["classes", count] = self.frame_by_frame(found, self.size)
        for batch in options.batches:
            self.found["batch", batch] = self.in_batches(free, batch)
        video = self.folder / "in.mp4"
        write_video(video, street_frames(self.size, options.frames) * 4)
        for count in options.sources:
            self.found["sources", count] = self.from_files(free, video, count)
        return self.found

    def opened(self, bundle: Any) -> Segmenter:
        segmenter = self.stack.enter_context(Segmenter(bundle, self.options.engine))
        segmenter.warm_up()
        return segmenter

    def frame_by_frame(self, segmenter: Segmenter, size: Size) -> Measure:
        frames = street_frames(size, self.options.frames)

        def measure() -> dict[str, list[float]]:
            times = [segmenter(frame).timings for frame in frames]
            stages = {stage: [time[stage] for time in times] for stage in times[0]}
            return {TOTAL: [sum(time.values()) for time in times], **stages}

        return measure

    def in_batches(self, segmenter: Segmenter, batch: int) -> Measure:
        frames = street_frames(self.size, batch)
        segmenter.batch(frames)

        def measure() -> dict[str, list[float]]:
            started = time.perf_counter()
            segmenter.batch(frames)
            return {TOTAL: [1000 * (time.perf_counter() - started)]}

        return measure

    def from_files(self, segmenter: Segmenter, video: Path, count: int) -> Measure:
        def measure() -> dict[str, list[float]]:
            with ExitStack() as stack:
                opened = [stack.enter_context(open_source(video)) for _ in range(count)]
                outs = [self.folder / f"out{number}.mp4" for number in range(count)]
                for out in outs:
                    out.unlink(missing_ok=True)
                feeds = [
                    Feed(source, [OverlayVideo(out, source.info)], out.stem)
                    for source, out in zip(opened, outs, strict=True)
                ]
                started = time.perf_counter()
                run(feeds, segmenter, warm_up=False)
                return {TOTAL: [1000 * (time.perf_counter() - started)]}

        return measure


def slopes(points: Sequence[tuple[float, float]]) -> list[float | None]:
    """The exponent of growth from each point's predecessor to it: log y over log x."""
    found: list[float | None] = [None]
    for (x, y), (further, higher) in pairwise(points):
        found.append(round(math.log(higher / y) / math.log(further / x), 3))
    return found


def main() -> None:
    options = parse()
    with ExitStack() as stack:
        points = Points(options, stack).prepare()
        names = {f"{kind} {at:g}": (kind, at) for kind, at in points}

        def measure(name: str, case: str, number: int) -> Measurement:
            return Measurement(name, case, number, points[names[name]]())

        cases = {name: ["ms"] for name in names}
        measurements = interleave(cases, options.rounds, measure, pause=0.05)
    curves = []
    for kind in ("area", "classes", "batch", "sources"):
        times = {
            at: stages(one for one in measurements if names[one.target] == (kind, at))
            for other, at in points
            if other == kind
        }
        placed = sorted((at, time[TOTAL].median) for at, time in times.items())
        curves.append(
            {
                "against": kind,
                "points": [
                    {"at": at, "ms": ms, "slope": slope, "stages": _plain(times[at])}
                    for (at, ms), slope in zip(placed, slopes(placed), strict=True)
                ],
            }
        )
    report = {
        "what": "ms: a frame (area, classes), a batch, or all files of several sources",
        "preset": options.preset,
        "engine": options.engine,
        "size": options.size,
        "rounds": options.rounds,
        "frames": options.frames,
        "curves": curves,
    }
    write_result(report, options.output)
    if options.plot is not None:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        draw(report, options.plot)
    for curve in curves:
        for point in curve["points"]:
            if point["slope"] is not None:
                where = f"{curve['against']} {point['at']:g}"
                sys.stderr.write(f"{where}: {point['ms']:.1f} ms, exponent {point['slope']:.2f}\n")


def _plain(times: dict[str, Any]) -> dict[str, float]:
    return {name: time.median for name, time in times.items()}


def draw(report: dict[str, Any], path: Path) -> None:
    """A PNG with a panel for each thing that grows: the whole, and the stages where they are
    known. Both axes are logarithmic, so grey is what grows linearly."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    figure.suptitle(f"{report['preset']}: {report['engine']}")
    for axes, curve in zip(figure.subplots(2, 2).flat, report["curves"], strict=True):
        points = curve["points"]
        at = [point["at"] for point in points]
        axes.loglog(at, [points[0]["ms"] * x / at[0] for x in at], color="0.8")
        for stage in points[0]["stages"]:
            if stage != "preprocess":
                times = [point["stages"][stage] for point in points]
                axes.loglog(at, times, "o-", label=stage)
        axes.set_xticks(at, [f"{x:,}" for x in at], rotation=60)
        axes.set_xticks([], minor=True)
        axes.set(xlabel=curve["against"], ylabel="ms")
        axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
