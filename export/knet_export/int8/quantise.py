"""A float graph as a quantised one: static Q/DQ, as TensorRT, ONNX Runtime and OpenVINO take it.

The type of every operand stands in the graph (DESIGN §6). For each chosen convolution or product
with a constant weight W and an input X:

    X ── QuantizeLinear ── DequantizeLinear ──┐
    W (int8) ───────────── DequantizeLinear ──┴── Conv / MatMul / Gemm

Weights are int8 per output channel, activations int8 per tensor, both symmetric with a zero point
of 0 (TensorRT takes no other) and -127 … 127. Biases and outputs stay as they are: an engine fuses
the next Q into the convolution before it, and what is not followed by one keeps its precision
(residual sums, normalisations, softmax, the kernels and the products with them).

Nodes that compute in fp16 where the rest of the graph is int8.

    X ── Cast ── Conv / MatMul / Gemm (W in fp16) ── Cast ── Y

For GPUs: what int8 would cost too much of, at half the price of fp32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import isfinite, prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from knet_runtime.errors import CheckpointError, ConfigError

_LARGEST = 127
_PRODUCTS = ("Conv", "MatMul", "Gemm")
# int8 units work on 8 channels or more at once; pyramid pooling's matrices have fewer, too.
_FEWEST_OUTPUTS = 8


@dataclass(frozen=True)
class Weighted:
    """A node that could be int8: a convolution or product of a tensor with a constant weight."""

    name: str
    op: str
    block: str  # the part of the network that it belongs to
    activation: str  # the tensor that would be quantised
    weight: str  # the initializer
    axis: int  # of the weight's output channels
    macs: int  # multiply-adds for one picture


def multiply_adds(graph: onnx.ModelProto, input_name: str, size: tuple[int, int]) -> dict[str, int]:
    """By node: the multiply-adds of every convolution and product, for one picture of ``size``
    (height, width)."""
    shapes = _shapes(graph, input_name, size)
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in graph.graph.initializer}
    return {
        node.name: prod(shapes[node.output[0]]) * _depth(node, shapes)
        for node in graph.graph.node
        if node.op_type in _PRODUCTS
    }


def quantisable(graph: onnx.ModelProto, macs: Mapping[str, int]) -> tuple[Weighted, ...]:
    """The nodes of a float ``graph`` that can be int8, in its order: what has a constant weight and
    works on pixels. ``macs`` is ``multiply_adds``'s.

    What works on the N kernels stays float: it is tiny, and it holds the gates and normalisations.
    """
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.graph.initializer}
    found = []
    for node in graph.graph.node:
        weight = weights.get(node.input[1]) if node.op_type in _PRODUCTS else None
        if weight is None or node.input[0] in weights or _block(node).startswith("stages."):
            continue
        axis = _output_axis(node, len(weight))
        if weight[axis] < _FEWEST_OUTPUTS:
            continue
        found.append(
            Weighted(
                name=node.name,
                op=node.op_type,
                block=_block(node),
                activation=node.input[0],
                weight=node.input[1],
                axis=axis,
                macs=macs[node.name],
            )
        )
    return tuple(found)


def matching(nodes: Sequence[Weighted], patterns: Iterable[str], option: str) -> frozenset[str]:
    """The names of the nodes whose name, operator, weight or block matches a pattern (``fnmatch``,
    case and all). Raises ConfigError, naming the ``option``, for a pattern that matches none."""
    kept: set[str] = set()
    for pattern in patterns:
        matched = {
            node.name
            for node in nodes
            if any(
                fnmatchcase(text, pattern) for text in (node.name, node.op, node.weight, node.block)
            )
        }
        if not matched:
            blocks = ", ".join(dict.fromkeys(node.block for node in nodes))
            raise ConfigError(
                f"{option} {pattern!r} matches nothing that would be int8; "
                f"there are the blocks {blocks}"
            )
        kept |= matched
    return frozenset(kept)


def quantise(
    graph: onnx.ModelProto,
    weights: Path,
    nodes: Iterable[Weighted],
    thresholds: Mapping[str, float],
) -> onnx.ModelProto:
    """A copy of ``graph``, whose external data lies in the folder ``weights``, with ``nodes`` in
    int8. ``thresholds`` has the |x| of every activation that becomes 127.

    Raises CheckpointError for a threshold or a weight that is no finite number.
    """
    quantised = onnx.ModelProto()
    quantised.CopyFrom(graph)
    body = quantised.graph
    chosen = {node.name: node for node in nodes}
    before: dict[str, list[onnx.NodeProto]] = {}
    constants: list[onnx.TensorProto] = []
    stored = {tensor.name: tensor for tensor in body.initializer}
    done: dict[str, str] = {}
    for node in body.node:
        weighted = chosen.get(node.name)
        if weighted is None:
            continue
        added = before.setdefault(node.name, [])
        if weighted.activation not in done:
            nodes_, tensors = _activation(weighted.activation, thresholds[weighted.activation])
            added += nodes_
            constants += tensors
            done[weighted.activation] = nodes_[-1].output[0]
        if weighted.weight not in done:
            values = numpy_helper.to_array(stored[weighted.weight], str(weights))
            dequantise, tensors = _weight(weighted.weight, values, weighted.axis)
            added.append(dequantise)
            constants += tensors
            done[weighted.weight] = dequantise.output[0]
        node.input[0], node.input[1] = done[weighted.activation], done[weighted.weight]
    ordered = [item for node in body.node for item in (*before.get(node.name, ()), node)]
    read = {name for node in ordered for name in node.input}
    kept = [tensor for tensor in body.initializer if tensor.name in read]
    replace(body.node, ordered)
    replace(body.initializer, [*kept, *constants])
    del body.value_info[:]
    return quantised


def _activation(name: str, threshold: float) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Q and DQ of an activation, and their scale and zero point."""
    if not (isfinite(threshold) and threshold >= 0):
        raise CheckpointError(
            f"the range of {name} is {threshold}, which no int8 can cover; "
            "check the checkpoint with `knet-deploy eval`"
        )
    scale = np.float32(threshold / _LARGEST or 1.0)  # of what was always 0, any scale is right
    if not scale > 0:
        scale = np.finfo(np.float32).tiny
    constants = [
        numpy_helper.from_array(np.array(scale, np.float32), f"{name}_scale"),
        numpy_helper.from_array(np.array(0, np.int8), f"{name}_zero_point"),
    ]
    numbers = [constant.name for constant in constants]
    nodes = [
        helper.make_node(
            "QuantizeLinear", [name, *numbers], [f"{name}_int8"], f"{name}_QuantizeLinear"
        ),
        helper.make_node(
            "DequantizeLinear",
            [f"{name}_int8", *numbers],
            [f"{name}_dequantised"],
            f"{name}_DequantizeLinear",
        ),
    ]
    return nodes, constants


