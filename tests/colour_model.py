"""A real model that is small enough to reason about, and bundles made of it.

The "colour model" has three classes, red, green and blue: its logits are the means of the channels
over stride × stride pixels. So what it must answer can be said without running it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from knet_runtime.bundle.manifest import (
    Graph,
    InputSpec,
    Licence,
    Manifest,
    OutputSpec,
    Parity,
    Provenance,
    Tolerance,
)
from knet_runtime.bundle.store import Bundle, write_bundle
from knet_runtime.engines.hardware import processor_name
from knet_runtime.golden import GOLDEN_NAME, save_golden
from knet_runtime.labels import LabelMap

HEIGHT, WIDTH, STRIDE = 16, 24, 4


@pytest.fixture(scope="session")
def colour_model() -> Callable[..., bytes]:
    """Bytes of the ONNX graph: uint8 [B, H, W, 3] ``image`` to float32 [B, 3, h, w] ``logits``, or
    with ``kind`` "classmap" to uint8 [B, H, W] ``classmap``. ``height`` and ``width`` may be free.
    """

    def build(
        batch: int | str = "B",
        height: int | str = HEIGHT,
        width: int | str = WIDTH,
        kind: str = "logits",
        element: int = TensorProto.FLOAT,
    ) -> bytes:
        kernel = np.zeros((3, 3, STRIDE, STRIDE), np.float32)
        kernel[np.arange(3), np.arange(3)] = 1 / STRIDE**2
        nodes = [
            helper.make_node("Cast", ["image"], ["float"], to=element),
            helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
            helper.make_node("Cast", ["kernel"], ["weight"], to=element),
            helper.make_node("Conv", ["planes", "weight"], ["scores"], strides=[STRIDE, STRIDE]),
            helper.make_node("Cast", ["scores"], ["logits"], to=TensorProto.FLOAT),
            helper.make_node(
                "Resize",
                ["logits", "", "scales"],
                ["large"],
                mode="linear",
                coordinate_transformation_mode="half_pixel",
            ),
            helper.make_node("ArgMax", ["large"], ["best"], axis=1, keepdims=0),
            helper.make_node("Cast", ["best"], ["classmap"], to=TensorProto.UINT8),
        ]
        low = [
            side // STRIDE if isinstance(side, int) else f"low_{side}" for side in (height, width)
        ]
        output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 3, *low])
        if kind == "classmap":
            output = helper.make_tensor_value_info(
                "classmap", TensorProto.UINT8, [batch, height, width]
            )
        graph = helper.make_graph(
            nodes if kind == "classmap" else nodes[:5],
            "colours",
            [helper.make_tensor_value_info("image", TensorProto.UINT8, [batch, height, width, 3])],
            [output],
            [
                numpy_helper.from_array(kernel, "kernel"),
                numpy_helper.from_array(np.float32([1, 1, STRIDE, STRIDE]), "scales"),
            ],
        )
        opsets = [helper.make_opsetid("", 22)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        onnx.checker.check_model(model)
        return bytes(model.SerializeToString())

    return build


@pytest.fixture(scope="session")
def manifest() -> Manifest:
    """The manifest of the colour model, not yet written: its ``files`` are empty."""
    return Manifest(
        name="colours",
        input=InputSpec("image", HEIGHT, WIDTH, "stretch", max_batch=3),
        labels=LabelMap(("red", "green", "blue"), ((255, 0, 0), (0, 255, 0), (0, 0, 255)), 255),
        graphs=(
            Graph(
                path="model.onnx",
                outputs=(OutputSpec("logits", "semantic_logits", (3,), STRIDE),),
                tolerance=Tolerance(0.1, 0.5, 0.999, 1e-3),
            ),
        ),
        provenance=Provenance("0" * 64, "none", {"onnx": onnx.__version__}),
        licence=Licence("Apache-2.0", "CC0-1.0", "CC0-1.0"),
    )


@pytest.fixture
def parity() -> Callable[..., Parity]:
    """What verify would record on ``engine``; by default on this machine's processor."""

    def measure(engine: str, passed: bool = True, device: str | None = None) -> Parity:
        return Parity(
            engine=engine,
            device=device or processor_name(),
            passed=passed,
            miou_reference=None,
            miou_measured=None,
            delta_miou=None,
            worst_class_delta_iou=None,
            agreement=1.0,
            max_logit_diff=0.0,
            images=1,
            data="pictures",
        )

    return measure


@pytest.fixture
def golden(tmp_path: Path) -> bytes:
    """A ``golden.npz`` of five pictures, its logits computed without the model."""
    images = np.random.default_rng(0).integers(0, 256, (5, HEIGHT, WIDTH, 3)).astype(np.uint8)
    blocks = images.reshape(5, HEIGHT // STRIDE, STRIDE, WIDTH // STRIDE, STRIDE, 3)
    logits = blocks.mean((2, 4)).transpose(0, 3, 1, 2).astype(np.float32)
    save_golden(tmp_path / "saved.npz", images, logits)
    return (tmp_path / "saved.npz").read_bytes()


@pytest.fixture
def make_bundle(
    tmp_path: Path, manifest: Manifest, golden: bytes, colour_model: Callable[..., bytes]
) -> Callable[..., Bundle]:
    """Write a bundle of the colour model; keywords replace manifest fields, ``model`` its bytes,
    ``classmap`` adds that graph, and ``precision`` is what the manifest is to say."""

    def make(
        model: bytes | None = None,
        classmap: bytes | None = None,
        precision: str = "fp32",
        **changes: Any,
    ) -> Bundle:
        changed = msgspec.structs.replace(manifest, **changes)
        files = {"model.onnx": model or colour_model(), GOLDEN_NAME: golden}
        logits = msgspec.structs.replace(changed.graphs[0], precision=precision)
        graphs = [logits]
        if classmap is not None:
            files["classmap.onnx"] = classmap
            output = OutputSpec("classmap", "class_map", stride=1)
            graphs.append(
                msgspec.structs.replace(
                    logits, path="classmap.onnx", kind="classmap", outputs=(output,)
                )
            )
        changed = msgspec.structs.replace(changed, graphs=tuple(graphs))
        return write_bundle(tmp_path / "colours.knet", changed, files, replace=True)

    return make
