"""What every model becomes on the way to a device: exported, run in ONNX Runtime, built.

    python benchmarks/deploy_table.py --images FOLDER --ade20k DIR --precisions fp32 \\
        --output benchmarks/results/deploy.json

For each preset and precision, each in a fresh process: a bundle of a network with random weights
(knet-edge: the packaged model's), its logits in ONNX Runtime against PyTorch on real images, and
a TensorRT-RTX plan, which needs no GPU to be built. Prints the table of
docs/results/models.md. What fails is a row that says why. Each row is in --output once it is
there, and a run that was ended goes on with the rows that are not.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from result import parser_of, write_result

PRESETS = (
    "knet-edge",
    "r50-fcn",
    "r50-pspnet",
    "r50-deeplabv3",
    "r50-upernet",
    "swin-t-upernet",
    "swin-l-upernet-512",
    "swin-l-upernet-640",
    "knet-edge-instance",
    "knet-edge-panoptic",
    "knet-r50-fpn-instance",
    "knet-r101-fpn-instance",
    "knet-r50-fpn-panoptic",
    "knet-r101-fpn-panoptic",
    "knet-swin-l-panoptic",
)
TRAINED = {
    "knet-edge": Path(__file__).parents[1] / "train/default-model/knet-edge-camvid.safetensors"
}


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--images", type=Path, help="folder of real images")
    parser.add_argument(
        "--ade20k",
        type=Path,
        help="labelled images that the export verifies ADE20K's models on; else synthetic streets",
    )
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument(
        "--precisions", nargs="+", choices=("fp32", "fp16", "int8"), default=["fp32", "fp16"]
    )
    parser.add_argument("--size", type=int, help="height and width; without it, each its own")
    parser.add_argument("--count", type=int, default=4, help="images to compare on")
    parser.add_argument("--targets", default="sm80,sm86,sm89,sm120")
    parser.add_argument("--show", type=Path, nargs="+", help="only print the table of these JSONs")
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not (options.images or options.show):
        parser.error("name --images to measure on, or results to --show")
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One row: what one process finds for the first preset and precision."""
    from random_checkpoint import write_random_checkpoint

    from knet_export.export import export_bundle
    from knet_runtime.errors import KnetError
    from knet_train.checkpoint import SegmentCheckpoint, read_any_checkpoint
    from knet_train.data.layouts import ADE20K

    preset, precision = options.presets[0], options.precisions[0]
    row: dict[str, Any] = {"preset": preset, "precision": precision}
    with tempfile.TemporaryDirectory() as work:
        checkpoint = TRAINED.get(preset)
        if checkpoint is None:
            checkpoint = Path(work) / "random.safetensors"
            write_random_checkpoint(preset, checkpoint, options.size)
        loaded = read_any_checkpoint(checkpoint)
        model, trained = loaded.model, preset in TRAINED
        side = (options.size, options.size) if options.size else loaded.config.data.eval_size
        row |= {"size": side, "weights": "trained" if trained else "random"}
        row["parameters"] = sum(weight.numel() for weight in model.parameters())
        start = time.perf_counter()
        try:
            bundle = export_bundle(
                checkpoint,
                Path(work) / "random.knet",
                precision=precision,
                size=side,
                calibration=options.images if precision == "int8" else None,
                data=options.ade20k if loaded.labels.names == ADE20K.names else None,
                split="all",
            )
            row["export_seconds"] = time.perf_counter() - start
            row["bundle_bytes"] = sum(file.bytes for file in bundle.manifest.files.values())
            compare = _masks if isinstance(loaded, SegmentCheckpoint) else _classes
            row["onnxruntime"] = compare(bundle, model, _some(options.images, options.count))
            row["tensorrt_rtx"] = _build(bundle, options.targets.split(","))
        except KnetError as error:
            row["failed"] = str(error)
    row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return row


