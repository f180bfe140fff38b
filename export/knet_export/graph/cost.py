"""What a graph costs: the multiply-adds of its convolutions and matrix products, and their traffic.

These are nearly all of a network's work. The traffic is the least there can be when everything
else is fused into them: each of them reads its inputs and writes its output once.
"""

from __future__ import annotations

import math
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from knet_runtime.bench.contest import Cost
from knet_runtime.errors import BundleError

_NAMED = ("batch", "height", "width")
Shape = tuple[int, ...]


def count_cost(graph: Path, size: tuple[int, int]) -> Cost:
    """For one picture of ``size`` (height, width). Raises BundleError where a shape can not be
    found from the graph alone."""
    model = onnx.load(graph, load_external_data=False)
    _fix_input(model, size)
    # Shapes that are computed in the graph are followed through it (data_prop).
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    shapes, bytes_each = _tensors(model.graph)
    multiply_adds = traffic = 0
    for node in model.graph.node:
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        names = [name for name in (*node.input, *node.output) if name]
        unknown = [name for name in names if name not in shapes]
        if unknown:
            raise BundleError(
                f"{graph}: the shape of {unknown[0]} depends on values, so its cost is not known"
            )
        multiply_adds += _multiply_adds(node, shapes)
        traffic += sum(math.prod(shapes[name]) * bytes_each[name] for name in names)
    return Cost(multiply_adds, traffic)


def _fix_input(model: onnx.ModelProto, size: tuple[int, int]) -> None:
    values = dict(zip(_NAMED, (1, *size), strict=True))
    dims = model.graph.input[0].type.tensor_type.shape.dim
    for name, dim in zip(_NAMED, dims, strict=False):
        dim.dim_value = values[name]
    # What was inferred for free sizes would stand in the way.
    del model.graph.value_info[:]
    for output in model.graph.output:
        for dim in output.type.tensor_type.shape.dim:
            dim.Clear()


def _tensors(graph: onnx.GraphProto) -> tuple[dict[str, Shape], dict[str, int]]:
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
