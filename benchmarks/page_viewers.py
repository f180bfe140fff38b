"""What viewers of the live page cost the run: its frames per second with 0, 1 and 10 of them.

    python benchmarks/page_viewers.py --output benchmarks/results/page_viewers.json

The packaged bundle segments 1280×720 frames as fast as it can, each handed to the page's sink. The
viewers take every frame that they are sent, in a process of their own, over 127.0.0.1. Rounds of
each count go in turns, so that whatever else the machine does meets all.
README.md beside this file says what the numbers mean.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
from result import parser_of, write_result

from knet_runtime.pipeline import RunStats
from knet_runtime.segmentation import Segmentation
from knet_runtime.segmenter import Segmenter
from knet_runtime.types import Frame
from knet_runtime.web.auth import listen
from knet_runtime.web.server import LivePage, PageSink
from knet_runtime.web.streams import FrameShot, page_frame, runs
from knet_synthetic import Street

VIEWERS = (0, 1, 10)


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--engine", default="onnxruntime-cpu")
    parser.add_argument("--seconds", type=float, default=8, help="of one round")
    parser.add_argument("--rounds", type=int, default=5, help="for each count of viewers")
    return parser.parse_args()


def round_of(
    viewers: int, port: int, segmenter: Segmenter, images: list[Any], sink: PageSink, span: float
) -> dict[str, float]:
    child = None
    if viewers:
        script = Path(__file__).with_name("page_viewer.py")
        command = [sys.executable, str(script), str(port), str(viewers)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    frames, began, cpu = 0, 0.0, 0.0
    # The first second lets the viewers connect.
    start = time.monotonic() + 1
    for index, image in enumerate(itertools.cycle(images)):
        now = time.monotonic()
        if now >= start and not began:
            frames, began, cpu = 0, now, time.process_time()
        if began and now >= began + span:
            break
        sink.write(Frame(image, index, None, f"{index:06d}"), segmenter(image))
        frames += 1
    seconds = time.monotonic() - began
    row = {"fps": frames / seconds, "cpu_per_frame": (time.process_time() - cpu) / frames}
    if child is not None:
        out, _ = child.communicate(b"")
        size, count = json.loads(out)
        row |= {"frames_per_viewer": count / viewers, "bytes_per_frame": size / max(count, 1)}
    return row


def encodings(image: Any, found: Segmentation) -> dict[str, dict[str, float]]:
    """Milliseconds and bytes of the class map in three encodings, and of the whole frame."""
    classes = found.class_map
    fast = [cv2.IMWRITE_PNG_COMPRESSION, 1]
    encoders: dict[str, Callable[[], int]] = {
        "runs": lambda: sum(part.nbytes for part in runs(classes)),
        "png": lambda: len(cv2.imencode(".png", classes, fast)[1]),
        "zlib": lambda: len(zlib.compress(classes.tobytes(), 1)),
        "frame": lambda: len(page_frame(FrameShot(1, Frame(image, 0, None, "0"), found, 0.0))),
    }
    rows = {}
    for name, encode in encoders.items():
        times = []
        for _ in range(15):
            began = time.perf_counter()
            size = encode()
            times.append(1000 * (time.perf_counter() - began))
        rows[name] = {"ms": round(statistics.median(times), 2), "bytes": size}
    return rows


def medians(rows: dict[int, list[dict[str, float]]], key: str) -> dict[str, float]:
    return {
        str(count): round(statistics.median(row[key] for row in found), 4)
        for count, found in rows.items()
    }


def ratios(rows: dict[int, list[dict[str, float]]], key: str) -> dict[str, float]:
    """The median over the rounds of with / without viewers, each against its own round's."""
    return {
        str(count): round(
            statistics.median(
                row[key] / without[key] for row, without in zip(found, rows[0], strict=True)
            ),
            3,
        )
        for count, found in rows.items()
        if count
    }


def main() -> None:
    options = parse()
    street = Street(0, (720, 1280))
    images = [street.frame(index)[0] for index in range(0, 80, 10)]
    rows: dict[int, list[dict[str, float]]] = {count: [] for count in VIEWERS}
    with Segmenter(engine=options.engine) as segmenter:
        listener = listen("127.0.0.1:0")
        stats = RunStats()
        with LivePage(listener, segmenter.labels, stats.snapshot, feeds=["street"]) as page:
            sink = page.sink("street")
            for _, count in itertools.product(range(options.rounds), VIEWERS):
                rows[count].append(
                    round_of(count, listener.port, segmenter, images, sink, options.seconds)
                )
        encoded = encodings(images[0], segmenter(images[0]))
    result = {
        "what": "the packaged bundle on 1280×720 with viewers of the live page",
        "engine": options.engine,
        "seconds": options.seconds,
        "fps": medians(rows, "fps"),
        "fps_ratio": ratios(rows, "fps"),
        "cpu_per_frame": medians(rows, "cpu_per_frame"),
        "cpu_ratio": ratios(rows, "cpu_per_frame"),
        "encodings": encoded,
        "runs": {
            str(count): [{name: round(value, 4) for name, value in row.items()} for row in found]
            for count, found in rows.items()
        },
    }
    write_result(result, options.output)


if __name__ == "__main__":
    main()
