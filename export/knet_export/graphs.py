"""Which graphs a bundle has, and the first of them from a trained model."""

from __future__ import annotations

from pathlib import Path

from knet_export.form.deploy import DeployKNet, deploy_form
from knet_export.form.precision import halve
from knet_export.graph.tail import MOST_CLASSES
from knet_export.graph.to_onnx import CLASSMAP_NAME, LOGITS_NAME, WEIGHTS_NAME, export_onnx
from knet_export.parity.tolerance import default_tolerance
from knet_runtime.manifest import Artefact, InputSpec, Kind, OutputSpec, Precision
from knet_train.knet import KNet


def graph_artefacts(precision: Precision, classes: int) -> tuple[Artefact, ...]:
    """The manifest's entries, each with the precision's own tolerance: the logits graph, and the
    class-map graph unless there are more ``classes`` than its uint8 can tell apart."""
    graphs: dict[Kind, str] = {"logits": LOGITS_NAME}
    if classes <= MOST_CLASSES:
        graphs["classmap"] = CLASSMAP_NAME
    return tuple(
        Artefact(
            path=path,
            kind=kind,
            precision=precision,
            tolerance=default_tolerance(precision),
            external_data=(WEIGHTS_NAME,),
        )
        for kind, path in graphs.items()
    )


def form_for(model: KNet, spec: InputSpec, output: OutputSpec, precision: Precision) -> DeployKNet:
    """The deploy form of ``model`` for all pictures that ``spec`` takes. It is float32 still; for
    fp16 its sums over pixels are rescaled so that they will fit. Raises ConfigError for Swin with
    free sizes."""
    most = spec.sizes.most if spec.sizes else (spec.height, spec.width)
    pixels = most[0] * most[1] // output.stride**2 if precision == "fp16" else 0
    return deploy_form(model, None if spec.sizes else most, pixels=pixels)


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
