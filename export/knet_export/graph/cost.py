"""What a graph costs: the multiply-adds of its convolutions and matrix products, and their traffic.

These are nearly all of a network's work. The traffic is the least there can be when everything
else is fused into them: each of them reads its inputs and writes its output once.

Multiply-adds of a K-Net, as published and in its deploy form, and where they are.

Counted are convolutions and matrix products, which are nearly all of the work; the networks are
run without numbers (PyTorch's "meta" device), so a large one costs no more than a small one.
"""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import onnx
import torch
from onnx import TensorProto, helper
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from knet_export.fuse.model import fuse
from knet_runtime.errors import BundleError
from knet_runtime.types import Size
from knet_train.config import Config
from knet_train.models.build import build_model
from knet_train.models.knet import KNet

_NAMED = ("batch", "height", "width")
Shape = tuple[int, ...]


class Cost(msgspec.Struct, frozen=True):
    """What a graph costs for one picture: multiply-adds of its convolutions and matrix products,
    and the bytes that these read and write at least, each once."""

    multiply_adds: int
    bytes: int


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


class Operations(msgspec.Struct, frozen=True):
    """Multiply-adds for one picture of ``size``: as published and deployed, each in all and without
    backbone and head (``kernels``: initial masks and update stages)."""

    preset: str
    size: Size
    published: int
    published_kernels: int
    deployed: int
    deployed_kernels: int


def count_operations(config: Config, classes: int, size: Size) -> Operations:
    """Count for a K-Net of ``classes`` classes, on one picture of ``size`` (height, width)."""
    with torch.device("meta"):
        model = build_model(config.model, classes).eval().requires_grad_(False)
    image = torch.zeros(1, *size, 3, dtype=torch.uint8, device="meta")
    form = fuse(model, size)
    total, kernels = _count(model, image)
    moved = _transforms(model, size, config.model.stride)
    return Operations(config.preset, size, total + moved, kernels + moved, *_count(form, image))


def _transforms(model: KNet, size: Size, stride: int) -> int:
    """What a published network does more than ours: its feature transforms work on pixels, ours
    (``knet_train.models.knet``) on the kernels, once for the sums and once for the masks."""
    kernels, channels = model.conv_seg.weight.shape[:2]
    pixels = size[0] * size[1] // stride**2
    return len(model.stages) * int(channels) ** 2 * (pixels - 2 * int(kernels))


@torch.no_grad()
def _count(network: nn.Module, image: torch.Tensor) -> tuple[int, int]:
    """All multiply-adds, and those outside of backbone and head."""
    with FlopCounterMode(display=False) as counter:
        network(image)
    parts = counter.get_flop_counts()
    name = type(network).__name__
    features = sum(sum(parts[f"{name}.{part}"].values()) for part in ("backbone", "head"))
    total = counter.get_total_flops()  # it counts an addition and a multiplication
    return total // 2, (total - features) // 2


def operations_row(counted: Operations) -> str:
    """A row of the table in docs/results/models.md: giga multiply-adds, before and after."""
    giga = [
        f"{count / 1e9:.1f}"
        for count in (
            counted.published,
            counted.deployed,
            counted.published_kernels,
            counted.deployed_kernels,
        )
    ]
    height, width = counted.size
    saved = 1 - counted.deployed / counted.published
    return (
        f"| {counted.preset} | {height}×{width} | {giga[0]} | {giga[1]} | −{100 * saved:.1f} % | "
        f"{giga[2]} | {giga[3]} |"
    )
