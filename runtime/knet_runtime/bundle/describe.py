"""What a bundle says about itself: rows of a label and a text, and a card for notebooks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from knet_runtime.bundle.manifest import Graph, Parity, SegmentRules
from knet_runtime.markup import card, facts, legend
from knet_runtime.types import METRICS, Metric, Task

if TYPE_CHECKING:
    from knet_runtime.bundle.store import Bundle

Row = tuple[str, str]
"""A label and a text; a row without a label goes on with the one before."""

_MAIN = ("task", "precision", "input", "sizes", "output", "parity")  # what a card begins with


def rows(bundle: Bundle) -> Iterator[Row]:
    """All that the manifest states, in order."""
    manifest = bundle.manifest
    spec = manifest.input
    yield "bundle", str(bundle.path)
    yield "name", manifest.name
    yield "model", bundle.model_id
    yield "schema", str(manifest.schema)
    yield "task", manifest.task
    yield "precision", manifest.precision
    yield (
        "input",
        f"{spec.name}: {spec.dtype} {spec.colour} {spec.layout}, {spec.height}×{spec.width} "
        f"(height×width), batch 1 to {spec.max_batch}, other sizes: {spec.resize}",
    )
    if spec.sizes is not None:
        low, high = spec.sizes.min, spec.sizes.max
        yield (
            "sizes",
            f"{low[0]}×{low[1]} to {high[0]}×{high[1]} in multiples of {spec.sizes.multiple}: "
            "run --size",
        )
    for graph in manifest.graphs:
        for output in graph.outputs:
            shape = "×".join(map(str, output.shape(spec.size)))
            meaning = output.meaning.replace("_", " ")
            yield "output", f"{output.name}: {output.dtype} {meaning}, {shape}"
    classes = zip(manifest.labels.names, manifest.labels.palette, strict=True)
    for index, (name, (red, green, blue)) in enumerate(classes):
        text = f"{index:>3}  #{red:02x}{green:02x}{blue:02x}  {name}"
        yield "" if index else "classes", text
    yield "ignored", str(manifest.labels.ignore_index)
    if manifest.task != "semantic":
        yield "segments", _rules_line(manifest.task, manifest.segment_rules)
    for path, record in sorted(manifest.files.items()):
        # open_bundle has read and hashed them all, or there would be nothing to show.
        yield "file", f"{path}  {record.bytes:,} bytes  sha256 {record.sha256[:12]}  ok"
    for graph in manifest.graphs:
        yield from _graph_rows(graph, METRICS[manifest.task])
    origin, licence = manifest.provenance, manifest.licence
    yield "preset", origin.preset
    yield "checkpoint", f"sha256 {origin.checkpoint_sha256[:12]}"
    yield "tools", ", ".join(f"{tool} {version}" for tool, version in sorted(origin.tools.items()))
    yield "licence", f"code {licence.code}; weights {licence.weights}; data {licence.data}"


def bundle_card(bundle: Bundle) -> str:
    """The same as HTML: the classes in their colours, and what is seldom asked for folded away."""
    labels = bundle.manifest.labels
    found = list(rows(bundle))
    main = [row for row in found if row[0] in _MAIN]
    rest = [row for row in found if row[0] not in ("", "classes", *_MAIN)]
    body = (
        f"{facts(main)}<ul class='legend'>{legend(labels, range(labels.num_classes))}</ul>"
        f"<details><summary>files, tolerance, origin, licences</summary>{facts(rest)}</details>"
    )
    return card(bundle.model_id, body)


def _rules_line(task: Task, rules: SegmentRules) -> str:
    kept = (
        f"best {rules.top_k} pairs of a kernel and a class"
        if task == "instance"
        else f"won at least {rules.overlap:g} of its own mask"
    )
    twins = f", no two masks with an IoU above {rules.nms:g}" if rules.nms < 1 else ""
    return f"score ≥ {rules.score:g}, mask > {rules.mask:g}, {kept}{twins}"


def _graph_rows(graph: Graph, metric: Metric) -> Iterator[Row]:
    weights = f", weights in {', '.join(graph.external_data)}" if graph.external_data else ""
    yield "graph", f"{graph.path} ({graph.kind}, {graph.format}, {graph.precision}{weights})"
    limits = graph.tolerance
    yield (
        "tolerance",
        f"{metric} ±{limits.delta_miou:g} points, worst class ±{limits.worst_class_delta_iou:g} "
        f"points, agreement ≥ {100 * limits.agreement:g} %, logits ±{limits.max_logit_diff:g} of "
        "the largest",
    )
    if not graph.parity:
        yield "parity", "not measured: knet-deploy verify measures it"
    for parity in graph.parity:
        yield "parity", _parity_line(parity, metric)


def _parity_line(parity: Parity, metric: Metric) -> str:
    scores = ""
    if parity.miou_reference is not None and parity.miou_measured is not None:
        scores = f"{metric} {parity.miou_reference:.2f} → {parity.miou_measured:.2f} %, "
    if parity.worst_class_delta_iou is not None:
        scores += f"worst class {parity.worst_class_delta_iou:+.3f} points, "
    scores += f"agreement {100 * parity.agreement:.4f} %, "
    if parity.max_logit_diff is not None:
        scores += f"logits differ by at most {parity.max_logit_diff:.2g} of the largest, "
    return (
        f"{'passed' if parity.passed else 'FAILED'} on {parity.engine} ({parity.device}): {scores}"
        f"on {parity.images} images of {parity.data}"
    )
