"""Checkpoints for instances and panoptic segmentation become bundles that find the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import msgspec
import numpy as np
import onnx
import pytest
import torch
from made_once import made_once
from numpy.typing import NDArray
from small_segments import SIZE
from traced import traced_before

from knet_deploy.cli.main import main
from knet_export.data import open_images
from knet_export.export import export_bundle
from knet_export.fuse.segments import fuse_segments
from knet_export.graph.check import check_segments
from knet_export.graph.onnx_graph import OnnxGraph
from knet_export.graph.to_onnx import LOGITS_NAME, export_onnx
from knet_export.int8.search import QUANTISATION_NAME, Quantisation, quantise_within
from knet_export.spec import export_spec, segment_graphs, size_range
from knet_export.verify.measure import segment_tolerance
from knet_runtime.bundle.manifest import Manifest, SegmentRules
from knet_runtime.bundle.store import Bundle, open_bundle, write_bundle
from knet_runtime.engines import open_engine
from knet_runtime.errors import ConfigError, DataError, ParityError
from knet_runtime.golden import GOLDEN_NAME, check_at_start, load_golden, replay, save_golden
from knet_runtime.postprocess import instances, panoptic
from knet_runtime.preprocess import fit_to_input
from knet_runtime.segmenter import Segmenter
from knet_synthetic import Street
from knet_train.checkpoint import read_segment_checkpoint
from knet_train.config import load_config
from knet_train.data.layouts import COCO, COCO_THINGS
from knet_train.inference import predict_segment_logits
from knet_train.models.build import build_segment_model

# Masks of random weights lie over one another: at 0.6 none has enough of its own.
RULES = SegmentRules(overlap=0.05)


def frame(number: int, size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    return Street(70 + number, size).frame(3)[0]


def test_what_the_bundle_finds_is_what_pytorch_finds(
    segment_checkpoint: Path, segment_bundle: Bundle
) -> None:
    loaded = read_segment_checkpoint(segment_checkpoint)
    find = panoptic if loaded.config.model.task == "panoptic" else instances
    with Segmenter(segment_bundle, "onnxruntime-cpu", rules=RULES) as segment:
        for number, size in enumerate((SIZE, (50, 90), (200, 130))):
            image = frame(number, size)
            result = segment(image)
            fitted, geometry = fit_to_input(image, segment_bundle.manifest.input)
            classes, masks = predict_segment_logits(loaded.model, fitted[None])
            expected = find(classes[0], masks[0], geometry, loaded.labels, RULES)
            assert result.task == loaded.config.model.task
            assert len(expected.segments) >= 3
            assert [one.class_id for one in result.segments] == [
                one.class_id for one in expected.segments
            ]
            np.testing.assert_array_equal(result.segment_map, expected.segment_map)


def test_the_graph_is_the_network_in_every_batch(
    segment_checkpoint: Path, segment_bundle: Bundle
) -> None:
    model = read_segment_checkpoint(segment_checkpoint).model
    images = np.stack([frame(0), frame(1)])
    classes, masks = predict_segment_logits(model, images)
    with open_engine(segment_bundle, "onnxruntime-cpu") as engine:
        both = engine.infer(images)
        alone = [engine.infer(images[index : index + 1]) for index in range(2)]
    assert np.abs(both["class_logits"] - classes).max() <= 1e-3 * np.abs(classes).max()
    assert ((both["mask_logits"] > 0) == (masks > 0)).mean() == 1.0
    for index, one in enumerate(alone):
        for name, array in one.items():
            np.testing.assert_allclose(both[name][index], array[0], rtol=1e-4, atol=1e-4)


def test_the_bundle_says_what_it_is(segment_checkpoint: Path, segment_bundle: Bundle) -> None:
    manifest = open_bundle(segment_bundle.path).manifest
    loaded = read_segment_checkpoint(segment_checkpoint)
    assert (manifest.task, manifest.labels) == (loaded.config.model.task, loaded.labels)
    assert (manifest.input.size, manifest.input.multiple) == (SIZE, 32)
    (graph,) = manifest.graphs
    count = 15 if manifest.task == "panoptic" else 12
    assert [(each.name, each.shape(SIZE)) for each in graph.outputs] == [
        ("class_logits", (count, manifest.labels.num_classes)),
        ("mask_logits", (count, 16, 24)),
    ]
    (parity,) = graph.parity
    assert parity.passed
    assert parity.agreement >= 0.9999
    names = {
        tensor.name for tensor in onnx.load(segment_bundle.file(LOGITS_NAME)).graph.initializer
    }
    assert not any("conv_seg" in name for name in names)
    card = segment_bundle.file("MODEL_CARD.md").read_text()
    assert "equal pixels of all kernels' masks" in card


@pytest.fixture(scope="session")
def free_fp16(panoptic_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Half precision and free sizes in one, as tracing takes the time."""
    folder = made_once(
        tmp_path_factory,
        "free-fp16",
        lambda out: export_bundle(
            panoptic_checkpoint,
            out / "free.knet",
            precision="fp16",
            sizes=size_range((64, 64), (128, 192)),
            max_batch=2,
        ),
    )
    return open_bundle(folder / "free.knet")


