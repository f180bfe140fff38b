"""Checkpoints for instances and panoptic segmentation become bundles that find the same."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from small_segments import SIZE, TASKS, save_segment_knet

from knet_deploy.cli.main import main
from knet_export.export import export_bundle
from knet_export.fuse.segments import fuse_segments
from knet_export.graph.check import check_segments
from knet_export.graph.to_onnx import LOGITS_NAME, export_onnx
from knet_export.spec import export_spec, segment_graphs, size_range
from knet_runtime.bundle.manifest import Precision, SegmentRules
from knet_runtime.bundle.store import Bundle, open_bundle, write_bundle
from knet_runtime.engines import open_engine
from knet_runtime.errors import ConfigError, ParityError
from knet_runtime.golden import GOLDEN_NAME, check_at_start, load_golden, replay, save_golden
from knet_runtime.postprocess import instances, panoptic
from knet_runtime.preprocess import fit_to_input
from knet_runtime.segmenter import Segmenter
from knet_runtime.types import Task
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


@pytest.mark.parametrize("task", TASKS)
def test_fp16_finds_nearly_the_same(task: Task, tmp_path: Path) -> None:
    checkpoint = save_segment_knet(task, tmp_path / "best.safetensors")
    bundle = export_bundle(checkpoint, tmp_path / "x.knet", precision="fp16", max_batch=2)
    (parity,) = bundle.graph("logits").parity
    assert parity.agreement >= 0.99
    model = read_segment_checkpoint(checkpoint).model
    images = np.stack([frame(number) for number in range(2)])
    classes, masks = predict_segment_logits(model, images)
    with open_engine(bundle, "onnxruntime-cpu") as engine:
        found = engine.infer(images)
        assert replay(bundle, engine).passed
    assert found["class_logits"].dtype == found["mask_logits"].dtype == np.float32
    assert ((found["mask_logits"] > 0) == (masks > 0)).mean() >= 0.99
    assert np.abs(found["class_logits"] - classes).mean() <= 0.01 * np.abs(classes).max()


def test_golden_tensors_are_pytorchs_and_other_weights_fail_them(
    segment_checkpoint: Path, segment_bundle: Bundle, tmp_path: Path
) -> None:
    golden = load_golden(segment_bundle)
    classes, masks = predict_segment_logits(
        read_segment_checkpoint(segment_checkpoint).model, golden.images
    )
    np.testing.assert_array_equal(golden.logits, classes)
    np.testing.assert_array_equal(golden.masks, masks.astype(np.float16))
    assert golden.masks is not None
    with open_engine(segment_bundle, "onnxruntime-cpu") as engine:
        report = replay(segment_bundle, engine)
        test = check_at_start(segment_bundle, engine, "refuse")
    assert (report.passed, report.images, report.agreement) == (True, 2, 1.0)
    assert test is not None
    assert test.passed
    assert main(["verify", str(segment_bundle.path)]) == 0

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


def test_a_graph_of_other_weights_is_not_written(segment_checkpoint: Path, tmp_path: Path) -> None:
    loaded = read_segment_checkpoint(segment_checkpoint)
    spec = export_spec(loaded.config, None, None, 2)
    (graph,) = segment_graphs("fp32", loaded.model)
    export_onnx(fuse_segments(loaded.model, SIZE), spec, graph.outputs, tmp_path)
    check_segments(loaded.model, spec, graph, tmp_path)
    with torch.no_grad():
        loaded.model.init_kernels.weight *= -1
    with pytest.raises(ParityError, match=r"logits\.onnx with a batch of 1 images of 64×96"):
        check_segments(loaded.model, spec, graph, tmp_path)


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
    command = ["verify", str(segment_bundle.path), "--data", str(images), "--against"]
    assert main([*command, str(segment_checkpoint), "--report", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report/report.html").is_file()
    assert "pixel agreement     100.0000 %" in capsys.readouterr().out
    assert main([*command, str(segment_bundle.path)]) == 0
    assert main([*command, str(checkpoint)]) == 2
    assert "is not the model of" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_precisions_that_are_for_semantic_networks_are_refused(
    segment_checkpoint: Path, tmp_path: Path, precision: Precision
) -> None:
    calibration = tmp_path if precision == "int8" else None
    with pytest.raises(ConfigError, match="take fp32 or fp16"):
        export_bundle(
            segment_checkpoint, tmp_path / "x.knet", precision=precision, calibration=calibration
        )
    assert not (tmp_path / "x.knet").exists()


def test_free_sizes_and_sizes_that_do_not_fit_are_refused(
    segment_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="choose that with --size"):
        export_bundle(segment_checkpoint, tmp_path / "x.knet", sizes=size_range((64, 64)))
    with pytest.raises(
        ConfigError, match=r"multiples of 32.*100x100.*96x96 is near|multiples of 32"
    ):
        export_bundle(segment_checkpoint, tmp_path / "x.knet", size=(100, 100))
    assert not (tmp_path / "x.knet").exists()


PRESETS = [
    "knet-r50-fpn-instance",
    "knet-r101-fpn-instance",
    "knet-r50-fpn-panoptic",
    "knet-r101-fpn-panoptic",
    "knet-swin-l-panoptic",
]


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_the_published_networks_are_traced(preset: str, tmp_path: Path) -> None:
    config = load_config(preset, [f"data.eval_size={list(SIZE)}"])
    labels = COCO if config.model.task == "panoptic" else COCO_THINGS
    torch.manual_seed(0)
    model = build_segment_model(config.model, labels).eval()
    spec = export_spec(config, None, None, 2)
    (graph,) = segment_graphs("fp32", model)
    export_onnx(fuse_segments(model, SIZE), spec, graph.outputs, tmp_path)
    check_segments(model, spec, graph, tmp_path)
