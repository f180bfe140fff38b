"""The graphs that are written: their names, axes and types, and the check that finds faults."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from made_once import made_once
from torch import nn

from knet_export.fuse.model import fuse
from knet_export.fuse.precision import to_precision
from knet_export.graph.check import check_onnx, check_structure
from knet_export.graph.classmap import add_classmap_head
from knet_export.graph.to_onnx import CLASSMAP_NAME, LOGITS_NAME, WEIGHTS_NAME, export_onnx
from knet_export.spec import size_range
from knet_export.verify.measure import default_tolerance
from knet_runtime.bundle.manifest import InputSpec, OutputSpec
from knet_runtime.errors import ConfigError, ParityError
from knet_synthetic import Street
from knet_train.config import Config, load_config
from knet_train.models.build import build_model
from knet_train.models.knet import KNet

SIZE = (64, 96)
OUTPUT = OutputSpec("logits", "semantic_logits", (7,), 4)
SPEC = InputSpec("image", *SIZE, max_batch=8)
FP32 = default_tolerance("fp32")


def a_config(*settings: str) -> Config:
    """A K-Net small enough to be traced in seconds, with two stages: a first one and another."""
    return load_config(
        "knet-edge",
        [
            "model.backbone=resnet10t",
            "model.channels=32",
            "model.update_channels=16",
            "model.ffn_channels=48",
            "model.stages=2",
            "loss.stage_weights=[1.0, 1.0, 1.0]",
            f"data.eval_size={list(SIZE)}",
            *settings,
        ],
    )


@torch.no_grad()
def a_knet(*settings: str, config: Config | None = None) -> KNet:
    """Untrained, but it sees several classes: one map for every image would hide most faults."""
    torch.manual_seed(4)
    model = build_model((config or a_config(*settings)).model, 7).eval()
    nn.init.normal_(model.conv_seg.weight)
    images = textured(2)
    features = model.head(model.levels(images))
    for stage in model.stages:
        assert stage.feat_transform.bias is not None
        stage.feat_transform.bias -= stage.feat_transform(features).mean((0, 2, 3))
    assert len(model(images).argmax(1).unique()) >= 4
    return model


def textured(count: int) -> torch.Tensor:
    images = [Street(seed, SIZE).frame(0)[0] for seed in range(count)]
    return torch.from_numpy(np.stack(images))


@pytest.fixture(scope="module")
def model() -> KNet:
    return a_knet()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Graphs of one size."""

    def make(folder: Path) -> None:
        graph = export_onnx(fuse(a_knet(), SIZE), SPEC, (OUTPUT,), folder)
        add_classmap_head(graph, folder / CLASSMAP_NAME, OUTPUT)

    return made_once(tmp_path_factory, "static", make)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Callable[[Callable[[onnx.ModelProto], None]], Path]:
    """The graphs with the one of logits changed."""

    def change(edit: Callable[[onnx.ModelProto], None]) -> Path:
        for name in (LOGITS_NAME, CLASSMAP_NAME, WEIGHTS_NAME):
            (tmp_path / name).write_bytes((folder / name).read_bytes())
        graph = onnx.load(tmp_path / LOGITS_NAME, load_external_data=False)
        edit(graph)
        onnx.save(graph, tmp_path / LOGITS_NAME)
        return tmp_path

    return change