@pytest.mark.parametrize("size", [SIZE, (128, 192), (64, 160)])
def test_a_graph_of_free_sizes_is_the_network_at_each(
    panoptic_checkpoint: Path, free_fp16: Bundle, size: tuple[int, int]
) -> None:
    """Its positional code too, which is of another period at each size."""
    model = read_segment_checkpoint(panoptic_checkpoint).model
    images = np.stack([frame(number, size) for number in range(2)])
    classes, masks = predict_segment_logits(model, images)
    with open_engine(free_fp16.with_input_size(size), "onnxruntime-cpu") as engine:
        found = engine.infer(images)
    assert found["class_logits"].dtype == found["mask_logits"].dtype == np.float32
    assert found["mask_logits"].shape == (2, 15, size[0] // 4, size[1] // 4)
    assert ((found["mask_logits"] > 0) == (masks > 0)).mean() >= 0.99
    assert np.abs(found["class_logits"] - classes).mean() <= 0.01 * np.abs(classes).max()


def test_free_sizes_are_multiples_of_the_coarsest_stride(free_fp16: Bundle) -> None:
    sizes = free_fp16.manifest.input.sizes
    assert sizes is not None
    assert (sizes.min, sizes.max, sizes.multiple) == ((64, 64), (128, 192), 32)
    (parity,) = free_fp16.graph("logits").parity
    assert parity.passed
    assert parity.agreement >= 0.99
    with open_engine(free_fp16, "onnxruntime-cpu") as engine:
        assert replay(free_fp16, engine).passed
    with Segmenter(free_fp16.with_input_size((128, 160)), rules=RULES) as segment:
        assert segment(frame(0, (100, 150))).segment_map.shape == (100, 150)


def test_norms_of_a_half_graph_are_in_float32(free_fp16: Bundle) -> None:
    graph = onnx.shape_inference.infer_shapes(onnx.load(free_fp16.file(LOGITS_NAME))).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    means = [node for node in graph.node if node.op_type == "ReduceMean"]
    assert any(node.name.startswith("head.towers.") for node in means)
    assert {types[node.input[0]] for node in means} == {onnx.TensorProto.FLOAT}
    assert types["head.laterals.0.weight"] == onnx.TensorProto.FLOAT16


def test_bf16_is_written_unproven(instance_checkpoint: Path, tmp_path: Path) -> None:
    bundle = export_bundle(instance_checkpoint, tmp_path / "x.knet", precision="bf16", max_batch=1)
    assert bundle.graph("logits").parity == ()
    graph = onnx.load(bundle.file(LOGITS_NAME)).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert types["head.laterals.0.weight"] == types["first.things"] == onnx.TensorProto.BFLOAT16
    assert types["fc_class.weight"] == onnx.TensorProto.FLOAT


# Every block is tried alone: a few do here. Random weights lose segments by less than trained ones.
MOST = ("backbone.conv1", "backbone.layer[234]*", "head.towers.*", "head.laterals.*")


@pytest.fixture(scope="module")
def streets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streets")
    for number in range(8):
        cv2.imwrite(str(folder / f"{number}.png"), frame(number)[..., ::-1])
    return folder


def test_int8_is_as_much_as_keeps_the_segments(
    instance_checkpoint: Path, instance_bundle: Bundle, streets: Path, tmp_path: Path
) -> None:
    with traced_before(instance_bundle):
        bundle = export_bundle(
            instance_checkpoint,
            tmp_path / "x.knet",
            precision="int8",
            calibration=streets,
            calibrator="minmax",
            keep_fp32=MOST,
            max_batch=2,
        )
    record = msgspec.json.decode(bundle.file(QUANTISATION_NAME).read_bytes(), type=Quantisation)
    assert (record.method, record.calibrated, record.held_out) == ("minmax", 4, 4)
    assert record.score.quality is not None
    assert record.score.quality >= 80
    assert record.score.agreement >= segment_tolerance("int8").agreement
    assert record.int8_nodes > 0
    graph = onnx.load(bundle.file(LOGITS_NAME), load_external_data=False).graph
    inputs = {node.output[0]: node.op_type for node in graph.node}
    quantised = [
        node.name for node in graph.node if inputs.get(node.input[0]) == "DequantizeLinear"
    ]
    assert len(quantised) == record.int8_nodes
    others = ("stages.", "class_fc", "fc_class", "backbone.conv1", "head.towers")
    assert not [name for name in quantised if name.startswith(others)]
    (parity,) = bundle.graph("logits").parity
    assert parity.passed
    assert "the same segments to PQ" in bundle.file("MODEL_CARD.md").read_text()


def quantised(bundle: Bundle, images: Path, rules: SegmentRules) -> Quantisation:
    manifest: Manifest = msgspec.structs.replace(bundle.manifest, rules=rules)
    graph = OnnxGraph.load(bundle.file(LOGITS_NAME))
    found = open_images(images, "train", manifest.labels)
    tolerance = msgspec.structs.replace(segment_tolerance("int8"), agreement=0.5)
    record: Quantisation
    _, record = quantise_within(
        graph, manifest, found, tolerance, calibrator="minmax", keep_fp32=MOST
    )
    return record


def test_segments_that_int8_loses_count_and_none_to_lose_are_refused(
    segment_bundle: Bundle, streets: Path
) -> None:
    """Every pixel may change here, but segments must stay: the worst blocks are in float."""
    record = quantised(segment_bundle, streets, RULES)
    assert record.score.quality is not None
    assert record.score.quality >= 80
    everything = record.tried[0].score
    assert everything.quality is not None
    assert (len(record.kept_blocks) > 0) == (everything.quality < 80)
    assert {cost.score.quality for cost in record.blocks} != {100.0}
    nothing = SegmentRules(score=0.999, mask=1e-6, overlap=0.999)  # of stuff, all or none
    with pytest.raises(DataError, match="finds nothing on the 4 images of streets"):
        quantised(segment_bundle, streets, nothing)


def test_golden_tensors_are_pytorchs_and_other_weights_fail_them(
    segment_checkpoint: Path, segment_bundle: Bundle, tmp_path: Path
) -> None:
    golden = load_golden(segment_bundle)
    classes, masks = predict_segment_logits(
        read_segment_checkpoint(segment_checkpoint).model, golden.images
    )
    np.testing.assert_array_equal(golden.logits, classes)
    assert golden.masks is not None
    np.testing.assert_array_equal(golden.masks > 0, masks > 0)
    ratio = masks.astype(np.float16)[golden.masks != 0] / golden.masks[golden.masks != 0]
    assert 1 <= ratio.min() <= ratio.max() < 2
    assert (
        len(segment_bundle.file(GOLDEN_NAME).read_bytes()) < masks.size * 2 / 3 + golden.images.size
    )
    with open_engine(segment_bundle, "onnxruntime-cpu") as engine:
        report = replay(segment_bundle, engine)
        test = check_at_start(segment_bundle, engine, "refuse")
    assert (report.passed, report.images, report.agreement) == (True, 2, 1.0)
    assert test is not None
    assert test.passed
    copied = shutil.copytree(segment_bundle.path, tmp_path / "copy.knet")
    assert main(["verify", str(copied)]) == 0

    # Other masks with the same classes, and other classes with the same masks.
    for number, (logits, inside) in enumerate(
        ((golden.logits, -golden.masks), (golden.logits[:, ::-1].copy(), golden.masks))
    ):
        save_golden(tmp_path / GOLDEN_NAME, golden.images, logits, inside)
        names = segment_bundle.manifest.files
        files = {name: segment_bundle.file(name) for name in names}
        files[GOLDEN_NAME] = tmp_path / GOLDEN_NAME
        other = write_bundle(tmp_path / f"{number}.knet", segment_bundle.manifest, files)
        assert main(["verify", str(other.path)]) == 1
        with (
            open_engine(other, "onnxruntime-cpu") as engine,
            pytest.raises(ParityError, match="does not give the results that PyTorch gave"),
        ):
            check_at_start(other, engine, "refuse")


def test_changed_weights_are_noticed_by_the_self_test(
    segment_bundle: Bundle, tmp_path: Path
) -> None:
    weights = bytearray(segment_bundle.file("weights.bin").read_bytes())
    values = np.frombuffer(weights, np.float32)
    values[len(values) // 2 :] *= 1.3
    files: dict[str, bytes | Path] = {
        name: segment_bundle.file(name) for name in segment_bundle.manifest.files
    }
    files["weights.bin"] = bytes(weights)
    other = write_bundle(tmp_path / "x.knet", segment_bundle.manifest, files)
    with open_engine(other, "onnxruntime-cpu") as engine:
        assert not replay(other, engine).passed


def test_a_graph_of_other_weights_is_not_written(
    segment_checkpoint: Path, segment_bundle: Bundle
) -> None:
    model = read_segment_checkpoint(segment_checkpoint).model
    spec, graph = segment_bundle.manifest.input, segment_bundle.graph("logits")
    check_segments(model, spec, graph, segment_bundle.path)
    with torch.no_grad():
        model.init_kernels.weight *= -1
    with pytest.raises(ParityError, match=r"logits\.onnx with a batch of 1 images of 64×96"):
        check_segments(model, spec, graph, segment_bundle.path)


def test_verify_holds_a_bundle_to_its_checkpoint_and_to_others(
    segment_checkpoint: Path,
    segment_bundle: Bundle,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(2):
        cv2.imwrite(str(images / f"{number}.png"), frame(number, (80, 100))[..., ::-1])
    copied = shutil.copytree(segment_bundle.path, tmp_path / "copy.knet")
    command = ["verify", str(copied), "--data", str(images), "--against"]
    assert main([*command, str(segment_checkpoint), "--report", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report/report.html").is_file()
    assert "pixel agreement     100.0000 %" in capsys.readouterr().out
    assert main([*command, str(segment_bundle.path)]) == 0
    assert main([*command, str(checkpoint)]) == 2
    assert "is not the model of" in capsys.readouterr().err


def test_sizes_that_do_not_fit_are_refused(instance_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.knet"
    with pytest.raises(ConfigError, match=r"must be multiples of 32.*32 is the stride of.*--min"):
        export_bundle(instance_checkpoint, out, sizes=size_range((72, 64)))
    with pytest.raises(ConfigError, match=r"multiples of 32, the stride of .* 96x96 is near"):
        export_bundle(instance_checkpoint, out, size=(100, 100))
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "backbone", "stages"),
    [
        ("knet-r50-fpn-instance", "resnet50", 3),
        ("knet-swin-l-panoptic", "swin_tiny_patch4_window7_224", 1),  # Swin-L takes two minutes
    ],
)
def test_the_published_networks_are_traced(
    preset: str, backbone: str, stages: int, tmp_path: Path
) -> None:
    network = [f"model.backbone={backbone}", f"model.stages={stages}"]
    weights = f"loss.stage_weights={[1.0] * (stages + 1)}"
    config = load_config(preset, [f"data.eval_size={list(SIZE)}", *network, weights])
    labels = COCO if config.model.task == "panoptic" else COCO_THINGS
    torch.manual_seed(0)
    model = build_segment_model(config.model, labels).eval()
    if backbone.startswith("swin"):
        del model.backbone.layers[2].blocks[2:]  # four more of the same two blocks
    spec = export_spec(config, None, None, 2)
    (graph,) = segment_graphs("fp32", model)
    export_onnx(fuse_segments(model, spec), spec, graph.outputs, tmp_path)
    check_segments(model, spec, graph, tmp_path)
