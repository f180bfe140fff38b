"""knet-edge's place on the curve: mIoU against milliseconds, for its variants and plain heads.

    python benchmarks/curve.py --train --data CAMVID --runs runs/curve \\
        --backbone-weights tf_efficientnet_lite0.safetensors
    python benchmarks/curve.py --measure --data CAMVID --runs runs/curve \\
        --output benchmarks/results/curve.json
    python benchmarks/curve.py --plot --output benchmarks/results/curve.json

Every variant is trained by ``knet-deploy train``'s own loop with the same seed, data and steps,
many fewer than the default model had (those named ``-full`` as many); the schedule has the same
shape. ``--train --resume`` resumes what was stopped. README.md beside this file says what the
numbers mean.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cv2
import lraspp
import msgspec
import numpy as np
import torch
from curve_variants import DEFAULT, VARIANTS, Variant, builder
from numpy.typing import NDArray
from operations import count_operations
from result import parser_of, write_result
from torch.utils.flop_counter import FlopCounterMode

from knet_deploy.bench.report import TOTAL, Measurement, Spread, interleave, stages
from knet_export.data import open_images
from knet_export.export import export_bundle
from knet_export.verify.reference import TorchReference
from knet_export.verify.verify import VerifyReport, verify
from knet_runtime.atomic import write_json
from knet_runtime.bundle.store import Bundle, open_bundle
from knet_runtime.engines import open_engine
from knet_runtime.segmenter import Segmenter
from knet_train.checkpoint import Checkpoint, read_checkpoint
from knet_train.config import load_config
from knet_train.data.dataset import open_folder
from knet_train.fit import train

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_CHECKPOINT = REPOSITORY / "train/default-model/knet-edge-camvid.safetensors"
STEPS = 300  # of each variant's training
ENGINES = ("onnxruntime-cpu", "openvino-bf16")
FRAMES = ((360, 480), (720, 1280))  # height, width of a decoded frame
ROUNDS, CALLS, PAUSE = 20, 5, 0.05  # seconds
COLOURS = {"knet": "tab:blue", "fpn": "tab:orange", "lr-aspp": "tab:green"}


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    for name in ("train", "measure", "plot"):
        what.add_argument(f"--{name}", action="store_true")
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--variants", nargs="+", choices=names, default=names)
    parser.add_argument("--data", type=Path, help="the camvid folder")
    parser.add_argument("--runs", type=Path, help="folder of a run per variant")
    parser.add_argument("--backbone-weights", type=Path, help="ImageNet weights, to train")
    parser.add_argument("--resume", action="store_true", help="resume where --train was stopped")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each variant's training")
    options = parser.parse_args()
    needed = ("output",) if options.plot else ("data", "runs")
    needed += ("output",) if options.measure else ()
    if missing := [name for name in needed if getattr(options, name) is None]:
        parser.error(f"this step needs --{', --'.join(missing)}")
    return options


def chosen(options: argparse.Namespace) -> list[Variant]:
    return [variant for variant in VARIANTS if variant.name in options.variants]


def train_all(options: argparse.Namespace) -> None:
    for variant in chosen(options):
        run = options.runs / variant.name
        if (run / "last.safetensors").exists():
            continue
        config = load_config("knet-edge", variant.overrides(options.steps))
        result = train(
            config,
            options.data,
            run,
            backbone_weights=options.backbone_weights,
            resume=options.resume,
            build=builder(variant),
        )
        say(f"{variant.name}: mIoU {100 * result.best_score:.2f}")


def measure_all(options: argparse.Namespace) -> None:
    runs = {variant: options.runs / variant.name for variant in (DEFAULT, *chosen(options))}
    finished = [v for v, run in runs.items() if v == DEFAULT or (run / "last.safetensors").exists()]
    bundles, rows = {}, {}
    for variant in finished:
        rows[variant.name], bundles[variant.name] = scores(variant, runs[variant], options.data)
        say(json.dumps(rows[variant.name]))
    for (name, engine), times in timings(bundles, options.data).items():
        rows[name]["engines"][engine]["ms"] = times
    report = {
        "what": "mIoU in percent on CamVid val; ms from a decoded frame to its class map",
        "frames": [f"{width}x{height}" for height, width in FRAMES],
        "rounds": ROUNDS,
        "calls": CALLS,
        "rows": list(rows.values()),
    }
    write_result(report, options.output)


def scores(variant: Variant, run: Path, data: Path) -> tuple[dict[str, Any], Bundle]:
    """What is known of a variant but its speed, and its bundle, which is exported if need be."""
    path = DEFAULT_CHECKPOINT if variant == DEFAULT else run / "last.safetensors"
    checkpoint = read_checkpoint(path, builder(variant))
    bundle = exported(variant, checkpoint, path, run / f"{variant.name}.knet")
    config = checkpoint.config
    row: dict[str, Any] = {
        "name": variant.name,
        "family": variant.family,
        "settings": variant.settings,
        "steps": config.optim.steps,
        "input": config.data.eval_size,
        "parameters": sum(weight.numel() for weight in checkpoint.model.parameters()),
        "multiply_adds": multiply_adds(variant, checkpoint),
        "engines": {},
    }
    for engine in ENGINES:
        written = run / f"verify-{engine}.json"
        if written.exists():
            report = msgspec.json.decode(written.read_bytes(), type=VerifyReport)
        else:
            with open_engine(bundle, engine) as opened:
                images = open_images(data, "val", bundle.manifest.labels)
                report = verify(bundle, opened, TorchReference(checkpoint), images, images.name)
            write_json(written, report)
        row["miou"] = report.miou_reference
        row["engines"][engine] = {"miou": report.miou_measured, "agreement": report.agreement}
    return row, bundle


def exported(variant: Variant, checkpoint: Checkpoint, path: Path, destination: Path) -> Bundle:
    """The variant's fp32 bundle for one image at a time, verified by the export itself."""
    if destination.exists():
        return open_bundle(destination)
    if variant.family == "lr-aspp":
        return lraspp.export(checkpoint, destination)
    return export_bundle(path, destination, max_batch=1)


