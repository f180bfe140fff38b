"""The seven published K-Nets on a GPU, beside PyTorch, the published speed and the GPU's limit.

    python benchmarks/gpu_rows.py --output benchmarks/results/gpu_rows.json

Random weights; 512², the last 640²; batches of 1 and 8. Ours in fp16: ONNX Runtime's CUDA provider
with bound buffers and CUDA graphs, and TensorRT-RTX where it takes the GPU; PyTorch eager in
float32, in fp16 channels_last, and compiled with max-autotune, each with interpolation and argmax.
All take uint8 images from the host's memory and give uint8 class maps back to it. What fails is a
row that says why. The published frames/s (V100, batch 1) are mmsegmentation's.

    python benchmarks/gpu_rows.py --device cpu --presets knet-edge --size 64

runs the same code on a processor, in fp32, where only the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from random_bundle import random_model, write_random
from result import parser_of, write_result
from torch import Tensor

from knet_deploy.bench.machine import gpu_memory_used, gpu_meter
from knet_deploy.bench.plot import BASELINE, OURS, Bar, draw_bars
from knet_deploy.bench.report import TOTAL, Measurement, interleave, joules_per_frame, stages
from knet_deploy.bench.torch_baselines import class_maps
from knet_export.graph.cost import count_cost
from knet_runtime.bundle.store import Bundle
from knet_runtime.engines import open_engine
from knet_runtime.types import Size
from knet_train.config import load_config
from knet_train.models.knet import KNet

PUBLISHED = {
    "r50-fcn": 19.24,
    "r50-pspnet": 20.04,
    "r50-deeplabv3": 12.10,
    "r50-upernet": 17.11,
    "swin-t-upernet": 15.56,
    "swin-l-upernet-512": 8.29,
    "swin-l-upernet-640": 8.29,
}
CLASSES = 150
BASELINES = ("torch-fp32", "torch-fp16", "torch-compile")
_WARM_UP = 3
_MATMUL = 8192
Infer = Callable[[Any], Any]


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--presets", nargs="+", default=list(PUBLISHED))
    parser.add_argument("--size", type=int, help="height and width; 512, for the last 640")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--times", type=int, default=20, help="batches of one turn")
    parser.add_argument("--skip", nargs="*", default=[], help="targets to leave out")
    parser.add_argument("--plot", type=Path, help="PNG")
    return parser.parse_args()


def matmul_peak(device: str) -> float:
    """Multiply-adds a second of PyTorch's own product: fp16 on a GPU, float32 on a processor."""
    side, kind = (_MATMUL, torch.float16) if device == "cuda" else (1024, torch.float32)
    left, right = (torch.rand(side, side, dtype=kind, device=device) for _ in range(2))
    times = []
    for _ in range(10):
        started = time.perf_counter()
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return side**3 / min(times)


def ours(bundle: Bundle, engine: str, stack: ExitStack) -> Infer:
    opened = stack.enter_context(open_engine(bundle, engine, "classmap"))
    output = bundle.graph("classmap").output("class_map").name
    return lambda batch: opened.infer(batch)[output]


def baseline(model: KNet, name: str, device: str) -> Infer:
    """One of BASELINES: host's images to host's class maps."""
    half = name != "torch-fp32" and device == "cuda"
    moved = model.to(device)
    if half:
        moved = moved.half()
    if name != "torch-fp32":
        moved = moved.to(memory_format=torch.channels_last)

    def network(images: Tensor) -> Tensor:
        return class_maps(moved(images), images.shape[1:3])

    run = torch.compile(network, mode="max-autotune") if name == "torch-compile" else network

    @torch.inference_mode()
    def infer(batch: Any) -> Any:
        return run(torch.from_numpy(batch).to(device)).cpu().numpy()

    return infer


def targets(
    preset: str, size: Size, device: str, batches: Sequence[int], folder: Path, stack: ExitStack
) -> tuple[dict[str, Callable[[], Infer]], Bundle]:
    model = random_model(preset, CLASSES)
    precision = "fp16" if device == "cuda" else "fp32"
    bundle = write_random(
        folder / f"{preset}.knet",
        model,
        preset,
        size=size,
        max_batch=max(batches),
        precision=precision,
    )
    engines = ["onnxruntime-cuda", "onnxruntime-tensorrt-rtx"]
    if device == "cpu":
        engines = ["onnxruntime-cpu"]
    found: dict[str, Callable[[], Infer]] = {
        name: partial(ours, bundle, name, stack) for name in engines
    }
    for name in BASELINES:
        # Each its own copy: the halves are changed in place.
        found[name] = lambda name=name: baseline(random_model(preset, CLASSES), name, device)
    return found, bundle


