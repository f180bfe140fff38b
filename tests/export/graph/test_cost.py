"""Multiply-adds and traffic of a graph, against counts by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from knet_export.graph.cost import count_cost
from knet_runtime.bundle.store import Bundle
from knet_runtime.errors import BundleError


def write(
    path: Path, nodes: list[onnx.NodeProto], weights: dict[str, tuple[int, ...]], out: str
) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "height", "width", 3])],
        [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.zeros(v, np.float32), k) for k, v in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    return path


def test_convolutions_are_counted_with_groups_and_strides(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["x"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "w"], ["y"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["y", "depthwise"], ["z"], group=6, pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["z"], ["r"]),
        helper.make_node("ConvTranspose", ["r", "up"], ["out"], strides=[2, 2]),
    ]
    weights = {"w": (6, 3, 3, 3), "depthwise": (6, 1, 3, 3), "up": (6, 5, 2, 2)}
    found = count_cost(write(tmp_path / "g.onnx", nodes, weights, "out"), (8, 12))
    half = 4 * 6
    assert found.multiply_adds == half * 6 * 27 + half * 6 * 9 + half * 6 * 5 * 4
    numbers = (8 * 12 * 3 + 162 + half * 6) + (half * 6 + 54 + half * 6)
    assert found.bytes == 4 * (numbers + half * 6 + 120 + 8 * 12 * 5)


def test_matrix_products_are_counted_through_computed_shapes(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "first"], ["b"]),
        helper.make_node("Concat", ["b", "rest"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["x", "wanted"], ["rows"]),
        helper.make_node("MatMul", ["rows", "w"], ["y"]),
        helper.make_node("Flatten", ["y"], ["flat"]),
        helper.make_node("Gemm", ["flat", "v"], ["out"], transB=1),
    ]
    path = write(tmp_path / "g.onnx", nodes, {"w": (3, 7), "v": (2, 4 * 5 * 7)}, "out")
    model = onnx.load(path)
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array([0]), "first"),
            numpy_helper.from_array(np.array([-1, 3]), "rest"),
        ]
    )
    onnx.save(model, path)
    assert count_cost(path, (4, 5)).multiply_adds == 20 * 3 * 7 + 140 * 2


def test_shapes_that_depend_on_values_are_refused_by_name(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["found"]),
        helper.make_node("Cast", ["found"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["w", "numbers"], ["out"]),
    ]
    with pytest.raises(BundleError, match="the shape of numbers depends on values"):
        count_cost(write(tmp_path / "g.onnx", nodes, {"w": (2, 4)}, "out"), (4, 5))


def test_a_graph_of_free_sizes_costs_at_a_size_what_the_graph_of_that_size_does(
    small_bundle: Bundle, free_bundle: Bundle
) -> None:
    free, fixed = (
        count_cost(bundle.file("logits.onnx"), small_bundle.manifest.input.size)
        for bundle in (free_bundle, small_bundle)
    )
    assert free.multiply_adds == fixed.multiply_adds


def test_integers_are_what_a_quantised_graph_moves(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("MatMul", ["d", "w"], ["out"]),
    ]
    path = write(tmp_path / "g.onnx", nodes, {"w": (3, 7), "scale": ()}, "out")
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((), np.int8), "zero"))
    onnx.save(model, path)
    found = count_cost(path, (4, 5))
    assert found.bytes == 4 * 5 * 3 + 4 * (3 * 7 + 4 * 5 * 7)
