"""A float graph with some of its nodes in int8 or fp16.

The type of every operand stands in the graph. For each chosen convolution or product with a
constant weight W and an input X, int8 is static Q/DQ, as TensorRT, ONNX Runtime and OpenVINO take
it:

    X ── QuantizeLinear ── DequantizeLinear ──┐
    W (int8) ───────────── DequantizeLinear ──┴── Conv / MatMul / Gemm

Weights are int8 per output channel, activations int8 per tensor, both symmetric with a zero point
of 0 (TensorRT takes no other) and -127 … 127. Biases and outputs stay as they are: an engine fuses
the next Q into the convolution before it, and what is not followed by one keeps its precision
(residual sums, normalisations, softmax, the kernels and the products with them).

What int8 would cost too much of can be fp16 on GPUs, at half the price of fp32:

    X ── Cast ── Conv / MatMul / Gemm (W in fp16) ── Cast ── Y
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import isfinite

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from knet_export.graph.onnx_graph import OnnxGraph
from knet_runtime.errors import CheckpointError, ConfigError

_LARGEST = 127
_PRODUCTS = ("Conv", "MatMul", "Gemm")
_OF_KERNELS = ("stages", "class_fc", "fc_class")  # parts of a network that never see a pixel
# int8 units work on 8 channels or more at once; pyramid pooling's matrices have fewer, too.
_MIN_OUTPUTS = 8


@dataclass(frozen=True)
class Weighted:
    """A node that could be int8: a convolution or product of a tensor with a constant weight."""

    name: str
    op: str
    block: str  # the part of the network that it belongs to
    activation: str  # the tensor that would be quantised
    weight: str  # the initializer
    axis: int  # of the weight's output channels
    macs: int  # multiply-adds for one image


def quantisable(graph: OnnxGraph, macs: Mapping[str, int]) -> tuple[Weighted, ...]:
    """The nodes of a float ``graph`` that can be int8, in its order: what has a constant weight and
    works on pixels. ``macs`` are the multiply-adds of the nodes by name.

    What works on the N kernels stays float: it is tiny, and it holds the gates and normalisations.
    """
    weights = {name: tuple(tensor.dims) for name, tensor in graph.constants().items()}
    found = []
    for node in graph.nodes:
        weight = weights.get(node.input[1]) if node.op_type in _PRODUCTS else None
        if weight is None or node.input[0] in weights or _block(node).startswith(_OF_KERNELS):
            continue
        axis = _output_axis(node, len(weight))
        if weight[axis] < _MIN_OUTPUTS:
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
    graph: OnnxGraph, nodes: Iterable[Weighted], thresholds: Mapping[str, float]
) -> OnnxGraph:
    """A copy of ``graph`` with ``nodes`` in int8. ``thresholds`` has the |x| of every activation
    that becomes 127.

    Raises CheckpointError for a threshold or a weight that is no finite number.
    """
    chosen = {node.name: node for node in nodes}
    stored = graph.constants()
    ordered: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    done: dict[str, str] = {}
    for original in graph.nodes:
        node, weighted = deepcopy(original), chosen.get(original.name)
        if weighted is not None:
            if weighted.activation not in done:
                added, tensors = _activation(weighted.activation, thresholds[weighted.activation])
                ordered += added
                constants += tensors
                done[weighted.activation] = added[-1].output[0]
            if weighted.weight not in done:
                values = graph.value(stored[weighted.weight])
                dequantise, tensors = _weight(weighted.weight, values, weighted.axis)
                ordered.append(dequantise)
                constants += tensors
                done[weighted.weight] = dequantise.output[0]
            node.input[0], node.input[1] = done[weighted.activation], done[weighted.weight]
        ordered.append(node)
    return graph.rebuilt(ordered, constants)


def with_halves(graph: OnnxGraph, nodes: Iterable[Weighted]) -> OnnxGraph:
    """A copy of the float32 ``graph`` with ``nodes`` in fp16; between two that follow each other
    nothing is cast. Raises CheckpointError for a weight that fp16 cannot hold."""
    chosen = {node.name for node in nodes}
    stored = graph.constants()
    constants: dict[str, onnx.TensorProto] = {}
    halves: set[str] = set()  # tensors that there are in fp16, too
    ordered: list[onnx.NodeProto] = []
    for original in graph.nodes:
        node = deepcopy(original)
        if node.name not in chosen:
            ordered.append(node)
            continue
        for place, name in enumerate(node.input):
            half = f"{name}_fp16"
            if name in stored:
                if half not in constants:
                    constants[half] = _half(name, half, graph.value(stored[name]))
            elif name not in halves:
                halves.add(name)
                ordered.append(_cast(name, half, TensorProto.FLOAT16))
            node.input[place] = half
        (result,) = node.output
        node.output[0] = f"{result}_fp16"
        halves.add(result)
        ordered += [node, _cast(node.output[0], result, TensorProto.FLOAT)]
    read = {name for node in ordered for name in node.input}
    read.update(output.name for output in graph.model.graph.output)
    return graph.rebuilt(
        [node for node in ordered if not read.isdisjoint(node.output)], constants.values()
    )


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
    turned = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 0 if node.op_type == "Conv" or turned else rank - 1


def _block(node: onnx.NodeProto) -> str:
    """The part of the network that a node belongs to, by its name (the module's, as ``to_onnx``
    gives it): up to the first number in it, as backbone.blocks.3 or head.fuse.0."""
    parts = node.name.partition("/")[0].split(".")
    for depth, part in enumerate(parts, 1):
        if any(character.isdigit() for character in part):
            return ".".join(parts[:depth])
    return ".".join(parts)


def _cast(source: str, target: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], f"{target}_Cast", to=kind)


def _half(name: str, half: str, values: np.ndarray) -> onnx.TensorProto:
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16)
    if not np.isfinite(rounded).all():
        raise CheckpointError(
            f"{name} holds {np.abs(values).max():g}, and fp16 ends at 65,504: "
            "name it with --keep-fp32 instead of --keep-fp16"
        )
    return numpy_helper.from_array(rounded, half)
