"""The exact postprocess against PyTorch's: from logits to the class map at the image's size.

    python benchmarks/postprocess.py --camvid CAMVID --ade20k ADE20K \\
        --output benchmarks/results/postprocess.json

Both turn the same logits into a class map, in turns; that the maps are equal is checked, and one
that is not ends the run with 1. README.md beside this file says what the numbers mean.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from result import parser_of, write_result
from torch.nn import functional

from knet_runtime.bundle.store import default_bundle_path, open_bundle
from knet_runtime.drawing import blend
from knet_runtime.engines import open_engine
from knet_runtime.postprocess import candidates, upsampled_argmax
from knet_runtime.preprocess import fit_to_input
from knet_synthetic import CAMVID11, Street

SIZES = ((360, 480), (720, 1280))
CLASSES = 150
LOWERED = 15.0
Logits = NDArray[np.float32]
Map = NDArray[np.uint8]


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--camvid", type=Path, required=True, help="CamVid, for images/val")
    parser.add_argument("--ade20k", type=Path, required=True, help="ADE20K, for annotations")
    parser.add_argument("--engine", default="onnxruntime-cpu", help="what gives the logits")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="PyTorch's")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def packaged(camvid: Path, engine: str) -> tuple[list[Logits], str]:
    """What the packaged model gives for fourteen CamVid images and two synthetic streets."""
    files = sorted((camvid / "images/val").glob("*.jpg"))
    files = files[:: max(1, len(files) // 14)][:14]
    images = [np.asarray(cv2.imread(str(file)), np.uint8)[..., ::-1] for file in files]
    images += [Street(seed, SIZES[0]).frame(0)[0] for seed in (7, 8)]
    bundle = open_bundle(default_bundle_path())
    spec = bundle.manifest.input
    name = bundle.graph("logits").output("semantic_logits").name
    with open_engine(bundle, engine, "logits") as opened:
        found = [opened.infer(fit_to_input(image, spec)[0][None])[name][0] for image in images]
    return [np.asarray(logits, np.float32) for logits in found], bundle.model_id


def among_lower(real: list[Logits], draw: np.random.Generator) -> list[Logits]:
    """Each image's own classes among the planes of the others, these lowered so that few reach
    the top: a trained network's absent classes are low, but not flat."""
    stacked = []
    for index, own in enumerate(real):
        others = np.concatenate(real[:index] + real[index + 1 :])
        count = CLASSES - len(own)
        planes = np.concatenate([own, others[draw.permutation(np.arange(count) % len(others))]])
        planes[len(own) :] -= LOWERED
        stacked.append(planes[draw.permutation(CLASSES)])
    return stacked


def mixed(real: list[Logits], draw: np.random.Generator) -> list[Logits]:
    """A random linear layer over real logits: the near ties of a network that is not trained."""
    weights = draw.normal(size=(CLASSES, len(real[0]))).astype(np.float32)
    return [np.tensordot(weights, logits, 1).astype(np.float32) for logits in real]


