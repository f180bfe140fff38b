"""The fused model as an ONNX graph over a file of weights.

Weights stand in ``weights.bin`` from the start: the class-map graph reads the same file, and a
protobuf cannot hold more than 2 GB. Nodes, tensors and weights are named after the modules that
they come from (``stages.0.gather.linear/MatMul``): parity reports, quantisation patterns and
engines' layer lists speak of them by these names.
"""

from __future__ import annotations

import ast
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch

from knet_export.fuse.model import Fused
from knet_runtime.bundle.manifest import InputSpec, OutputSpec

LOGITS_NAME, CLASSMAP_NAME, WEIGHTS_NAME = "logits.onnx", "classmap.onnx", "weights.bin"
OPSET = 18
_BF16_OPSET = 22  # the first whose convolutions take bfloat16
_TRACED_BATCH = 2  # 1 would be taken for a constant
_MIN_EXTERNAL = 1024  # bytes; shapes and other small constants stay in the graph
_SCOPES = "pkg.torch.onnx.name_scopes"


def export_onnx(fused: Fused, spec: InputSpec, outputs: Sequence[OutputSpec], folder: Path) -> Path:
    """Write ``logits.onnx`` and ``weights.bin`` into ``folder``; the graph's path. ``outputs`` are
    in the order in which the fused model gives them.

    The batch is 1 … ``spec.max_batch`` (frozen at 1 when that is 1); height and width are free
    within ``spec.sizes``, or fixed without it. Raises OSError when it cannot be written.
    """
    from onnxscript import ir

    path = folder / LOGITS_NAME
    ir.save(
        _trace(fused, spec, outputs).model,
        path,
        external_data=WEIGHTS_NAME,
        size_threshold_bytes=_MIN_EXTERNAL,
    )
    if not (folder / WEIGHTS_NAME).exists():  # a network of nothing but small weights
        (folder / WEIGHTS_NAME).touch()
    proto = onnx.load(path, load_external_data=False)
    _name_axes(proto)
    _name_after_modules(proto)
    _strip(proto)
    onnx.save(proto, path)
    return path


def _trace(fused: Fused, spec: InputSpec, outputs: Sequence[OutputSpec]) -> Any:
    single = spec.max_batch == 1
    image = torch.zeros(1 if single else _TRACED_BATCH, spec.height, spec.width, 3).byte()
    axes: dict[int, Any] = {}
    if not single:
        axes[0] = torch.export.Dim("batch", min=1, max=spec.max_batch)
    if sizes := spec.sizes:
        for axis, name in ((0, "rows"), (1, "columns")):
            low, high = (side // sizes.multiple for side in (sizes.min[axis], sizes.max[axis]))
            if low < high:  # else this side is fixed
                axes[axis + 1] = sizes.multiple * torch.export.Dim(name, min=low, max=high)
    bf16 = any(weight.dtype == torch.bfloat16 for weight in fused.parameters())
    # Evaluated in this thread's default precision: no autocast may leak into the graph.
    with ignored_warnings(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        traced = torch.export.export(
            fused,
            (image,),
            dynamic_shapes=(axes,),
            # "This map is larger than that one" is true of every size, but not provable from all
            # the roundings on the way; what really depends on the size is found by running it.
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        return torch.onnx.export(
            traced,
            (image,),
            dynamo=True,
            opset_version=_BF16_OPSET if bf16 else OPSET,
            input_names=[spec.name],
            output_names=[output.name for output in outputs],
            verbose=False,
        )


def _name_axes(model: onnx.ModelProto) -> None:
    """Free axes have names that a person knows: batch, height and width of the image and of the
    logits; not what the tracer called them."""
    given = ("batch", "", "logits_height", "logits_width")
    tensors = [(model.graph.input[0], ("batch", "height", "width"))]
    for tensor, names in (*tensors, *((output, given) for output in model.graph.output)):
        for dim, name in zip(tensor.type.tensor_type.shape.dim, names, strict=False):
            if dim.dim_param:
                dim.dim_param = name
    del model.graph.value_info[:]  # in terms of the tracer's symbols; engines infer shapes anyway


def _name_after_modules(model: onnx.ModelProto) -> None:
    graph = model.graph
    kept = {tensor.name for tensor in (*graph.input, *graph.output)}
    constants = {tensor.name for tensor in graph.initializer}
    names: dict[str, str] = {}
    taken = set(kept)

    def unique(name: str) -> str:
        candidate, number = name, 1
        while candidate in taken:
            number += 1
            candidate = f"{name}_{number}"
        taken.add(candidate)
        return candidate

    for name in constants:
        if "." in name:  # it has a module's name already
            names[name] = unique(name)
    for node in graph.node:
        scope = _scope(node)
        node.name = unique(f"{scope}/{node.op_type}")
        for position, name in enumerate(node.input):
            if name in constants and name not in names:
                own = "weight" if (node.op_type, position) == ("MatMul", 1) else "constant"
                names[name] = unique(f"{scope}.{own}")
        for position, name in enumerate(node.output):
            if name and name not in kept:
                names[name] = node.name if len(node.output) == 1 else f"{node.name}:{position}"
    for node in graph.node:
        for part in (node.input, node.output):
            part[:] = [names.get(name, name) for name in part]
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)


def _scope(node: onnx.NodeProto) -> str:
    """The module that a node comes from, as ``named_modules`` calls it; "knet" for the whole."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            modules = [
                name
                for name in ast.literal_eval(entry.value)[:-1]
                if name and not name.startswith("_")  # the tracer's own
            ]
            return re.sub(r"[^\w.]", "_", modules[-1]) if modules else "knet"
    return "knet"


def _strip(model: onnx.ModelProto) -> None:
    """Leave out the exporter's notes, which hold stack traces with the paths of this machine."""
    graph = model.graph
    for part in (graph, *graph.node, *graph.input, *graph.output):
        del part.metadata_props[:]
    for tensor in graph.initializer:
        del tensor.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
    del model.metadata_props[:]


@contextmanager
def ignored_warnings() -> Iterator[None]:
    """The exporter reports its own progress and deprecations; none of it is the user's."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
