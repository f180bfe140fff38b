"""Which graphs a bundle has, and the first of them from a trained model.

Which pictures the exported graphs take.

The model card that goes into a bundle when its author brings none.
"""

from __future__ import annotations

from math import prod
from pathlib import Path

import msgspec

from knet_export.fuse.model import FusedKNet, fuse
from knet_export.fuse.precision import halve
from knet_export.graph.classmap import CLASSMAP_OUTPUT, MOST_CLASSES
from knet_export.graph.to_onnx import CLASSMAP_NAME, LOGITS_NAME, WEIGHTS_NAME, export_onnx
from knet_export.int8.search import Quantisation
from knet_export.int8.write import card_lines
from knet_export.verify.measure import default_tolerance
from knet_runtime.bundle.manifest import (
    Graph,
    InputSpec,
    Kind,
    Manifest,
    OutputSpec,
    Precision,
    SizeRange,
)
from knet_runtime.errors import ConfigError
from knet_runtime.types import Size
from knet_train.config import Config
from knet_train.inference import input_spec
from knet_train.models.knet import KNet


def bundle_graphs(precision: Precision, classes: int, stride: int) -> tuple[Graph, ...]:
    """The manifest's entries, each with the precision's own tolerance: the graph that gives logits
    at ``stride``, and the class-map graph unless there are more ``classes`` than its uint8 can tell
    apart."""
    logits = OutputSpec("logits", "semantic_logits", (classes,), stride)
    graphs: dict[Kind, tuple[str, OutputSpec]] = {"logits": (LOGITS_NAME, logits)}
    if classes <= MOST_CLASSES:
        graphs["classmap"] = CLASSMAP_NAME, OutputSpec(CLASSMAP_OUTPUT, "class_map", stride=1)
    return tuple(
        Graph(
            path=path,
            kind=kind,
            outputs=(output,),
            precision=precision,
            tolerance=default_tolerance(precision),
            external_data=(WEIGHTS_NAME,),
        )
        for kind, (path, output) in graphs.items()
    )


def form_for(model: KNet, spec: InputSpec, output: OutputSpec, precision: Precision) -> FusedKNet:
    """The deploy form of ``model`` for all pictures that ``spec`` takes. It is float32 still; for
    fp16 its sums over pixels are rescaled so that they will fit. Raises ConfigError for Swin with
    free sizes."""
    most = spec.sizes.max if spec.sizes else spec.size
    pixels = prod(output.shape(most)[1:]) if precision == "fp16" else 0
    return fuse(model, None if spec.sizes else most, pixels=pixels)


def write_logits_graph(
    model: KNet, spec: InputSpec, output: OutputSpec, precision: Precision, folder: Path
) -> None:
    """Write ``logits.onnx`` and ``weights.bin`` of ``model`` into ``folder``; for int8 in float32,
    to be quantised. Raises ConfigError as ``form_for``, CheckpointError for weights that the
    precision can not hold, OSError when it can not be written."""
    form = form_for(model, spec, output, precision)
    if precision in ("fp16", "bf16"):
        form = halve(form, precision)
    export_onnx(form, spec, output, folder)


LEAST, MOST = (128, 128), (1024, 2048)
MULTIPLE = 8  # of every stride that logits come at
_SMALLEST_SIDE = 32  # below it the coarsest level is less than a pixel


def size_range(least: Size = LEAST, most: Size = MOST) -> SizeRange:
    """The sizes of a graph of free height and width. Raises ConfigError where there are none."""
    if min(least) < _SMALLEST_SIDE:
        raise ConfigError(f"--min {_times(least)}: a side must be at least {_SMALLEST_SIDE} pixels")
    try:
        return SizeRange(least, most, MULTIPLE)
    except ValueError as error:
        raise ConfigError(
            f"--dynamic: {error}; both --min and --max are HEIGHTxWIDTH, such as "
            f"{_times(LEAST)} and {_times(MOST)}"
        ) from error


def export_spec(
    config: Config, size: Size | None, sizes: SizeRange | None, max_batch: int
) -> InputSpec:
    """The graphs' input: of ``size``, by default the one in the checkpoint, and of all ``sizes``.

    Raises ConfigError for a size that is no multiple of the logits' stride, too small, or not
    among ``sizes``, and for a batch below 1.
    """
    usual = input_spec(config)
    height, width = size or (usual.height, usual.width)
    stride = config.model.stride
    if max_batch < 1:
        raise ConfigError(f"--max-batch {max_batch} must be at least 1")
    if height % stride or width % stride or min(height, width) < _SMALLEST_SIDE:
        near = tuple(max(round(side / stride) * stride, _SMALLEST_SIDE) for side in (height, width))
        raise ConfigError(
            f"--size {height}x{width}: both sides must be multiples of {stride}, the stride of "
            f"{config.preset}'s logits, and at least {_SMALLEST_SIDE}: {near[0]}x{near[1]} is near"
        )
    if sizes is not None and sizes.multiple % stride:
        raise ConfigError(
            f"sizes in multiples of {sizes.multiple} do not fit the stride {stride} of "
            f"{config.preset}'s logits: take multiples of {MULTIPLE}"
        )
    if sizes is not None and (height, width) not in sizes:
        raise ConfigError(
            f"--dynamic from {_times(sizes.min)} to {_times(sizes.max)} in multiples of "
            f"{sizes.multiple} leaves out {height}x{width}, the size it would run at: "
            "widen --min and --max, or choose another --size"
        )
    return msgspec.structs.replace(
        usual, height=height, width=width, sizes=sizes, max_batch=max_batch
    )


def _times(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def model_card(manifest: Manifest, config: Config, int8: Quantisation | None = None) -> str:
    """Markdown that states what is known: input, classes, parity, int8, recipe, licences."""
    spec, records = manifest.input, manifest.graphs[0].parity
    lines = [
        f"# {manifest.name}",
        "",
        f"K-Net (arXiv 2106.14855), preset `{config.preset}`, exported by knet-deploy.",
        "",
        f"- Input: {spec.width}×{spec.height} RGB; other sizes are fitted by {spec.resize}.",
        f"- Classes ({manifest.labels.num_classes}): {', '.join(manifest.labels.names)}.",
        f"- Checkpoint: SHA-256 `{manifest.provenance.checkpoint_sha256}`.",
        f"- Licences: code {manifest.licence.code}; weights {manifest.licence.weights}; "
        f"training data {manifest.licence.data}.",
        "",
        "## Parity with PyTorch",
        "",
    ]
    if not records:
        lines.append("Not measured.")
    for parity in records:
        lines.append(f"Measured on {parity.images} pictures ({parity.data}), {parity.engine}:")
        lines.append("")
        if parity.miou_reference is not None:
            lines.append(f"- mIoU in PyTorch {parity.miou_reference:.2f} %")
            lines.append(f"- mIoU of the artefact {parity.miou_measured:.2f} %")
        lines.append(f"- equal pixels {100 * parity.agreement:.4f} %")
        lines.append(f"- largest logit difference {parity.max_logit_diff:.1e} of the largest logit")
    if int8 is not None:
        lines += ["", *card_lines(int8)]
    recipe = msgspec.json.format(msgspec.json.encode(config), indent=2).decode()
    lines += ["", "## Recipe", "", "```json", recipe, "```", ""]
    return "\n".join(lines)