def _weight(
    name: str, values: NDArray[np.float32], axis: int
) -> tuple[onnx.NodeProto, list[onnx.TensorProto]]:
    """DQ of a weight that is stored as int8, and its constants, a scale per output channel."""
    others = tuple(place for place in range(values.ndim) if place != axis)
    largest = np.abs(values).max(others, keepdims=True)
    if not np.isfinite(largest).all():
        raise CheckpointError(f"the weight {name} holds NaN or infinity: train or import it again")
    scale = (largest / _LARGEST).astype(np.float32)
    scale[scale == 0] = 1.0  # a channel of zeros
    rounded = np.rint(values / scale).clip(-_LARGEST, _LARGEST).astype(np.int8)
    constants = [
        numpy_helper.from_array(rounded, f"{name}_int8"),
        numpy_helper.from_array(scale.ravel(), f"{name}_scale"),
        numpy_helper.from_array(np.zeros(scale.size, np.int8), f"{name}_zero_point"),
    ]
    node = helper.make_node(
        "DequantizeLinear",
        [constant.name for constant in constants],
        [f"{name}_dequantised"],
        f"{name}_DequantizeLinear",
        axis=axis,
    )
    return node, constants


def _output_axis(node: onnx.NodeProto, rank: int) -> int:
    """The axis of the output channels in the weight."""
    return 0 if node.op_type == "Conv" or _transposed(node) else rank - 1


def _depth(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many products are summed for one output."""
    weight = shapes[node.input[1]]
    if node.op_type == "Conv":  # [out, in / groups, ...]
        return prod(weight[1:])
    return weight[-1] if _transposed(node) else weight[-2]


def _transposed(node: onnx.NodeProto) -> bool:
    return any(attribute.name == "transB" and attribute.i for attribute in node.attribute)


def _block(node: onnx.NodeProto) -> str:
    """The part of the network that a node belongs to, by its name (the module's, as ``to_onnx``
    gives it): up to the first number in it, as backbone.blocks.3 or head.fuse.0."""
    parts = node.name.partition("/")[0].split(".")
    for depth, part in enumerate(parts, 1):
        if any(character.isdigit() for character in part):
            return ".".join(parts[:depth])
    return ".".join(parts)


def _shapes(
    graph: onnx.ModelProto, input_name: str, size: tuple[int, int]
) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor for one picture of ``size``, as far as it can be inferred."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(graph)
    del fixed.graph.value_info[:]
    (image,) = (tensor for tensor in fixed.graph.input if tensor.name == input_name)
    for dimension, value in zip(image.type.tensor_type.shape.dim, (1, *size, 3), strict=True):
        dimension.dim_value = value
    for output in fixed.graph.output:
        output.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    return {
        value.name: tuple(dimension.dim_value for dimension in value.type.tensor_type.shape.dim)
        for value in (*inferred.value_info, *inferred.output)
    }


def save(graph: onnx.ModelProto, weights: Path, path: Path, data_name: str) -> None:
    """Write ``graph``, whose external data lies in the folder ``weights``, to ``path``, with its
    own external data beside it in the file ``data_name``. Raises OSError."""
    onnx.load_external_data_for_model(graph, str(weights))
    onnx.save(graph, path, save_as_external_data=True, location=data_name, size_threshold=1024)


def replace(field: Any, items: Sequence[Any]) -> None:
    """Put ``items`` in the place of all that a repeated field holds."""
    del field[:]
    field.extend(items)


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
