"""The baselines: K-Net as published equals ours, and every one gives the map that ours gives."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest
import torch

from knet_deploy.bench.baselines import make_baselines
from knet_deploy.bench.report import TOTAL
from knet_deploy.bench.torch_baselines import NaiveKNet
from knet_runtime.bundle.manifest import SegmentRules
from knet_runtime.bundle.store import Bundle
from knet_runtime.errors import ConfigError, EngineError
from knet_runtime.segmenter import Segmenter
from knet_synthetic import Street
from knet_train.checkpoint import read_checkpoint

FRAME = (90, 130)


def test_the_published_form_equals_ours(checkpoint: Path) -> None:
    model = read_checkpoint(checkpoint).model.double()
    images = torch.randint(0, 256, (2, 64, 96, 3)).double()
    normalised = (images.permute(0, 3, 1, 2) - model.mean) / model.std
    with torch.no_grad():
        ours = model(images)
        published = NaiveKNet(model, FRAME).logits(normalised)
    torch.testing.assert_close(published, ours, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("_plain_before")
@pytest.mark.parametrize(
    "name", ["torch", "torch-channels-last", "ort-naive", "openvino", "torch-loop"]
)
def test_a_baseline_gives_our_map(
    name: str, small_bundle: Bundle, checkpoint: Path, tmp_path: Path
) -> None:
    if name == "openvino":
        pytest.importorskip("openvino")
    makers = make_baselines([name], checkpoint, small_bundle.manifest, [FRAME], tmp_path)
    baseline = pickle.loads(pickle.dumps(makers[name]))()
    frame = Street(3, FRAME).frame(1)[0]
    classes, times = baseline.segment(frame)
    with Segmenter(small_bundle, "onnxruntime-cpu") as segmenter:
        ours = segmenter(frame).class_map
    assert (classes.shape, classes.dtype) == (FRAME, np.uint8)
    assert len(np.unique(ours)) > 2
    # OpenVINO chooses bf16 by itself where the processor has it.
    assert (classes == ours).mean() > (0.98 if name == "openvino" else 0.9999)
    assert times[TOTAL] >= times["infer"] > 0
    assert ("draw" in times) == (name == "torch-loop")


@pytest.mark.parametrize(("name", "nms"), [("torch", 1.0), ("torch-channels-last", 0.2)])
def test_a_baseline_finds_our_segments(
    name: str, nms: float, segment_bundle: Bundle, segment_checkpoint: Path, tmp_path: Path
) -> None:
    rules = SegmentRules(overlap=0.05, nms=nms)  # masks of random weights lie over one another
    manifest = msgspec.structs.replace(segment_bundle.manifest, rules=rules)
    makers = make_baselines([name], segment_checkpoint, manifest, [FRAME], tmp_path)
    frame = Street(3, FRAME).frame(1)[0]
    classes, times = pickle.loads(pickle.dumps(makers[name]))().segment(frame)
    with Segmenter(segment_bundle, "onnxruntime-cpu", rules=rules) as segmenter:
        ours = segmenter(frame)
    assert ours.segments
    assert (len(ours.segments) > 2) == (nms == 1)
    assert (classes.shape, classes.dtype) == (FRAME, np.uint8)
    assert (classes == ours.class_map).mean() > 0.999
    assert times[TOTAL] >= times["infer"] > 0
    with pytest.raises(ConfigError, match=r"ort-naive is for semantic .*torch and torch-channels"):
        make_baselines([name, "ort-naive"], segment_checkpoint, manifest, [FRAME], tmp_path)


@pytest.mark.usefixtures("_plain_before")
def test_the_precision_of_baseline_openvino_is_what_its_convolutions_run_in(
    small_bundle: Bundle, checkpoint: Path, tmp_path: Path
) -> None:
    openvino = pytest.importorskip("openvino")
    manifest = small_bundle.manifest
    maker = make_baselines(["openvino"], checkpoint, manifest, [FRAME], tmp_path)["openvino"]
    (graph,) = tmp_path.glob("*.onnx")
    compiled = openvino.compile_model(graph, "CPU")
    ran = Counter(
        node.get_rt_info()["runtimePrecision"].astype(str)
        for node in compiled.get_runtime_model().get_ops()
        if node.get_rt_info()["layerType"].astype(str) == "Convolution"
    )
    names = {"f32": "fp32", "f16": "fp16", "bf16": "bf16"}
    assert maker().facts.precision == names[ran.most_common(1)[0][0]]


def test_a_network_that_pytorch_cannot_export_leaves_the_other_baselines(
    small_bundle: Bundle, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no such operator\nmore")

    monkeypatch.setattr("knet_deploy.bench.torch_baselines.export_naive", fails)
    manifest = small_bundle.manifest
    makers = make_baselines(["ort-naive", "torch"], checkpoint, manifest, [FRAME], tmp_path)
    with pytest.raises(EngineError, match=r"^torch\.onnx\.export: .*no such operator$"):
        pickle.loads(pickle.dumps(makers["ort-naive"]))()
    assert makers["torch"]().facts.precision == "fp32"


def test_the_plain_graph_sees_normalised_pixels() -> None:
    pixels = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    mean, scale = np.array([[1.0, 2.0, 3.0]]), np.array([[0.5, 0.25, 2.0]])
    changed = pixels.copy()
    cv2.subtract(changed, mean, changed)
    cv2.multiply(changed, scale, changed)
    np.testing.assert_allclose(changed, (pixels - mean[0]) * scale[0], rtol=1e-6)


def test_what_is_no_pytorch_baseline_runs_without_torch() -> None:
    code = "import sys, knet_deploy.bench.{}; print('torch' in sys.modules)"
    for module in ("target", "baselines", "benchmark", "plot"):
        words = [sys.executable, "-c", code.format(module)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "False", module
