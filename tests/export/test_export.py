"""A checkpoint becomes a bundle that is the same function, or nothing at all."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from knet_export import export as export_module
from knet_export.export import export_bundle
from knet_export.to_onnx import check_onnx, export_onnx
from knet_export.verify import pictures, verify, write_report
from knet_runtime.backends import open_backend
from knet_runtime.bundle import Bundle, open_bundle
from knet_runtime.errors import (
    CheckpointError,
    DataError,
    KnetError,
    OutputError,
    ParityError,
)
from knet_runtime.golden import load_golden, replay
from knet_runtime.labels import CAMVID11
from knet_runtime.manifest import OutputSpec
from knet_runtime.segmenter import Segmenter
from knet_runtime.synthetic import Street
from knet_train.build import build_model
from knet_train.checkpoint import read_checkpoint, save_checkpoint
from knet_train.config import load_config
from knet_train.evaluate import input_spec, predict
from knet_train.loss import training_loss

SIZE = (64, 96)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small K-Net, trained for a few seconds: random weights would see one class everywhere."""
    config = load_config(
        "knet-edge",
        [
            f"data.eval_size={list(SIZE)}",
            "model.channels=32",
            "model.update_channels=32",
            "model.ffn_channels=64",
        ],
    )
    torch.manual_seed(3)
    model = build_model(config.model, CAMVID11.num_classes).train()
    scenes = [Street(seed, SIZE).frame(0) for seed in range(8)]
    images = torch.from_numpy(np.stack([scene[0] for scene in scenes]))
    labels = torch.from_numpy(np.stack([scene[1] for scene in scenes]))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(30):
        optimizer.zero_grad()
        loss = training_loss(
            model.stage_logits(images), None, labels, config.loss, torch.ones(11), 11
        )
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        won = model.eval()(images).argmax(1)
    assert len(won.unique()) >= 4, "a map of one class would agree with anything"
    path = tmp_path_factory.mktemp("run") / "best.safetensors"
    save_checkpoint(path, model, config, CAMVID11)
    return path


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(checkpoint, tmp_path_factory.mktemp("out") / "small.knet")


def test_the_bundle_is_the_model_on_frames_of_any_size(bundle: Bundle, checkpoint: Path) -> None:
    loaded = read_checkpoint(checkpoint)
    with Segmenter(bundle) as segment:
        for size in ((64, 96), (120, 97), (33, 200)):
            image, _ = Street(7, (96, 128)).frame(3)
            image = np.ascontiguousarray(np.resize(image, (*size, 3)))
            expected = predict(loaded.model, image, loaded.config)
            assert (segment(image).class_map == expected).mean() >= 0.9995


def test_batches_other_than_the_traced_one_give_the_same_as_single_frames(bundle: Bundle) -> None:
    images = np.stack([Street(seed, SIZE).frame(0)[0] for seed in range(7)])
    with open_backend(bundle, "onnxruntime-cpu") as backend:
        together = backend.infer(images)
        alone = np.concatenate([backend.infer(image[None]) for image in images])
    np.testing.assert_allclose(together, alone, atol=1e-3)
    assert np.abs(together[0] - together[1]).max() > 0.1  # the content matters


def test_golden_tensors_replay_and_parity_is_recorded(bundle: Bundle) -> None:
    with open_backend(bundle, "onnxruntime-cpu") as backend:
        assert replay(bundle, backend).passed
    parity = bundle.artefact.parity
    assert parity is not None
    assert parity.images >= 8
    assert parity.agreement >= bundle.artefact.tolerance.agreement
    assert parity.miou_reference is not None
    assert len(load_golden(bundle).images) == 2


def test_the_graph_is_static_in_size_dynamic_in_batch_and_carries_no_paths(bundle: Bundle) -> None:
    graph = onnx.load(bundle.file("model.onnx"))
    shape = graph.graph.input[0].type.tensor_type.shape.dim
    assert shape[0].dim_param
    assert [dim.dim_value for dim in shape[1:]] == [*SIZE, 3]
    assert {opset.version for opset in graph.opset_import if opset.domain == ""} == {18}
    kinds = {node.op_type for node in graph.graph.node}
    assert not kinds & {"Loop", "If", "Scan"}, "kernels are one batched product"
    assert str(Path(__file__).parent).encode() not in graph.SerializeToString()


def test_a_batch_of_one_can_be_exported(checkpoint: Path, tmp_path: Path) -> None:
    import msgspec

    loaded = read_checkpoint(checkpoint)
    spec = msgspec.structs.replace(input_spec(loaded.config), max_batch=1)
    export_onnx(loaded.model, spec, OutputSpec("logits", "logits", 4), tmp_path / "one.onnx")
    check_onnx(loaded.model, spec, tmp_path / "one.onnx", 0.02)