def axes(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_the_graphs_are_the_model_at_other_batches_and_contents(model: KNet, folder: Path) -> None:
    check_onnx(model, SPEC, OUTPUT, folder, FP32)


def test_both_graphs_read_one_file_of_weights_and_hold_none(folder: Path) -> None:
    for name in (LOGITS_NAME, CLASSMAP_NAME):
        graph = onnx.load(folder / name, load_external_data=False).graph
        places = {
            entry.value
            for tensor in graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert places == {WEIGHTS_NAME}
        inside = [tensor for tensor in graph.initializer if not tensor.external_data]
        assert max(tensor.ByteSize() for tensor in inside) < 1200
        assert (folder / name).stat().st_size < 500_000


def test_the_graph_is_static_in_size_free_in_batch_and_carries_no_paths(folder: Path) -> None:
    model = onnx.load(folder / LOGITS_NAME, load_external_data=False)
    assert axes(model.graph.input[0]) == ["batch", *SIZE, 3]
    assert axes(model.graph.output[0]) == ["batch", 7, SIZE[0] // 4, SIZE[1] // 4]
    classmap = onnx.load(folder / CLASSMAP_NAME, load_external_data=False).graph
    assert axes(classmap.output[0]) == ["batch", *SIZE]
    assert [output.name for output in classmap.output] == ["classmap"]
    assert {opset.version for opset in model.opset_import if opset.domain == ""} == {18}
    operators = {node.op_type for node in model.graph.node}
    assert not operators & {"Loop", "If", "Scan"}, "kernels are one batched product"
    assert "BatchNormalization" not in operators
    text = model.SerializeToString()
    assert str(Path(__file__).parents[3]).encode() not in text
    assert b"site-packages" not in text


def test_nodes_and_weights_are_named_after_their_modules(folder: Path, model: KNet) -> None:
    graph = onnx.load(folder / LOGITS_NAME, load_external_data=False).graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    modules = {name for name, _ in fuse(model, SIZE).named_modules()} | {"knet"}
    assert {name.partition("/")[0] for name in names} <= modules
    assert "backbone.conv1.0/Conv" in names
    assert "stages.1.gather.linear.weight" in {tensor.name for tensor in graph.initializer}


def test_pooling_at_one_size_leaves_no_matrix_to_compute_and_a_batch_can_be_one(
    tmp_path: Path,
) -> None:
    model = a_knet("model.head=uper")
    spec = msgspec.structs.replace(SPEC, max_batch=1)
    export_onnx(fuse(model, SIZE), spec, (OUTPUT,), tmp_path)
    check_onnx(model, spec, OUTPUT, tmp_path, FP32)
    graph = onnx.load(tmp_path / LOGITS_NAME, load_external_data=False).graph
    assert axes(graph.input[0]) == [1, *SIZE, 3]
    assert not {node.op_type for node in graph.node} & {"Range", "Greater", "Less", "And"}


def test_height_and_width_can_be_free(tmp_path: Path) -> None:
    model = a_knet("model.head=uper")
    spec = msgspec.structs.replace(SPEC, sizes=size_range((64, 32), (512, 1024)))
    graph = export_onnx(fuse(model, None), spec, (OUTPUT,), tmp_path)
    add_classmap_head(graph, tmp_path / CLASSMAP_NAME, OUTPUT)
    check_onnx(model, spec, OUTPUT, tmp_path, FP32)
    for name, result in ((LOGITS_NAME, (3, 7, 18, 34)), (CLASSMAP_NAME, (3, 72, 136))):
        session = ort.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"])
        (got,) = session.run(None, {"image": np.zeros((3, 72, 136, 3), np.uint8)})
        assert got.shape == result


def test_graphs_of_other_weights_are_caught(model: KNet, folder: Path) -> None:
    other = a_knet()
    with torch.no_grad():
        other.stages[1].fc_mask.weight[:, :8] *= -1
    with pytest.raises(ParityError, match="differs from PyTorch by"):
        check_onnx(other, SPEC, OUTPUT, folder, FP32)


def test_an_output_of_another_name_is_caught(
    model: KNet, copied: Callable[[Callable[[onnx.ModelProto], None]], Path]
) -> None:
    def rename(graph: onnx.ModelProto) -> None:
        graph.graph.node[-1].output[0] = graph.graph.output[0].name = "scores"

    with pytest.raises(ParityError, match="gives scores, not logits"):
        check_onnx(model, SPEC, OUTPUT, copied(rename), FP32)


def test_a_frozen_batch_is_caught(
    model: KNet, copied: Callable[[Callable[[onnx.ModelProto], None]], Path]
) -> None:
    def freeze(graph: onnx.ModelProto) -> None:
        """As an export that took the traced batch for a constant."""
        last = graph.graph.node[-1]
        assert last.op_type == "Reshape"
        shape = np.array([2, 7, SIZE[0] // 4, SIZE[1] // 4], np.int64)
        graph.graph.initializer.append(onnx.numpy_helper.from_array(shape, "frozen"))
        last.input[1] = "frozen"
        graph.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 2

    with pytest.raises(ParityError, match=r"with a batch of 1 .* does not run"):
        check_onnx(model, SPEC, OUTPUT, copied(freeze), FP32)


def test_a_classmap_head_with_other_corners_is_caught(
    model: KNet, folder: Path, tmp_path: Path
) -> None:
    for name in (LOGITS_NAME, CLASSMAP_NAME, WEIGHTS_NAME):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    graph = onnx.load(tmp_path / CLASSMAP_NAME, load_external_data=False)
    (resize,) = (node for node in graph.graph.node if node.name == "classmap/Resize")
    for attribute in resize.attribute:
        if attribute.name == "coordinate_transformation_mode":
            attribute.s = b"align_corners"
    onnx.save(graph, tmp_path / CLASSMAP_NAME)
    with pytest.raises(ParityError, match="gives other classes"):
        check_onnx(model, SPEC, OUTPUT, tmp_path, FP32)


def test_a_graph_that_is_not_onnx_is_caught(
    copied: Callable[[Callable[[onnx.ModelProto], None]], Path],
) -> None:
    def cut(graph: onnx.ModelProto) -> None:
        del graph.graph.node[5]

    with pytest.raises(ParityError, match=r"logits\.onnx is no valid ONNX"):
        check_structure(copied(cut))


def test_more_classes_than_a_byte_holds_have_no_classmap_graph(tmp_path: Path) -> None:
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["image"], ["logits"])],
        "g",
        [onnx.helper.make_tensor_value_info("image", 1, ["batch", 257, 4, 4])],
        [onnx.helper.make_tensor_value_info("logits", 1, ["batch", 257, 4, 4])],
    )
    onnx.save(onnx.helper.make_model(graph), tmp_path / LOGITS_NAME)
    with pytest.raises(ConfigError, match="257 classes"):
        add_classmap_head(tmp_path / LOGITS_NAME, tmp_path / CLASSMAP_NAME, OUTPUT)
    assert not (tmp_path / CLASSMAP_NAME).exists()


@pytest.mark.slow
def test_swin_exports_at_a_fixed_size(tmp_path: Path) -> None:
    small = ["model.channels=32", "model.update_channels=32", "model.ffn_channels=48"]
    small += ["model.stages=1", "loss.stage_weights=[1.0, 1.0]"]
    model = a_knet(config=load_config("swin-t-upernet", small))
    del model.backbone.layers[2].blocks[2:]  # four more of the same two blocks
    fused = fuse(model, SIZE, pixels=SIZE[0] * SIZE[1] // 16)
    export_onnx(to_precision(fused, "fp16"), SPEC, (OUTPUT,), tmp_path)
    check_onnx(model, SPEC, OUTPUT, tmp_path, default_tolerance("fp16"))
