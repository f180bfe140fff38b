"""Half precision by size: what is half, what is not, and what is refused before the export."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from made_once import made_once
from onnx import TensorProto, numpy_helper
from torch import nn

from knet_export.fuse.model import FusedKNet, fuse
from knet_export.fuse.precision import ExactNorm, check_finite, to_precision
from knet_export.graph.check import check_onnx, check_structure
from knet_export.graph.to_onnx import LOGITS_NAME, export_onnx
from knet_export.verify.measure import default_tolerance
from knet_runtime.bundle.manifest import InputSpec, OutputSpec
from knet_runtime.errors import CheckpointError
from knet_synthetic import Street
from knet_train.config import Config, load_config
from knet_train.models.build import build_model
from knet_train.models.knet import KNet

SIZE = (64, 96)
PIXELS = SIZE[0] * SIZE[1] // 16
SPEC, OUTPUT = (
    InputSpec("image", *SIZE, max_batch=8),
    OutputSpec("logits", "semantic_logits", (7,), 4),
)


def a_config(*settings: str) -> Config:
    small = ["model.channels=32", "model.update_channels=16", "model.ffn_channels=48"]
    stages = ["model.stages=2", "loss.stage_weights=[1.0, 1.0, 1.0]"]
    return load_config("knet-edge", [*small, *stages, "model.backbone=resnet10t", *settings])


@pytest.fixture
def model() -> KNet:
    torch.manual_seed(4)
    return build_model(a_config().model, 7).eval()


@pytest.fixture(scope="session")
def graph(tmp_path_factory: pytest.TempPathFactory) -> onnx.GraphProto:
    """The fp16 graph, with its weights, after it has passed its check."""

    def make(folder: Path) -> None:
        torch.manual_seed(4)
        model = build_model(a_config().model, 7).eval()
        export_onnx(to_precision(fuse(model, SIZE, pixels=PIXELS), "fp16"), SPEC, (OUTPUT,), folder)
        check_onnx(model, SPEC, OUTPUT, folder, default_tolerance("fp16"))

    folder = made_once(tmp_path_factory, "fp16-graph", make)
    return onnx.shape_inference.infer_shapes(onnx.load(folder / LOGITS_NAME)).graph


def element_types(graph: onnx.GraphProto) -> dict[str, int]:
    values = (*graph.value_info, *graph.input, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def test_pixels_are_half_and_kernels_and_norms_are_not(graph: onnx.GraphProto) -> None:
    types = element_types(graph)
    for node in graph.node:
        got = types[node.output[0]]
        if node.name.startswith(("backbone.", "head.", "classifier")) and node.op_type in (
            "Conv",
            "MatMul",
            "Relu",
            "Add",
            "Resize",
        ):
            assert got == TensorProto.FLOAT16, node.name
        if node.op_type in ("LayerNormalization", "Softmax", "Sigmoid", "ReduceSum"):
            assert got == TensorProto.FLOAT, node.name
        if node.name.startswith("stages."):
            assert got != TensorProto.FLOAT16, node.name
    products = [node for node in graph.node if node.name.startswith("knet/MatMul")]
    assert len(products) == 4  # two stages: a sum over pixels and masks each
    assert {types[node.output[0]] for node in products} == {TensorProto.FLOAT16}
    assert types["image"] == TensorProto.UINT8
    assert types["logits"] == TensorProto.FLOAT


def test_weights_are_stored_in_the_type_they_are_used_in(graph: onnx.GraphProto) -> None:
    types = element_types(graph)
    producers = {name: node for node in graph.node for name in node.output}
    weights = {tensor.name for tensor in graph.initializer}
    assert not [
        node.name for node in graph.node if node.op_type == "Cast" and node.input[0] in weights
    ]
    for name in weights:
        if name.startswith("stages."):
            assert types[name] != TensorProto.FLOAT16, name
        elif name.startswith("backbone.") and name.endswith(".weight"):
            assert types[name] == TensorProto.FLOAT16, name
    assert producers  # the graph was not folded away
    # A float32 weight that went through fp16 on the way would have zeros in its last 13 bits.
    (linear,) = (t for t in graph.initializer if t.name == "stages.1.ffn.0.weight")
    low = np.ascontiguousarray(numpy_helper.to_array(linear)).view(np.uint32) & 0x1FFF
    assert np.count_nonzero(low) > low.size / 2


def test_no_tensor_is_cast_up_and_down_again(graph: onnx.GraphProto) -> None:
    casts = {node.output[0]: node for node in graph.node if node.op_type == "Cast"}
    chained = [node.name for node in casts.values() if node.input[0] in casts]
    assert chained == []
    targets = Counter(node.attribute[0].i for node in casts.values())
    assert targets[TensorProto.FLOAT16] > 0, "nothing is half"


def test_bf16_is_valid_onnx_of_bf16(model: KNet, tmp_path: Path) -> None:
    export_onnx(to_precision(fuse(model, SIZE), "bf16"), SPEC, (OUTPUT,), tmp_path)
    check_structure(tmp_path)
    graph = onnx.load(tmp_path / LOGITS_NAME).graph
    types = Counter(tensor.data_type for tensor in graph.initializer)
    assert types[TensorProto.BFLOAT16] > types[TensorProto.FLOAT16] == 0


@torch.no_grad()
def test_the_half_forms_are_near_the_trained_model(model: KNet) -> None:
    images = torch.from_numpy(np.stack([Street(seed, SIZE).frame(0)[0] for seed in range(2)]))
    expected = model(images)
    for precision, tolerance in (("fp16", 0.01), ("bf16", 0.1)):
        fused = to_precision(fuse(model, SIZE, pixels=PIXELS), precision)  # type: ignore[arg-type]
        got = fused(images)
        assert got.dtype == torch.float32
        assert float((got - expected).abs().max() / expected.abs().max()) <= tolerance
        assert float((got - expected).abs().max()) > 0, "nothing was rounded"


def test_every_norm_of_swin_stays_in_float32() -> None:
    torch.manual_seed(0)
    small = ["model.channels=32", "model.update_channels=32", "model.ffn_channels=48"]
    model = build_model(load_config("swin-t-upernet", small).model, 7).eval()
    fused = to_precision(fuse(model, SIZE), "fp16")
    exact = [module.norm for module in fused.modules() if isinstance(module, ExactNorm)]
    norms = [m for m in fused.backbone.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == len(exact) == 1 + 2 * 12 + 3 + 4  # patches, blocks, mergings, levels
    assert all(norm.weight.dtype == torch.float32 for norm in norms)
    assert _dtypes(fused, "softmax.bias") == {torch.float32}
    assert _dtypes(fused, "qkv.weight") == {torch.float16}


def _dtypes(fused: FusedKNet, suffix: str) -> set[torch.dtype]:
    return {weight.dtype for name, weight in fused.state_dict().items() if name.endswith(suffix)}


def test_a_weight_that_fp16_can_not_hold_is_named(model: KNet) -> None:
    with torch.no_grad():
        model.head.laterals[1][0].weight[3, 2] = 1e6  # type: ignore[index,union-attr]
    with pytest.raises(CheckpointError, match=r"head\.laterals\.1\.0\.weight .* bf16 or fp32"):
        to_precision(fuse(model, SIZE), "fp16")
    to_precision(fuse(model, SIZE), "bf16")


def test_an_overflow_that_comes_from_folding_a_norm_is_named(model: KNet) -> None:
    norm = model.head.laterals[1][1]  # type: ignore[index,union-attr]
    norm.running_var[4] = 1e-30  # a channel that never varied
    norm.eps = 1e-20
    with pytest.raises(CheckpointError, match=r"head\.laterals\.1\.0\.weight"):
        to_precision(fuse(model, SIZE), "fp16")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(model: KNet, value: float) -> None:
    check_finite(model, "best.safetensors")
    with torch.no_grad():
        model.stages[1].attention.out_proj.bias[2] = value
    with pytest.raises(CheckpointError, match=r"best.*: stages\.1\.attention\.out_proj\.bias"):
        check_finite(model, "best.safetensors")