def multiply_adds(variant: Variant, checkpoint: Checkpoint) -> int:
    """Of what is deployed, for one image of the network's input size."""
    config, classes = checkpoint.config, checkpoint.labels.num_classes
    size = config.data.eval_size
    if variant.family != "lr-aspp":
        return count_operations(config, classes, size).fused
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        checkpoint.model(torch.zeros(1, *size, 3, dtype=torch.uint8))
    return counter.get_total_flops() // 2  # it counts an addition and a multiplication


def timings(bundles: dict[str, Bundle], data: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Milliseconds by (variant, engine) and size of the frame. All are open at once and take turns,
    a few calls each after one that is not counted."""
    images = list(val_frames(data))
    sizes = [f"{width}x{height}" for height, width in FRAMES]
    with ExitStack() as stack:
        segmenters = {
            f"{name} {engine}": stack.enter_context(Segmenter(bundle, engine))
            for engine in ENGINES
            for name, bundle in bundles.items()
        }

        def measure(name: str, size: str, number: int) -> Measurement:
            frame = images[number % len(images)][sizes.index(size)]
            return Measurement(name, size, number, timed(segmenters[name], frame))

        measurements = interleave(dict.fromkeys(segmenters, sizes), ROUNDS, measure, pause=PAUSE)
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for engine in ENGINES:
        for name in bundles:
            mine = [one for one in measurements if one.target == f"{name} {engine}"]
            found[name, engine] = {
                size: summary(stages(one for one in mine if one.case == size)) for size in sizes
            }
    return found


def timed(segment: Segmenter, frame: NDArray[np.uint8]) -> dict[str, list[float]]:
    segment(frame)
    samples: dict[str, list[float]] = {}
    for _ in range(CALLS):
        began = time.perf_counter()
        found = segment(frame)
        whole = 1000 * (time.perf_counter() - began)
        for stage, value in {TOTAL: whole, **found.timings}.items():
            samples.setdefault(stage, []).append(value)
    return samples


def summary(times: dict[str, Spread]) -> dict[str, float]:
    total = times[TOTAL]
    parts = {stage: times[stage].median for stage in ("preprocess", "infer", "postprocess")}
    return {"median": total.median, "p5": total.p5, "p95": total.p95, **parts}


def val_frames(data: Path) -> Iterator[list[NDArray[np.uint8]]]:
    """Every tenth image of the validation split, at each size of ``FRAMES``."""
    folder = open_folder(data, "val")
    for index in range(0, len(folder), 10):
        image, _ = folder.read(index)
        yield [
            np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)
            for height, width in FRAMES
        ]


def draw(report: dict[str, Any], path: Path) -> None:
    """A PNG of the variants of equal budget at the first frame size: a number for each, a colour
    for each family."""
    from matplotlib.figure import Figure

    size = report["frames"][0]
    steps = min(row["steps"] for row in report["rows"])
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate((row for row in report["rows"] if row["steps"] == steps), 1):
        colour = COLOURS[row["family"]]
        for engine, found in row["engines"].items():
            at, filled = (found["ms"][size]["median"], found["miou"]), engine == ENGINES[0]
            face = colour if filled else "white"
            label = f"{number} {row['name']}" if filled else None
            axes.plot(*at, "o", markersize=16, color=colour, markerfacecolor=face, label=label)
            ink = "white" if filled else colour
            axes.annotate(f"{number}", at, ha="center", va="center", color=ink)
    axes.set_title(f"CamVid val, every variant trained for {steps} steps")
    axes.set(xlabel=f"ms from a decoded {size} frame to its class map", ylabel="mIoU")
    axes.grid(color="0.9")
    kinds = "filled: ONNX Runtime, fp32\nring: OpenVINO, bf16"
    figure.legend(loc="outside right upper", title=kinds, markerscale=0.6)
    figure.savefig(path)


def say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def main() -> None:
    options = parse()
    if options.train:
        train_all(options)
    elif options.measure:
        measure_all(options)
    else:
        draw(json.loads(options.output.read_text()), options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
