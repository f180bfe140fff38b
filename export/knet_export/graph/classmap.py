"""The class-map graph: a logits graph with upsampling and argmax behind it, for GPUs.

It is added to the ONNX file, whatever precision that has, and reads the same file of weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from knet_runtime.bundle.manifest import OutputSpec
from knet_runtime.errors import ConfigError

MAX_CLASSES = 256  # uint8
CLASSMAP_OUTPUT = "classmap"  # the name of the graph's output tensor


def add_classmap_head(logits_graph: Path, classmap_graph: Path, output: OutputSpec) -> None:
    """Write ``classmap_graph``: uint8 [B, H, W] classes at the input's size, from ``logits_graph``
    (float32 [B, N, H/s, W/s]) in the same folder.

    Bilinear with half-pixel centres by the factor s, and the first of equal classes: the map that
    ``knet_runtime.postprocess`` gives. Raises ConfigError for more than 256 classes, OSError when
    it cannot be written.
    """
    model = onnx.load(logits_graph, load_external_data=False)
    graph = model.graph
    (logits,) = graph.output
    dims = logits.type.tensor_type.shape.dim
    if dims[1].dim_value > MAX_CLASSES:
        raise ConfigError(
            f"{dims[1].dim_value} classes do not fit a uint8 class map: only the logits graph "
            "can be exported"
        )
    scales = np.array([1, 1, output.stride, output.stride], np.float32)
    graph.initializer.append(numpy_helper.from_array(scales, "classmap/scales"))
    for operator, inputs, result, attributes in (
        (
            "Resize",
            [output.name, "", "classmap/scales"],
            "classmap/Resize",
            {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
        ),
        ("ArgMax", ["classmap/Resize"], "classmap/ArgMax", {"axis": 1, "keepdims": 0}),
        ("Cast", ["classmap/ArgMax"], CLASSMAP_OUTPUT, {"to": TensorProto.UINT8}),
    ):
        name = f"classmap/{operator}"
        graph.node.append(helper.make_node(operator, inputs, [result], name, **attributes))
    batch, height, width, _ = (
        dim.dim_param or dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim
    )
    graph.value_info.append(logits)
    del graph.output[:]
    graph.output.append(
        helper.make_tensor_value_info(CLASSMAP_OUTPUT, TensorProto.UINT8, [batch, height, width])
    )
    onnx.save(model, classmap_graph)
