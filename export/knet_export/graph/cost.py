"""What an ONNX graph costs: the multiply-adds of its convolutions and matrix products, and their
traffic.

These are nearly all of a network's work. The traffic is the least there can be when everything
else is fused into them: each of them reads its inputs and writes its output once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import msgspec
import onnx
from onnx import TensorProto, helper

from knet_export.graph.onnx_graph import OnnxGraph
from knet_runtime.errors import BundleError
from knet_runtime.types import Size

_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
Shape = tuple[int, ...]


class Cost(msgspec.Struct, frozen=True):
    """Multiply-adds for one image, and the bytes that are read and written at least, each once."""

    multiply_adds: int
    bytes: int


def count_cost(graph: Path, size: Size) -> Cost:
    """The cost of an ONNX file for one image of ``size`` (height, width). Raises BundleError where
    a shape cannot be found from the graph alone."""
    costs = [cost for _, cost in node_costs(OnnxGraph.load(graph), size)]
    return Cost(sum(cost.multiply_adds for cost in costs), sum(cost.bytes for cost in costs))


def node_costs(graph: OnnxGraph, size: Size) -> Iterator[tuple[str, Cost]]:
    """The name and the cost of every convolution and matrix product, for one image of ``size``
    (height, width). Raises BundleError as ``count_cost``."""
    inferred = _with_shapes(graph.model, size)
    shapes, bytes_each = _tensors(inferred)
    for node in inferred.node:
        if node.op_type not in _PRODUCTS:
            continue
        names = [name for name in (*node.input, *node.output) if name]
        unknown = [name for name in names if name not in shapes]
        if unknown:
            raise BundleError(
                f"the shape of {unknown[0]} depends on values, so the cost of {node.name or 'a'} "
                f"{node.op_type} is not known"
            )
        traffic = sum(math.prod(shapes[name]) * bytes_each[name] for name in names)
        yield node.name, Cost(_multiply_adds(node, shapes), traffic)


def _with_shapes(model: onnx.ModelProto, size: Size) -> onnx.GraphProto:
    """The graph for one image of ``size``, with the shape of every tensor that can be known."""
    from onnxscript import ir, optimizer

    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    dims = fixed.graph.input[0].type.tensor_type.shape.dim
    for dim, side in zip(dims, (1, *size), strict=False):
        dim.dim_value = side
    # What was inferred for free sizes would stand in the way.
    del fixed.graph.value_info[:]
    for output in fixed.graph.output:
        for dim in output.type.tensor_type.shape.dim:
            dim.Clear()
    # Shapes that are computed in the graph are constants now that the size is one.
    folded = ir.from_proto(fixed)
    optimizer.fold_constants(folded, onnx_shape_inference=True)
    return onnx.shape_inference.infer_shapes(ir.to_proto(folded), data_prop=True).graph


def _tensors(graph: onnx.GraphProto) -> tuple[dict[str, Shape], dict[str, int]]:
    """By name: the shape of every tensor that has a known one, and the bytes of one number."""
    shapes: dict[str, Shape] = {}
    types: dict[str, int] = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        if all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            shapes[value.name] = tuple(dim.dim_value for dim in tensor.shape.dim)
            types[value.name] = tensor.elem_type
    for constant in graph.initializer:
        shapes[constant.name], types[constant.name] = tuple(constant.dims), constant.data_type
    sizes = {name: _bytes(kind) for name, kind in types.items()}
    for node in graph.node:  # what is stored is the integer; the float between is in registers
        if node.op_type == "DequantizeLinear":
            sizes[node.output[0]] = sizes[node.input[0]]
        elif node.op_type == "QuantizeLinear":
            sizes[node.input[0]] = sizes[node.output[0]]
    return shapes, sizes


def _bytes(element: int) -> int:
    if element == TensorProto.BFLOAT16:
        return 2
    return int(helper.tensor_dtype_to_np_dtype(element).itemsize)


def _multiply_adds(node: onnx.NodeProto, shapes: dict[str, Shape]) -> int:
    left, right, out = shapes[node.input[0]], shapes[node.input[1]], shapes[node.output[0]]
    match node.op_type:
        case "Conv":  # each output number: one group's input channels times the window
            return math.prod(out) * math.prod(right[1:])
        case "ConvTranspose":  # each input number goes to its group's output channels
            return math.prod(left) * math.prod(right[1:])
        case "Gemm":
            turned = any(item.name == "transA" and item.i for item in node.attribute)
            return math.prod(out) * left[0 if turned else 1]
        case _:
            return math.prod(out) * left[-1]