def test_a_graph_of_other_weights_is_caught(checkpoint: Path, bundle: Bundle) -> None:
    loaded = read_checkpoint(checkpoint)
    with torch.no_grad():
        loaded.model.stages[1].fc_mask.weight[:, :8] *= -1
    with pytest.raises(ParityError, match="differs from PyTorch by"):
        check_onnx(loaded.model, input_spec(loaded.config), bundle.file("model.onnx"), 0.02)


def test_a_bundle_outside_its_tolerance_is_not_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import msgspec

    strict = msgspec.structs.replace(export_module.FP32, max_logit_diff=1e-12)
    monkeypatch.setattr(export_module, "check_onnx", lambda *_: None)
    monkeypatch.setattr(export_module, "FP32", strict)
    with pytest.raises(ParityError, match="nothing was written"):
        export_bundle(checkpoint, tmp_path / "x.knet")
    assert list(tmp_path.iterdir()) == []


def test_exports_do_not_replace_unasked(checkpoint: Path, bundle: Bundle) -> None:
    before = (bundle.path / "manifest.json").read_bytes()
    with pytest.raises(OutputError, match="--force"):
        export_bundle(checkpoint, bundle.path)
    assert (bundle.path / "manifest.json").read_bytes() == before
    assert open_bundle(bundle.path).model_id == bundle.model_id


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    import json

    import cv2

    for part in ("images", "labels"):
        (tmp_path / "data" / part).mkdir(parents=True)
    for number in range(11):
        image, label = Street(40 + number, (90, 130)).frame(2)
        cv2.imwrite(str(tmp_path / f"data/images/{number:02}.png"), image[..., ::-1])
        cv2.imwrite(str(tmp_path / f"data/labels/{number:02}.png"), label)
    (tmp_path / "data/labels.json").write_text(
        json.dumps({"class_names": CAMVID11.names, "ignore_index": 11})
    )
    return tmp_path / "data"


def test_verify_passes_with_its_checkpoint_and_fails_with_another(
    bundle: Bundle, checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    from knet_train.dataset import open_folder

    loaded, data = read_checkpoint(checkpoint), open_folder(folder, "all")
    with open_backend(bundle, "onnxruntime-cpu") as backend:
        good = verify(bundle, backend, loaded, pictures(data), "made")
        with torch.no_grad():
            loaded.model.stages[-1].fc_mask.weight[:, :8] *= -1
        bad = verify(bundle, backend, loaded, pictures(data), "made")
    assert good.passed
    assert good.images == 11
    assert good.same_checkpoint
    assert good.delta_miou is not None
    assert good.delta_miou_interval is not None
    low, high = good.delta_miou_interval
    assert low <= good.delta_miou <= high
    assert abs(good.delta_miou) <= 0.05
    assert not bad.passed
    assert any("logit difference" in failure for failure in bad.failures)
    assert bad.agreement < good.agreement
    write_report(good, tmp_path / "report.json")
    assert re.search(r'"delta_miou": -?\d', (tmp_path / "report.json").read_text())


def test_verify_refuses_a_checkpoint_of_another_task(bundle: Bundle, checkpoint: Path) -> None:
    import dataclasses

    loaded = read_checkpoint(checkpoint)
    import msgspec

    other = msgspec.structs.replace(
        CAMVID11, names=CAMVID11.names[:3], palette=CAMVID11.palette[:3]
    )
    with (
        open_backend(bundle, "onnxruntime-cpu") as backend,
        pytest.raises(CheckpointError, match="is not the model"),
    ):
        verify(bundle, backend, dataclasses.replace(loaded, labels=other), [], "nothing")


def test_verify_refuses_no_pictures(bundle: Bundle, checkpoint: Path) -> None:
    with (
        open_backend(bundle, "onnxruntime-cpu") as backend,
        pytest.raises(DataError, match="no pictures"),
    ):
        verify(bundle, backend, read_checkpoint(checkpoint), [], "an empty folder")


def test_exporting_with_data_of_other_classes_is_refused(
    checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    (folder / "labels.json").write_text(
        '{"class_names": ["a","b","c","d","e","f","g","h","i","j","k"], "ignore_index": 11}'
    )
    with pytest.raises(KnetError, match="other classes"):
        export_bundle(checkpoint, tmp_path / "x.knet", data=folder, split="all")
    assert not (tmp_path / "x.knet").exists()
