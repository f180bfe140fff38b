"""What a bundle states: the images that its graphs take, the graphs, and its model card."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import lcm

import msgspec

from knet_export.graph.classmap import CLASSMAP_OUTPUT, MAX_CLASSES
from knet_export.graph.to_onnx import CLASSMAP_NAME, LOGITS_NAME, WEIGHTS_NAME
from knet_export.int8.search import QUANTISATION_NAME, Quantisation, describe, method_name
from knet_export.verify.measure import default_tolerance, segment_tolerance
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
from knet_train.models.segments import SegmentKNet

MIN_SIZE, MAX_SIZE = (128, 128), (1024, 2048)
MULTIPLE = 8  # of every stride that logits come at
_MASK_STRIDE = 4  # of a network for segments
_MIN_SIDE = 32  # below it the coarsest level is less than a pixel


def size_range(smallest: Size = MIN_SIZE, largest: Size = MAX_SIZE) -> SizeRange:
    """The sizes of a graph of free height and width. Raises ConfigError where there are none."""
    if min(smallest) < _MIN_SIDE:
        raise ConfigError(f"--min {_times(smallest)}: a side must be at least {_MIN_SIDE} pixels")
    try:
        return SizeRange(smallest, largest, MULTIPLE)
    except ValueError as error:
        raise ConfigError(
            f"--dynamic: {error}; both --min and --max are HEIGHTxWIDTH, such as "
            f"{_times(MIN_SIZE)} and {_times(MAX_SIZE)}"
        ) from error


def export_spec(
    config: Config, size: Size | None, sizes: SizeRange | None, max_batch: int
) -> InputSpec:
    """The graphs' input: of ``size``, by default the one in the checkpoint, and of all ``sizes``
    that are also multiples of what the network asks for.

    Raises ConfigError for a size that is no such multiple, too small, or not among ``sizes``, or
    larger than a bundle may state, and for such a batch or one below 1.
    """
    usual = input_spec(config)
    height, width = size or (usual.height, usual.width)
    stride = usual.multiple
    level = "logits" if config.model.task == "semantic" else "coarsest level"
    what = f"{config.preset}'s {level}"
    if max_batch < 1:
        raise ConfigError(f"--max-batch {max_batch} must be at least 1")
    if height % stride or width % stride or min(height, width) < _MIN_SIDE:
        near = tuple(max(round(side / stride) * stride, _MIN_SIDE) for side in (height, width))
        raise ConfigError(
            f"--size {height}x{width}: both sides must be multiples of {stride}, the stride of "
            f"{what}, and at least {_MIN_SIDE}: {near[0]}x{near[1]} is near"
        )
    if sizes is not None and sizes.multiple % stride:
        try:
            sizes = SizeRange(sizes.min, sizes.max, lcm(sizes.multiple, stride))
        except ValueError as error:
            raise ConfigError(
                f"--dynamic: {error}; {stride} is the stride of {what}: choose another --min and "
                "--max"
            ) from error
    if sizes is not None and (height, width) not in sizes:
        raise ConfigError(
            f"--dynamic from {_times(sizes.min)} to {_times(sizes.max)} in multiples of "
            f"{sizes.multiple} leaves out {height}x{width}, the size it would run at: "
            "widen --min and --max, or choose another --size"
        )
    try:
        return msgspec.structs.replace(
            usual, height=height, width=width, sizes=sizes, max_batch=max_batch
        )
    except ValueError as error:  # larger than a bundle may state
        raise ConfigError(str(error)) from error


def _times(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def bundle_graphs(precision: Precision, classes: int, stride: int) -> tuple[Graph, ...]:
    """The manifest's graphs, each with the precision's own tolerance: of logits at ``stride``, and
    of class maps unless there are more ``classes`` than its uint8 can tell apart."""
    logits = OutputSpec("logits", "semantic_logits", (classes,), stride)
    graphs: dict[Kind, tuple[str, OutputSpec]] = {"logits": (LOGITS_NAME, logits)}
    if classes <= MAX_CLASSES:
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


def segment_graphs(precision: Precision, model: SegmentKNet) -> tuple[Graph]:
    """The same for a network for segments, whose result is made by the runtime alone."""
    kernels = model.init_kernels.out_channels + len(model.stuff)
    return (
        Graph(
            path=LOGITS_NAME,
            outputs=(
                OutputSpec("class_logits", "class_logits", (kernels, model.conv_seg.out_channels)),
                OutputSpec("mask_logits", "mask_logits", (kernels,), _MASK_STRIDE),
            ),
            precision=precision,
            tolerance=segment_tolerance(precision),
            external_data=(WEIGHTS_NAME,),
        ),
    )


def model_card(manifest: Manifest, config: Config, int8: Quantisation | None = None) -> str:
    """Markdown that states what is known: input, classes, parity, int8, recipe, licences."""
    spec, licence = manifest.input, manifest.licence
    records = manifest.graph("logits").parity
    lines = [
        f"# {manifest.name}",
        "",
        f"K-Net (arXiv 2106.14855), preset `{config.preset}`, exported by knet-deploy.",
        "",
        f"- Input: {spec.width}×{spec.height} RGB; other sizes are fitted by {spec.resize}.",
        f"- Classes ({manifest.labels.num_classes}): {_plain(', '.join(manifest.labels.names))}.",
        f"- Checkpoint: SHA-256 `{manifest.provenance.checkpoint_sha256}`.",
        f"- Licences: code {_plain(licence.code)}; weights {_plain(licence.weights)}; "
        f"training data {_plain(licence.data)}.",
        "",
        "## Parity with PyTorch",
        "",
    ]
    if not records:
        lines.append("Not measured.")
    for parity in records:
        lines.append(
            f"Measured on {parity.images} images ({_plain(parity.data)}), {parity.engine}:"
        )
        lines.append("")
        if parity.miou_reference is not None:
            lines.append(f"- mIoU in PyTorch {parity.miou_reference:.2f} %")
            lines.append(f"- mIoU of the bundle {parity.miou_measured:.2f} %")
        what = "pixels" if manifest.task == "semantic" else "pixels of all kernels' masks"
        lines.append(f"- equal {what} {100 * parity.agreement:.4f} %")
        lines.append(f"- largest logit difference {parity.max_logit_diff:.1e} of the largest logit")
    if int8 is not None:
        lines += ["", *_int8_lines(int8)]
    recipe = msgspec.json.format(msgspec.json.encode(config), indent=2).decode()
    lines += ["", "## Recipe", "", "```json", recipe, "```", ""]
    return "\n".join(lines)


def _int8_lines(record: Quantisation) -> list[str]:
    kept = [*record.kept_blocks, *record.kept_patterns]
    worst = [
        f"`{cost.block}` ({100 * (1 - cost.score.agreement):.2f} %)" for cost in record.blocks[:5]
    ]
    lines = [
        "## Quantisation",
        "",
        f"- int8 (static Q/DQ): {record.int8_nodes} convolutions and products, "
        f"{100 * record.int8_macs:.1f} % of the multiply-adds.",
        f"- Calibrated by {method_name(record.method, record.percent)} on "
        f"{record.calibrated} images of {_plain(record.data)}.",
        f"- Against the float graph on {record.held_out} others: {describe(record.score)}.",
        f"- Kept in fp32: {_quoted(kept) or 'nothing of these'}.",
    ]
    if record.fp16_patterns:
        lines.append(f"- Kept in fp16: {_quoted(record.fp16_patterns)}.")
    lines += [
        f"- Costliest blocks, each alone in int8, by pixels changed: {', '.join(worst)}. "
        f"All of them, with numbers: `{QUANTISATION_NAME}`.",
        "",
    ]
    return lines


def _plain(text: str) -> str:
    """Text in Markdown that is shown as it is: no markup, and no HTML, is read out of it."""
    return re.sub(r"([\\`*_\[\]<>&|~#])", r"\\\1", " ".join(text.split()))


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
