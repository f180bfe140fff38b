"""Objects and stuff of a street: panoptic models beside semantic ones with connected components.

    python benchmarks/street_panoptic.py MODEL [MODEL ...] --data FOLDER \\
        --output benchmarks/results/street-panoptic-camvid.json

Models are bundles or checkpoints, semantic or panoptic. A semantic one becomes the baseline that a
panoptic one has to beat: each connected region of a thing's class is an object, whose score is the
mean probability of its class. README.md beside this file says what the numbers mean.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray
from result import parser_of, write_result

from knet_export.verify.reference import Outputs, TorchReference
from knet_runtime.bundle.manifest import InputSpec, SegmentRules
from knet_runtime.bundle.store import open_bundle
from knet_runtime.engines import open_engine
from knet_runtime.labels import LabelMap
from knet_runtime.postprocess import class_map, cut_window, find_segments
from knet_runtime.preprocess import Geometry, fit_to_input
from knet_runtime.segmentation import Segmentation
from knet_runtime.types import Task
from knet_train.checkpoint import read_any_checkpoint
from knet_train.data.segment_folder import SegmentFolder
from knet_train.data.segments import open_segments
from knet_train.evaluate import Scored
from knet_train.evaluate_segments import (
    average_precision,
    instance_report,
    panoptic_quality,
    panoptic_report,
)
from knet_train.inference import input_spec, segment_rules


@dataclass(frozen=True)
class Model:
    """What gives logits for an image that was fitted to its input."""

    path: Path
    task: Task
    labels: LabelMap
    spec: InputSpec
    rules: SegmentRules
    outputs: Callable[[NDArray[np.uint8]], Outputs]
    checkpoint_sha256: str
    preset: str
    engine: str


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--data", type=Path, required=True, help="objects, as train reads them")
    parser.add_argument("--split", default="val")
    parser.add_argument("--engine", default="onnxruntime-cpu", help="of the bundles")
    parser.add_argument(
        "--objects", action="store_true", help="the data has no stuff: average precision alone"
    )
    parser.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="CLASS=NAME,NAME",
        help="the data's categories that are a class of the models, where it has other names",
    )
    parser.add_argument(
        "--things", default="Car,Pedestrian,Bicyclist", help="with --map: classes of objects"
    )
    parser.add_argument(
        "--smallest", type=int, default=100, help="pixels of a region that counts as an object"
    )
    return parser.parse_args()


@contextmanager
def opened(path: Path, engine: str) -> Iterator[Model]:
    if path.is_dir():
        bundle = open_bundle(path)
        manifest = bundle.manifest
        with open_engine(bundle, engine, "logits") as running:
            specs = bundle.graph("logits").outputs

            def outputs(fitted: NDArray[np.uint8]) -> Outputs:
                given = running.infer(fitted[None])
                return {spec.meaning: given[spec.name][0] for spec in specs}

            yield Model(
                path,
                manifest.task,
                manifest.labels,
                manifest.input,
                manifest.segment_rules,
                outputs,
                manifest.provenance.checkpoint_sha256,
                manifest.provenance.preset,
                running.name,
            )
        return
    checkpoint = read_any_checkpoint(path)
    config = checkpoint.config
    yield Model(
        path,
        config.model.task,
        checkpoint.labels,
        input_spec(config),
        segment_rules(config),
        TorchReference(checkpoint).outputs,
        checkpoint.sha256,
        config.preset,
        "pytorch-cpu",
    )


def components(
    logits: NDArray[np.float32], geometry: Geometry, labels: LabelMap, smallest: int
) -> Segmentation:
    """Semantic logits [N, h, w] as a panoptic result: a class of stuff is one segment, and of a
    thing each connected region of at least ``smallest`` pixels is."""
    exponents = np.exp(logits - logits.max(0))
    probabilities = cut_window(exponents / exponents.sum(0), geometry)
    height, width = geometry.source_hw
    found = class_map(logits, geometry)
    ids = np.zeros(found.shape, np.uint16)
    classes: list[int] = []
    scores: list[float] = []
    for class_id in np.unique(found).tolist():
        mask = (found == class_id).view(np.uint8)
        is_thing = class_id in labels.things
        regions = cv2.connectedComponents(mask)[1] if is_thing else mask
        sure = cv2.resize(np.ascontiguousarray(probabilities[class_id]), (width, height))
        areas = np.bincount(regions.ravel())
        means = np.bincount(regions.ravel(), sure.ravel()) / np.maximum(areas, 1)
        table = np.zeros(len(areas), np.uint16)
        for region in range(1, len(areas)):
            if areas[region] >= (smallest if is_thing else 1):
                classes.append(class_id)
                scores.append(float(means[region]))
                table[region] = len(classes)
        ids += table[regions]
    return Segmentation.from_panoptic(ids, classes, scores, labels)


def finder(
    model: Model, things: tuple[str, ...], rules: SegmentRules, smallest: int
) -> Callable[[NDArray[np.uint8]], Segmentation]:
    labels = msgspec.structs.replace(model.labels, things=model.labels.indices(things))

    def find(image: NDArray[np.uint8]) -> Segmentation:
        fitted, geometry = fit_to_input(image, model.spec)
        given = model.outputs(fitted)
        if model.task == "semantic":
            logits = np.asarray(given["semantic_logits"], np.float32)
            return components(logits, geometry, labels, smallest)
        classes, masks = given["class_logits"], given["mask_logits"]
        return find_segments(model.task, classes, masks, geometry, model.labels, rules)

    return find


@contextmanager
def mapped(options: argparse.Namespace, labels: LabelMap) -> Iterator[Path]:
    """The data folder, or one of links to it with a ``labels.json`` that maps its categories."""
    data: Path = options.data
    if not options.map:
        yield data
        return
    pairs = (word.split("=", 1) for word in options.map)
    stated = {
        "class_names": labels.names,
        "palette_rgb": labels.palette,
        "ignore_index": labels.ignore_index,
        "things": options.things.split(","),
        "map": {name: sources.split(",") for name, sources in pairs},
    }
    with tempfile.TemporaryDirectory() as folder:
        for path in data.resolve().iterdir():
            if path.name != "labels.json":
                (Path(folder) / path.name).symlink_to(path)
        (Path(folder) / "labels.json").write_text(json.dumps(stated))
        yield Path(folder)


def row_of(
    model: Model, stuff: SegmentFolder | None, objects: SegmentFolder, name: str, smallest: int
) -> dict[str, Any]:
    things = objects.labels.names
    scored = Scored(
        checkpoint_sha256=model.checkpoint_sha256,
        preset=model.preset,
        engine=model.engine,
        data=name,
        images=len(objects),
        mode=f"{model.spec.resize} to {model.spec.width}×{model.spec.height}",
    )
    row: dict[str, Any] = {"model": model.path.name, "task": model.task}
    if stuff is not None:
        find = finder(model, things, model.rules, smallest)
        row["panoptic"] = panoptic_report(panoptic_quality(find, stuff), scored)
    # Objects are ranked by their scores, so all are taken.
    find = finder(model, things, msgspec.structs.replace(model.rules, score=0.0), smallest)
    row["objects"] = instance_report(average_precision(find, objects), scored)
    return row


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return round(value, 3) if isinstance(value, float) else value


def main() -> None:
    options = parse()
    rows = []
    name = f"{options.data.resolve().name}, split {options.split}"
    for path in options.models:
        with opened(path, options.engine) as model, mapped(options, model.labels) as data:
            objects = open_segments(data, options.split, "instance")
            stuff = None if options.objects else open_segments(data, options.split, "panoptic")
            rows.append(row_of(model, stuff, objects, name, options.smallest))
    report = {
        "what": "panoptic quality and average precision; semantic models by connected components",
        "data": name,
        "smallest_region": options.smallest,
        "rows": rounded(msgspec.to_builtins(rows)),
    }
    write_result(report, options.output)


if __name__ == "__main__":
    main()
