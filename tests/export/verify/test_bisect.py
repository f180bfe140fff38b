"""Planted faults: verify catches each, and bisect names the place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from made_once import made_once
from onnx import helper, numpy_helper

from knet_deploy.cli.main import main
from knet_export.fuse.model import fuse
from knet_export.fuse.precision import to_precision
from knet_export.graph.onnx_graph import OnnxGraph
from knet_export.graph.to_onnx import LOGITS_NAME, WEIGHTS_NAME, export_onnx
from knet_export.verify.align import align
from knet_export.verify.bisect import Bisection, bisect, with_prefix
from knet_runtime.bundle.manifest import Kind
from knet_runtime.bundle.store import Bundle, open_bundle, write_bundle
from knet_runtime.errors import ConfigError
from knet_train.checkpoint import read_checkpoint

CPU = "onnxruntime-cpu"
SIZE = (64, 96)


@pytest.fixture
def plant(small_bundle: Bundle, tmp_path: Path) -> Callable[..., Bundle]:
    """The bundle with a graph changed in its file, its weights inside."""

    def make(change: Callable[[onnx.ModelProto], None], kind: Kind = "logits") -> Bundle:
        path = small_bundle.graph(kind).path
        model = onnx.load(small_bundle.file(path))
        change(model)
        files: dict[str, Any] = {
            name: small_bundle.file(name) for name in small_bundle.manifest.files
        }
        files[path] = model.SerializeToString()
        return write_bundle(tmp_path / "planted.knet", small_bundle.manifest, files)

    return make


def worst_image(streets: Path) -> Path:
    return streets / "images" / "03.png"


def constant(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    (found,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    return found


def look(bad: Bundle, good: Bundle, streets: Path, kind: Kind = "logits") -> Bisection:
    """The good bundle stands for the checkpoint, which takes longer to export."""
    return bisect(bad, kind, good.path, worst_image(streets))


def test_one_changed_weight_is_found_from_the_command_line(
    plant: Callable[..., Bundle],
    small_bundle: Bundle,
    streets: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def change(model: onnx.ModelProto) -> None:
        weight = constant(model, "stages.1.fc_layer.weight")
        values = numpy_helper.to_array(weight).copy()
        values[3, 7] += 4
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))

    words = ["verify", str(plant(change).path), "--against", str(small_bundle.path), "--data"]
    words += [str(streets), "--split", "all", "--engine", CPU, "--graph", "logits", "--bisect"]
    assert main(words) == 1
    answer = capsys.readouterr()
    assert "first tensor outside the tolerance: stages.1.fc_layer/MatMul (module" in answer.out
    assert "its constant stages.1.fc_layer.weight differs in 1 of" in answer.out
    assert "first at [3, 7]" in answer.out
    assert "largest logit difference" in answer.err


def test_bgr_for_rgb_is_found(
    plant: Callable[..., Bundle], small_bundle: Bundle, streets: Path
) -> None:
    def change(model: onnx.ModelProto) -> None:
        first = next(node for node in model.graph.node if "image" in node.input)
        first.input[0] = "flipped"
        model.graph.initializer.append(numpy_helper.from_array(np.array([2, 1, 0]), "order"))
        flip = helper.make_node("Gather", ["image", "order"], ["flipped"], "flip/Gather", axis=3)
        model.graph.node.insert(0, flip)

    found = look(plant(change), small_bundle, streets)
    assert found.tensor == "knet/Transpose"
    assert "BGR" in found.causes[0]
    assert found.causes[1] == "the bundle's graph has, and the reference has not, flip"


def test_align_corners_in_a_resize_is_found(
    plant: Callable[..., Bundle], small_bundle: Bundle, streets: Path
) -> None:
    def change(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.name == "head/Resize_3")
        (mode,) = [one for one in node.attribute if one.name == "coordinate_transformation_mode"]
        mode.s = b"align_corners"

    found = look(plant(change), small_bundle, streets)
    assert (found.tensor, found.module) == ("head/Resize_3", "head")
    (cause,) = found.causes
    assert "coordinate_transformation_mode is 'align_corners'" in cause


def test_align_corners_in_the_class_maps_own_resize_is_found(
    plant: Callable[..., Bundle], small_bundle: Bundle, streets: Path
) -> None:
    def change(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.name == "classmap/Resize")
        (mode,) = [one for one in node.attribute if one.name == "coordinate_transformation_mode"]
        mode.s = b"align_corners"

    bad = plant(change, "classmap")
    words = ["verify", str(bad.path), "--against", str(small_bundle.path), "--data", str(streets)]
    words += ["--split", "all", "--engine", CPU]
    assert main([*words, "--graph", "logits"]) == 0
    assert main([*words, "--graph", "classmap"]) == 1
    found = look(bad, small_bundle, streets, "classmap")
    assert found.tensor == "classmap/Resize"
    assert "'align_corners'" in found.causes[0]


def test_a_missing_stage_is_found(
    small_bundle: Bundle, checkpoint: Path, streets: Path, tmp_path: Path
) -> None:
    manifest = small_bundle.manifest
    loaded = read_checkpoint(checkpoint)
    loaded.model.stages = loaded.model.stages[:-1]
    size = (manifest.input.height, manifest.input.width)
    export_onnx(fuse(loaded.model, size), manifest.input, manifest.graphs[0].outputs, tmp_path)
    files: dict[str, Any] = {name: small_bundle.file(name) for name in manifest.files}
    del files["classmap.onnx"]
    files |= {name: tmp_path / name for name in (LOGITS_NAME, WEIGHTS_NAME)}
    short = msgspec.structs.replace(manifest, graphs=manifest.graphs[:1])
    bad = write_bundle(tmp_path / "short.knet", short, files)
    words = ["verify", str(bad.path), "--against", str(small_bundle.path), "--data", str(streets)]
    assert main([*words, "--split", "all", "--engine", CPU]) == 1
    found = look(bad, small_bundle, streets)
    assert found.tensor is not None
    assert found.tensor not in ("knet/Transpose", "classifier/Add")
    assert found.causes[0] == "the bundle's graph lacks stages.2"
    assert not [cause for cause in found.causes if "stages.0" in cause or "stages.1" in cause]


def test_an_engine_that_fails_on_a_right_graph_is_said_so(
    small_bundle: Bundle, streets: Path
) -> None:
    found = look(small_bundle, small_bundle, streets)
    assert (found.tensor, found.causes) == (None, ())
    (line,) = found.lines("openvino")
    assert "every tensor is inside the tolerance: it is openvino" in line


@pytest.fixture(scope="session")
def half(
    small_bundle: Bundle, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """The checkpoint in fp16, with a layer whose weights lost far more than fp16 loses."""

    def make(folder: Path) -> None:
        manifest = small_bundle.manifest
        size = (manifest.input.height, manifest.input.width)
        fused = to_precision(fuse(read_checkpoint(checkpoint).model, size, pixels=16 * 24), "fp16")
        path = export_onnx(fused, manifest.input, manifest.graphs[0].outputs, folder)
        model = onnx.load(path)
        weight = constant(model, "head.fuse.5.weight")
        values = numpy_helper.to_array(weight).astype(np.float32)
        step = np.abs(values).max() / 2
        coarse = (np.round(values / step) * step).astype(np.float16)
        weight.CopyFrom(numpy_helper.from_array(coarse, weight.name))
        logits = small_bundle.graph("logits")
        limits = msgspec.structs.replace(logits.tolerance, max_logit_diff=0.02)
        graph = msgspec.structs.replace(logits, precision="fp16", tolerance=limits, parity=())
        files: dict[str, Any] = {name: small_bundle.file(name) for name in manifest.files}
        files[LOGITS_NAME] = model.SerializeToString()
        del files["classmap.onnx"]
        lower = msgspec.structs.replace(manifest, graphs=(graph,))
        write_bundle(folder / "half.knet", lower, files)

    return open_bundle(made_once(tmp_path_factory, "coarse-half", make) / "half.knet")


def test_halves_kept_in_fp32_lead_to_the_layer_that_lost_too_much(
    half: Bundle, checkpoint: Path, streets: Path
) -> None:
    steps: list[str] = []
    found = bisect(half, "logits", checkpoint, worst_image(streets), steps.append)
    assert found.tensor == "head.fuse.5/Conv"
    assert "head.fuse.5.weight differs in" in found.causes[0]
    assert found.kept is not None
    assert "the last of them is head.fuse.5/Conv (module head.fuse.5)" in found.kept
    rounds = [step for step in steps if "tensors in fp32" in step]
    assert 5 <= len(rounds) <= 12
    assert "outside" in rounds[0]


def test_a_prefix_may_end_at_any_tensor(half: Bundle) -> None:
    """A node with several outputs, and one whose output is read much later, too."""
    graph = OnnxGraph.load(half.file(LOGITS_NAME))
    aligned = align(graph, graph)
    image = np.zeros((1, *SIZE, 3), np.uint8)
    (wanted,) = graph.run({"image": image}, ["logits"])
    (split,) = [
        number for number, pair in enumerate(aligned.pairs) if pair.reference.name == "knet/Split"
    ]
    for count in (0, 1, split, split + 1, len(aligned.pairs) - 1, len(aligned.pairs)):
        (found,) = with_prefix(graph, graph, aligned, {"image": image}, count)
        np.testing.assert_allclose(found, wanted, atol=2e-2 * np.abs(wanted).max())


def test_fp16_is_bisected_against_the_checkpoint_only(
    half: Bundle, small_bundle: Bundle, streets: Path
) -> None:
    with pytest.raises(ConfigError, match="--against the checkpoint"):
        look(half, small_bundle, streets)


def test_graphs_of_two_precisions_are_laid_beside_each_other_by_module(
    half: Bundle, small_bundle: Bundle
) -> None:
    ours, theirs = (OnnxGraph.load(one.file(LOGITS_NAME)) for one in (small_bundle, half))
    aligned = align(ours, theirs)
    assert all(pair.reference.op_type == pair.found.op_type for pair in aligned.pairs)
    weighted = [node for node in ours.model.graph.node if node.op_type in ("Conv", "MatMul")]
    paired = [pair for pair in aligned.pairs if pair.reference.op_type in ("Conv", "MatMul")]
    assert len(paired) == len(weighted)
    assert all(pair.reference.name == pair.found.name for pair in paired)