def measure(preset: str, options: argparse.Namespace, peak: float) -> list[dict[str, Any]]:
    """The rows of one preset."""
    side = options.size or (640 if preset.endswith("640") else 512)
    size, device = (side, side), options.device
    images = np.random.default_rng(0).integers(0, 256, (max(options.batches), *size, 3), np.uint8)
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        makers, bundle = targets(preset, size, device, options.batches, folder, stack)
        cost = count_cost(bundle.file(bundle.graph("logits").path), size)
        opened: dict[str, Infer] = {}
        facts: dict[str, dict[str, Any]] = {}
        for name, make in makers.items():
            if name in options.skip:
                continue
            before, started = gpu_memory_used() or 0, time.perf_counter()
            row: dict[str, Any] = {"preset": preset, "size": size, "target": name}
            try:
                infer = make()
                infer(images[:1])
                row["startup_seconds"] = round(time.perf_counter() - started, 2)
                for batch in options.batches:
                    for _ in range(_WARM_UP):
                        infer(images[:batch])
            except Exception as error:  # whatever it is, the other rows stand
                rows.append({**row, "failed": _line(error)})
                continue
            row["device_bytes"] = max((gpu_memory_used() or 0) - before, 0)
            opened[name], facts[name] = infer, row
        measurements, broken = rounds(opened, images, options)
        for name, row in facts.items():
            if name in broken:
                rows.append({**row, "failed": broken[name]})
                continue
            for batch in options.batches:
                at = (name, f"{batch}")
                mine = [one for one in measurements if (one.target, one.case) == at]
                rows.append({**row, **numbers(preset, batch, mine, cost.multiply_adds, peak)})
    return rows


def rounds(
    opened: dict[str, Infer], images: Any, options: argparse.Namespace
) -> tuple[list[Measurement], dict[str, str]]:
    """All measurements, and the targets that failed, with the reason."""
    meter = gpu_meter() if options.device == "cuda" else None
    broken: dict[str, str] = {}

    def measure_one(name: str, case: str, number: int) -> Measurement | None:
        batch, times = int(case), []
        before = meter() if meter else None
        try:
            for _ in range(options.times):
                started = time.perf_counter()
                opened[name](images[:batch])
                times.append(1000 * (time.perf_counter() - started))
        except Exception as error:
            broken[name] = _line(error)
            return None
        after = meter() if meter else None
        joules = None if before is None or after is None else after - before
        return Measurement(name, case, number, {TOTAL: times}, joules)

    turns = {name: [f"{batch}" for batch in options.batches] for name in opened}
    return interleave(turns, options.rounds, measure_one), broken


def numbers(
    preset: str, batch: int, measurements: list[Measurement], multiply_adds: int, peak: float
) -> dict[str, Any]:
    total = stages(measurements)[TOTAL]
    rate = 1000 * batch / total.median
    joules, published = joules_per_frame(measurements), PUBLISHED.get(preset)
    return {
        "batch": batch,
        "ms": msgspec.to_builtins(total),
        "frames_per_second": round(rate, 2),
        "times_published": round(rate / published, 2) if published else None,
        "matmul_share": round(rate * multiply_adds / peak, 4),
        "joules_per_frame": None if joules is None else round(joules / batch, 4),
    }


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def draw(rows: list[dict[str, Any]]) -> bytes:
    groups = []
    for preset in dict.fromkeys(row["preset"] for row in rows):
        bars = []
        for row in rows:
            if row["preset"] == preset and "failed" not in row:
                rate, batch = row["frames_per_second"], row["batch"]
                low, high = (1000 * batch / row["ms"][end] for end in ("p95", "p5"))
                name = f"{row['target']}, batch {batch}"
                colour = BASELINE if row["target"] in BASELINES else OURS
                bars.append(Bar(name, rate, low, high, f"{rate:.1f} frames/s", colour))
        groups.append((preset, bars))
    return draw_bars("K-Net, frames/s", "median, p95 to p5 of a batch", groups)


def main() -> None:
    options = parse()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_rows: PyTorch sees no GPU here: pass --device cpu to try the script")
    for preset in options.presets:
        load_config(preset)  # a misspelt one fails before the first is measured
    peak = matmul_peak(options.device)
    rows = []
    for preset in options.presets:
        try:
            found = measure(preset, options, peak)
        except Exception as error:  # it cannot be exported: the other presets stand
            found = [{"preset": preset, "target": "all", "failed": _line(error)}]
        rows += found
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
        for row in found:
            sys.stderr.write(f"{json.dumps(row)}\n")
    report = {
        "what": "host's uint8 images to host's uint8 class maps, random weights, 150 classes",
        "device": options.device,
        "matmul_peak": peak,
        "rounds": options.rounds,
        "times": options.times,
        "rows": rows,
    }
    write_result(report, options.output)
    if options.plot is not None:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        options.plot.write_bytes(draw(rows))
    if all("failed" in row for row in rows):
        sys.exit("gpu_rows: nothing ran: each row says why")


if __name__ == "__main__":
    main()
