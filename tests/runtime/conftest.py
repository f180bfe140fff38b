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

from knet_runtime.bundle import Bundle, write_bundle
from knet_runtime.golden import GOLDEN_NAME, save_golden
from knet_runtime.labels import LabelMap
from knet_runtime.manifest import (
    Artefact,
    InputSpec,
    Licence,
    Manifest,
    OutputSpec,
    Provenance,
    Tolerance,
)

HEIGHT, WIDTH, STRIDE = 16, 24, 4


@pytest.fixture(scope="session")
def colour_model() -> Callable[..., bytes]:
    """Bytes of the ONNX graph: uint8 [B, H, W, 3] ``image`` to float32 [B, 3, h, w] ``logits``."""

    def build(batch: int | str = "B", height: int = HEIGHT, width: int = WIDTH) -> bytes:
        kernel = np.zeros((3, 3, STRIDE, STRIDE), np.float32)
        kernel[np.arange(3), np.arange(3)] = 1 / STRIDE**2
        nodes = [
            helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
            helper.make_node("Conv", ["planes", "kernel"], ["logits"], strides=[STRIDE, STRIDE]),
        ]
        shape = [batch, 3, height // STRIDE, width // STRIDE]
        graph = helper.make_graph(
            nodes,
            "colours",
            [helper.make_tensor_value_info("image", TensorProto.UINT8, [batch, height, width, 3])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
            [numpy_helper.from_array(kernel, "kernel")],
        )
        opsets = [helper.make_opsetid("", 17)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        onnx.checker.check_model(model)
        return bytes(model.SerializeToString())

    return build


@pytest.fixture(scope="session")
def manifest() -> Manifest:
    """The manifest of the colour model, not yet written: its ``files`` are empty."""
    return Manifest(
        name="colours",
        input=InputSpec("image", HEIGHT, WIDTH, "stretch", max_batch=3),
        output=OutputSpec("logits", "logits", STRIDE),
        labels=LabelMap(("red", "green", "blue"), ((255, 0, 0), (0, 255, 0), (0, 0, 255)), 255),
        artefacts=(Artefact(path="model.onnx", tolerance=Tolerance(0.1, 0.5, 0.999, 1e-3)),),
        provenance=Provenance("0" * 64, "none", {"onnx": onnx.__version__}),
        licence=Licence("Apache-2.0", "CC0-1.0", "CC0-1.0"),
    )


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
    """Write a bundle of the colour model; keywords replace manifest fields, ``model`` its bytes."""

    def make(model: bytes | None = None, **changes: Any) -> Bundle:
        changed = msgspec.structs.replace(manifest, **changes)
        files = {"model.onnx": model or colour_model(), GOLDEN_NAME: golden}
        return write_bundle(tmp_path / "colours.knet", changed, files, replace=True)

    return make
