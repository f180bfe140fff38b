"""A model of segments that is small enough to reason about: bundles for panoptic and instance.

Three kernels find what is red, green and blue. They are a car (score 0.88), a person (0.62) and, in
the panoptic bundle, road (0.95); the instance bundle has the first two.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from knet_runtime.bundle.manifest import Graph, InputSpec, Manifest, OutputSpec, Tolerance
from knet_runtime.bundle.store import Bundle, write_bundle
from knet_runtime.labels import LabelMap
from knet_runtime.types import Task

HEIGHT, WIDTH, STRIDE = 48, 64, 4
LABELS = LabelMap(
    ("road", "car", "person"), ((128, 64, 128), (0, 0, 142), (220, 20, 60)), 255, things=(1, 2)
)
_CLASS_LOGITS = ((-9, 2, -9), (-9, -9, 0.5), (3, -9, -9))


def _graph(kernels: int, classes: int) -> bytes:
    weight = np.full((3, 3, STRIDE, STRIDE), -1 / STRIDE**2 / 16, np.float32)
    weight[np.arange(3), np.arange(3)] = 1 / STRIDE**2 / 16
    logits = np.float32(_CLASS_LOGITS)[None, :kernels, 3 - classes :]
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "weight"], ["mask_logits"], strides=[STRIDE, STRIDE]),
        helper.make_node("ReduceMax", ["mask_logits", "axes"], ["zero"], keepdims=0),
        helper.make_node("Mul", ["zero", "nought"], ["blank"]),
        helper.make_node("Unsqueeze", ["blank", "last"], ["column"]),
        helper.make_node("Add", ["column", "logits"], ["class_logits"]),
    ]
    value = helper.make_tensor_value_info
    shape = [HEIGHT // STRIDE, WIDTH // STRIDE]
    graph = helper.make_graph(
        nodes,
        "segments",
        [value("image", TensorProto.UINT8, ["B", HEIGHT, WIDTH, 3])],
        [
            value("class_logits", TensorProto.FLOAT, ["B", kernels, classes]),
            value("mask_logits", TensorProto.FLOAT, ["B", kernels, *shape]),
        ],
        [
            numpy_helper.from_array(weight[:kernels], "weight"),
            numpy_helper.from_array(np.int64([2, 3]), "axes"),
            numpy_helper.from_array(np.float32(0), "nought"),
            numpy_helper.from_array(np.int64([2]), "last"),
            numpy_helper.from_array(logits, "logits"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


@pytest.fixture
def make_segment_bundle(tmp_path: Path, manifest: Manifest) -> Callable[[Task], Bundle]:
    """Write the bundle of a task, panoptic or instance. It has no golden tensors."""

    def make(task: Task) -> Bundle:
        kernels, labels = 3, LABELS
        if task == "instance":
            kernels = 2
            labels = LabelMap(LABELS.names[1:], LABELS.palette[1:], 255, things=(0, 1))
        changed = msgspec.structs.replace(
            manifest,
            name=task,
            task=task,
            labels=labels,
            input=InputSpec("image", HEIGHT, WIDTH, "stretch", max_batch=2),
            graphs=(
                Graph(
                    path="model.onnx",
                    outputs=(
                        OutputSpec("class_logits", "class_logits", (kernels, labels.num_classes)),
                        OutputSpec("mask_logits", "mask_logits", (kernels,), STRIDE),
                    ),
                    tolerance=Tolerance(0.1, 0.5, 0.999, 1e-3),
                ),
            ),
        )
        files = {"model.onnx": _graph(kernels, labels.num_classes)}
        return write_bundle(tmp_path / f"{task}.knet", changed, files)

    return make
