"""Nodes that compute in fp16 where the rest of the graph is int8.

    X ── Cast ── Conv / MatMul / Gemm (W in fp16) ── Cast ── Y

For GPUs: what int8 would cost too much of, at half the price of fp32.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from knet_export.int8.quantise import Weighted, replace
from knet_runtime.errors import CheckpointError


def with_halves(
    graph: onnx.ModelProto, weights: Path, nodes: Iterable[Weighted]
) -> onnx.ModelProto:
    """A copy of the float32 ``graph``, whose external data lies in the folder ``weights``, with
    ``nodes`` in fp16. Raises CheckpointError for a weight that fp16 can not hold."""
    halved = onnx.ModelProto()
    halved.CopyFrom(graph)
    body = halved.graph
    chosen = {node.name for node in nodes}
    stored = {tensor.name: tensor for tensor in body.initializer}
    constants: dict[str, onnx.TensorProto] = {}
    casts: set[str] = set()
    ordered: list[onnx.NodeProto] = []
    for node in body.node:
        if node.name not in chosen:
            ordered.append(node)
            continue
        for place, name in enumerate(node.input):
            half = f"{name}_fp16"
            if name in stored:
                if half not in constants:
                    values = numpy_helper.to_array(stored[name], str(weights))
                    constants[half] = _half(name, half, values)
            elif half not in casts:
                casts.add(half)
                ordered.append(
                    helper.make_node("Cast", [name], [half], f"{half}_Cast", to=TensorProto.FLOAT16)
                )
            node.input[place] = half
        (result,) = node.output
        node.output[0] = f"{result}_fp16"
        back = helper.make_node(
            "Cast", [node.output[0]], [result], f"{result}_Cast", to=TensorProto.FLOAT
        )
        ordered += [node, back]
    read = {name for node in ordered for name in node.input}
    kept = [tensor for tensor in body.initializer if tensor.name in read]
    replace(body.node, ordered)
    replace(body.initializer, [*kept, *constants.values()])
    del body.value_info[:]
    return halved


def _half(name: str, half: str, values: np.ndarray) -> onnx.TensorProto:
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16)
    if not np.isfinite(rounded).all():
        raise CheckpointError(
            f"{name} holds {np.abs(values).max():g}, and fp16 ends at 65,504: "
            "name it with --keep-fp32 instead of --keep-fp16"
        )
    return numpy_helper.from_array(rounded, half)