def _some(folder: Path, count: int) -> list[Path]:
    from knet_runtime.sources.images import list_images

    paths = list_images(folder)
    return paths[:: max(len(paths) // count, 1)][:count]


def _classes(bundle: Any, model: Any, paths: list[Path]) -> dict[str, Any]:
    """Both graphs in ONNX Runtime against PyTorch: logits, and classes at the input's size."""
    import numpy as np

    from knet_runtime.engines import open_engine
    from knet_runtime.postprocess import upsampled_argmax
    from knet_runtime.preprocess import fit_to_input
    from knet_runtime.sources.images import read_image
    from knet_train.inference import predict_logits

    spec = bundle.manifest.input
    worst, equal, classes = 0.0, [], set()
    kinds = ("logits", "classmap")
    outputs = [bundle.graph(kind).outputs[0].name for kind in kinds]
    logits_engine, map_engine = (open_engine(bundle, "onnxruntime-cpu", kind) for kind in kinds)
    with logits_engine, map_engine:
        for path in paths:
            batch = fit_to_input(read_image(path), spec)[0][None]
            expected = predict_logits(model, batch)
            got = logits_engine.infer(batch)[outputs[0]]
            worst = max(worst, float(np.abs(got - expected).max() / np.abs(expected).max()))
            reference = upsampled_argmax(expected[0], (spec.height, spec.width))
            equal.append(float((map_engine.infer(batch)[outputs[1]][0] == reference).mean()))
            classes |= set(np.unique(reference).tolist())
    return {
        "images": len(paths),
        "max_logit_diff": worst,
        "agreement": sum(equal) / len(equal),
        "classes_seen": len(classes),
    }


def _masks(bundle: Any, model: Any, paths: list[Path]) -> dict[str, Any]:
    """The graph in ONNX Runtime against PyTorch: logits of the kernels' classes, and the pixels
    inside their masks."""
    import numpy as np

    from knet_runtime.engines import open_engine
    from knet_runtime.preprocess import fit_to_input
    from knet_runtime.sources.images import read_image
    from knet_train.inference import predict_segment_logits

    spec = bundle.manifest.input
    worst, equal, filled = 0.0, [], []
    with open_engine(bundle, "onnxruntime-cpu") as engine:
        for path in paths:
            batch = fit_to_input(read_image(path), spec)[0][None]
            classes, masks = predict_segment_logits(model, batch)
            got = engine.infer(batch)
            difference = np.abs(got["class_logits"] - classes).max()
            worst = max(worst, float(difference / np.abs(classes).max()))
            equal.append(float(((got["mask_logits"] > 0) == (masks > 0)).mean()))
            filled.append(float((masks > 0).mean()))
    return {
        "images": len(paths),
        "max_logit_diff": worst,
        "agreement": sum(equal) / len(equal),
        "inside": sum(filled) / len(filled),
    }


def _build(bundle: Any, targets: list[str]) -> dict[str, Any]:
    from knet_export.tensorrt.build import build_plan
    from knet_export.tensorrt.profile import profile_of
    from knet_runtime.engines import default_graph
    from knet_runtime.engines.plan_store import BuildOptions

    options = BuildOptions(profile_of(bundle.manifest.input))
    kind = default_graph(bundle, "tensorrt-rtx")
    stored, _ = build_plan(bundle, "tensorrt-rtx", kind, options, targets=targets)
    record = stored.record
    return {
        "version": record.version,
        "targets": list(record.targets),
        "seconds": record.seconds,
        "bytes": record.bytes,
    }


def run_row(preset: str, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """``measure`` in a process of its own."""
    words = [sys.executable, __file__, "--row", "--images", str(options.images)]
    words += ["--presets", preset, "--precisions", precision]
    words += ["--count", str(options.count), "--targets", options.targets]
    words += ["--size", str(options.size)] if options.size else []
    words += ["--ade20k", str(options.ade20k)] if options.ade20k else []
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        failed = f"the process ended with {done.returncode}: {last}"
        return {"preset": preset, "precision": precision, "failed": failed}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | size | precision | parameters | export | ONNX Runtime: logits | pixels | "
        "TensorRT-RTX: build | engine |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        parameters = f"{row['parameters'] / 1e6:.1f} M" if "parameters" in row else ""
        size = "×".join(map(str, row.get("size", ())))
        cells = [row["preset"], size, row["precision"], parameters]
        cells.append(f"{row['export_seconds']:.0f} s" if "export_seconds" in row else "")
        if found := row.get("onnxruntime"):
            cells += [f"{found['max_logit_diff']:.1e}", f"{100 * found['agreement']:.3f} %"]
        else:
            cells += ["", ""]
        if found := row.get("tensorrt_rtx"):
            cells += [f"{found['seconds']:.1f} s", f"{found['bytes'] / 1e6:.0f} MB"]
        else:
            cells += [f"failed: {row.get('failed', 'not built')}", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    options = parse()
    if options.row:
        sys.stdout.write(json.dumps(measure(options)) + "\n")
        return
    if options.show:
        found = [row for path in options.show for row in json.loads(path.read_text())["rows"]]
        sys.stdout.write(table(sorted(found, key=lambda row: PRESETS.index(row["preset"]))))
        return
    rows = []
    if options.output is not None and options.output.exists():
        before = json.loads(options.output.read_text())["rows"]
        rows = [row for row in before if "failed" not in row]
    there = {(row["preset"], row["precision"]) for row in rows}
    for preset in options.presets:
        for precision in options.precisions:
            if (preset, precision) in there:
                continue
            rows.append(run_row(preset, precision, options))
            sys.stderr.write(f"{json.dumps(rows[-1])}\n")
            if options.output is not None:
                what = "logits: largest difference / largest logit"
                write_result({"what": what, "rows": rows}, options.output)
    sys.stdout.write(table(rows))
    if any("failed" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