def annotated(ade20k: Path, low: tuple[int, int], draw: np.random.Generator) -> list[Logits]:
    """ADE20K's own regions at (height, width) ``low``: 8 inside a class's regions, less at their
    edges, and broad noise of about 1 in every class; void goes to the largest class."""
    found = []
    for file in sorted((ade20k / "annotations").glob("*.png")):
        label = np.asarray(cv2.imread(str(file), cv2.IMREAD_UNCHANGED))
        label[label == 0] = np.bincount(label[label > 0]).argmax()
        planes = np.zeros((CLASSES, *low), np.float32)
        for index, plane in enumerate(planes):
            region = (label == index + 1).astype(np.float32)
            small = cv2.resize(region, low[::-1], interpolation=cv2.INTER_AREA)
            noise = draw.normal(size=(low[0] // 8, low[1] // 8)).astype(np.float32)
            wide = cv2.resize(noise, low[::-1], interpolation=cv2.INTER_CUBIC)
            plane[:] = 8 * cv2.GaussianBlur(small, (0, 0), 1) + wide
        found.append(planes)
    return found


def torch_map(logits: Logits, size: tuple[int, int]) -> Map:
    planes = torch.from_numpy(logits)[None]
    resized = functional.interpolate(planes, size, mode="bilinear", align_corners=False)
    return resized.argmax(1)[0].numpy()


def wrong(ours: Map, logits: Logits, size: tuple[int, int]) -> int:
    """How many pixels have a class that is not the largest, by more than float32 rounding."""
    planes = torch.from_numpy(logits)[None].double()
    exact = functional.interpolate(planes, size, mode="bilinear", align_corners=False)[0]
    chosen = exact.gather(0, torch.from_numpy(ours.astype(np.int64))[None])[0]
    return int((exact.amax(0) - chosen > 1e-5).sum())


def interleaved(
    rounds: int, sides: Mapping[str, Callable[[], object]], times: dict[str, list[float]]
) -> None:
    """Adds milliseconds of each side to ``times``, one after the other, after a first one each."""
    for number in range(rounds + 1):
        for name, work in sides.items():
            began = time.perf_counter()
            work()
            if number:
                times.setdefault(name, []).append(1000 * (time.perf_counter() - began))


def summary(times: dict[str, list[float]], numerator: str) -> dict[str, Any]:
    """Medians and percentiles, and the median over neighbours in time of their ratio to ours."""
    ratios = [other / ours for other, ours in zip(times[numerator], times["ours"], strict=True)]
    row: dict[str, Any] = {"ratio": round(statistics.median(ratios), 2)}
    for name, values in times.items():
        row[f"{name}_ms"] = {
            word: round(float(np.percentile(values, share)), 3)
            for word, share in (("median", 50), ("p5", 5), ("p95", 95))
        }
    return row


def postprocess_row(
    name: str, images: list[Logits], size: tuple[int, int], threads: int, rounds: int
) -> dict[str, Any]:
    torch.set_num_threads(threads)
    times: dict[str, list[float]] = {}
    different = wrongs = 0
    occur, left = [], []
    for logits in images:
        ours = upsampled_argmax(logits, size)
        different += int((ours != torch_map(logits, size)).sum())
        wrongs += wrong(np.asarray(ours, np.uint8), logits, size)
        occur.append(len(np.unique(ours)))
        left.append(len(candidates(logits)[0]))
        sides: dict[str, Callable[[], object]] = {
            "torch": partial(torch_map, logits, size),
            "ours": partial(upsampled_argmax, logits, size),
        }
        interleaved(rounds, sides, times)
    return {
        "logits": name,
        "shape": list(images[0].shape),
        "size": list(size),
        "torch_threads": threads,
        **summary(times, "torch"),
        "classes_that_win": statistics.mean(occur),
        "candidates": statistics.mean(left),
        "pixels": len(images) * size[0] * size[1],
        "pixels_different": different,
        "pixels_wrong": wrongs,
    }


def overlay_row(logits: Logits, size: tuple[int, int], rounds: int) -> dict[str, Any]:
    """The overlay of one image against indexing the palette and OpenCV's weighted sum."""
    classes = np.asarray(upsampled_argmax(logits, size), np.uint8)
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    palette = CAMVID11.palette_array()
    times: dict[str, list[float]] = {}
    sides: dict[str, Callable[[], object]] = {
        "plain": lambda: cv2.addWeighted(image, 0.5, palette[classes], 0.5, 0),
        "ours": lambda: blend(image, classes, CAMVID11, 0.5),
    }
    interleaved(10 * rounds, sides, times)
    return {"size": list(size), **summary(times, "plain")}


def main() -> None:
    options = parse()
    draw = np.random.default_rng(0)
    real, model = packaged(options.camvid, options.engine)
    kinds = {
        "packaged": real,
        "among lower": among_lower(real, draw)[::6],
        "annotated": annotated(options.ade20k, (real[0].shape[1], real[0].shape[2]), draw),
        "mixed": mixed(real[::6], draw),
    }
    rows = []
    for name, images in kinds.items():
        for size in SIZES:
            for threads in options.threads:
                rows.append(postprocess_row(name, images, size, threads, options.rounds))
                sys.stderr.write(f"{name} {size} {threads}: {rows[-1]['ratio']}×\n")
    report = {
        "what": "logits to class map; ratio is PyTorch's time / ours, which is one thread's",
        "model": model,
        "rows": rows,
        "overlay": [overlay_row(real[0], size, options.rounds) for size in SIZES],
    }
    write_result(report, options.output)
    if any(row["pixels_wrong"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
