"""Masks to segments against the same steps in PyTorch: from logits to the image's own size.

    python benchmarks/segments.py --coco coco_panoptic_mini \\
        --output benchmarks/results/segments.json

The logits are those of a network that is nearly right: the true segments of COCO images with soft
borders, and as many wrong guesses as there are other kernels. Both sides take the same ones, in
turns; that the results are equal is checked, and one that is not ends the run with 1. README.md
beside this file says what the numbers mean.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from result import parser_of, write_result

from knet_deploy.bench.torch_segments import plain_instances, plain_panoptic
from knet_runtime.bundle.manifest import SegmentRules
from knet_runtime.postprocess import instances, panoptic
from knet_runtime.preprocess import Geometry
from knet_runtime.segmentation import Segmentation
from knet_train.data.layouts import COCO, COCO_THINGS

INPUT, SIZE = (800, 1344), (800, 1333)  # of the published rows; 4 pixels a cell
KERNELS = 100
GEOMETRY = Geometry(SIZE, INPUT, (0, 0, *SIZE))
RULES = SegmentRules()
CLOSE = 1e-5  # of the threshold, or of the second best: float32 may decide otherwise
Logits = NDArray[np.float32]


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--coco", type=Path, required=True, help="COCO's panoptic images, PNGs")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def logits_of(folder: Path, record: dict[str, Any], draw: np.random.Generator) -> Any:
    """Class logits [153, 133] and mask logits [153, 200, 336] of one image."""
    pixels = np.asarray(cv2.imread(str(folder / record["file_name"])), np.int64)
    ids = pixels @ (65536, 256, 1)  # OpenCV has blue first
    things = {name: index for index, name in enumerate(COCO.names)}
    cells = (INPUT[1] // 4, INPUT[0] // 4)
    classes = draw.normal(-5, 0.7, (KERNELS + 53, 133)).astype(np.float32)
    noise = draw.normal(0, 1, (len(classes), 13, 21)).astype(np.float32)
    masks = np.stack([cv2.resize(plane, cells, interpolation=cv2.INTER_CUBIC) for plane in noise])
    masks = 1.5 * masks - 7  # nowhere above a half
    free = draw.permutation(KERNELS).tolist()
    for segment in record["segments_info"]:
        label = things[segment["name"]]
        kernel = free.pop() if label < 80 else KERNELS + label - 80
        there = (ids == segment["id"]).astype(np.float32)
        soft = cv2.GaussianBlur(cv2.resize(there, cells), (0, 0), 1.5)
        masks[kernel] = 14 * (soft - 0.5) + 0.3 * masks[kernel]
        classes[kernel, label] = draw.normal(1.5, 1)
    return classes, masks.astype(np.float32)


@torch.no_grad()
def numbered_by_torch(classes: Logits, masks: Logits) -> NDArray[np.int64]:
    """By the published steps: class + 1000 · number, from 1; 0 is void."""
    logits = torch.from_numpy(classes), torch.from_numpy(masks)
    ids, found = plain_panoptic(*logits, GEOMETRY, COCO, RULES)
    table = [0, *(class_id + 1000 * number for number, class_id in enumerate(found, 1))]
    return np.array(table, np.int64)[ids.numpy()]


def numbered(found: Segmentation) -> NDArray[np.int64]:
    table = [0, *(segment.class_id + 1000 * segment.id for segment in found.segments)]
    return np.array(table, np.int64)[found.segment_map]


@torch.no_grad()
def masks_by_torch(classes: Logits, masks: Logits) -> NDArray[np.bool_]:
    """Those of the best pairs, by the published steps."""
    things = torch.from_numpy(classes[:KERNELS, :80]), torch.from_numpy(masks[:KERNELS])
    return plain_instances(*things, GEOMETRY, RULES)[0].numpy()


def times_of(rounds: int, sides: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, work in sides.items():
            began = time.perf_counter()
            work()
            if number:
                times[name].append(1000 * (time.perf_counter() - began))
    return times


def peak_of(work: Callable[[], object]) -> float:
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def main() -> None:
    options = parse()
    truth = json.loads((options.coco / "annotations/panoptic_val2017.json").read_text())
    names = {each["id"]: each["name"] for each in truth["categories"]}
    folder = next(path.parent for path in sorted(options.coco.rglob("*.png")) if "val" in str(path))
    draw = np.random.default_rng(0)
    records = sorted(truth["annotations"], key=lambda each: -len(each["segments_info"]))
    records = records[:: max(1, len(records) // options.images)][: options.images]
    rows: dict[str, dict[str, list[float]]] = {"panoptic": {}, "instance": {}}
    segments, peaks, wrong = [], [], 0
    for record in records:
        for segment in record["segments_info"]:
            segment["name"] = names[segment["category_id"]]
        classes, masks = logits_of(folder, record, draw)
        things = classes[:KERNELS, :80], masks[:KERNELS]

        def ours(classes: Logits = classes, masks: Logits = masks) -> Segmentation:
            return panoptic(classes, masks, GEOMETRY, COCO, RULES)

        def ours_instances(things: tuple[Logits, Logits] = things) -> Segmentation:
            return instances(*things, GEOMETRY, COCO_THINGS, RULES)

        found = ours()
        wrong += int((numbered(found) != numbered_by_torch(classes, masks)).sum())
        segments.append(len(found.segments))
        peaks.append(max(peak_of(ours), peak_of(ours_instances)))
        for task, sides in (
            (
                "panoptic",
                {"torch": lambda c=classes, m=masks: numbered_by_torch(c, m), "ours": ours},
            ),
            (
                "instance",
                {"torch": lambda c=classes, m=masks: masks_by_torch(c, m), "ours": ours_instances},
            ),
        ):
            for name, values in times_of(options.rounds, sides).items():
                rows[task].setdefault(name, []).extend(values)
    report: dict[str, Any] = {
        "what": "class and mask logits to segments; ratio is PyTorch's time / ours",
        "kernels": KERNELS + 53,
        "size": list(SIZE),
        "images": len(records),
        "segments": statistics.mean(segments),
        "torch_threads": torch.get_num_threads(),
        "pixels_different": wrong,
        "peak_mib": round(max(peaks), 1),
    }
    for task, times in rows.items():
        ratios = [a / b for a, b in zip(times["torch"], times["ours"], strict=True)]
        report[task] = {
            "ratio": round(statistics.median(ratios), 1),
            **{f"{name}_ms": round(statistics.median(values), 1) for name, values in times.items()},
        }
    write_result(report, options.output)
    if wrong > 1e-5 * len(records) * SIZE[0] * SIZE[1]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
