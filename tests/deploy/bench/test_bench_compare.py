"""``knet-deploy bench --compare`` from a checkpoint to the table, with every baseline."""

from __future__ import annotations

import json
import re
import shutil
from importlib import util
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch

from knet_deploy.cli.main import main
from knet_export.export import export_bundle
from knet_synthetic import CAMVID11
from knet_train.checkpoint import save_checkpoint
from knet_train.config import load_config
from knet_train.models.build import build_model

SMALL = (
    "data.eval_size=[64, 64]",
    "model.backbone=resnet10t",
    "model.channels=32",
    "model.update_channels=32",
    "model.ffn_channels=64",
    "model.stages=1",
    "loss.stage_weights=[1.0, 1.0]",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of random weights, and its bundle. The first kernels are large, so that maps
    have several classes: those of one class would agree with anything."""
    folder = tmp_path_factory.mktemp("tiny")
    config = load_config("knet-edge", list(SMALL))
    torch.manual_seed(0)
    model = build_model(config.model, CAMVID11.num_classes).eval()
    torch.nn.init.normal_(model.conv_seg.weight)
    checkpoint = folder / "tiny.safetensors"
    save_checkpoint(checkpoint, model, config, CAMVID11)
    return checkpoint, export_bundle(checkpoint, folder / "tiny.knet").path


def compared(tiny: tuple[Path, Path], baselines: list[str], folder: Path) -> dict[str, Any]:
    """The report of a benchmark with these baselines, which is also written and drawn."""
    checkpoint, bundle = tiny
    out, plot = folder / "b.json", folder / "b.png"
    words = ["bench", bundle, "--compare", ",".join(baselines), "--checkpoint", checkpoint]
    few = ["--engine", "onnxruntime-cpu", "--rounds", "1", "--frames", "2", "--sources", "0"]
    files = ["--size", "48x80", "--json", out, "--plot", plot]
    assert main([str(word) for word in (*words, *few, *files)]) == 0
    assert cv2.imread(str(plot)) is not None
    found: dict[str, Any] = json.loads(out.read_text())
    assert found["failures"] == []
    assert [row["target"] for row in found["rows"]] == [
        "onnxruntime-cpu",
        *(f"baseline {name}" for name in baselines),
    ]
    assert len(found["ratios"]) == len(baselines)
    return found


@pytest.mark.slow
def test_every_baseline_is_timed_beside_ours(
    tiny: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baselines = ["torch", "torch-channels-last", "ort-naive", "torch-loop"]
    if util.find_spec("openvino"):
        baselines.append("openvino")
    for row in compared(tiny, baselines, tmp_path)["rows"][1:]:
        name = row["target"].removeprefix("baseline ")
        assert (row["ours"], row["verified"]) == (False, False)
        # OpenVINO may compute in bf16; a loop's own resize gives other pixels.
        exact = name not in ("openvino", "torch-loop")
        assert row["agreement"] > (0.999 if exact else 0.9), name
        assert row["precision"] == "fp32" or name == "openvino"
        assert (row["graph"] is None) == name.startswith("torch")
        assert ("draw" in row["stages"]) == (name == "torch-loop")
        assert row["peak_bytes"] > 1 << 20
    said = capsys.readouterr().out
    for name in baselines:
        line = rf"48×80: onnxruntime-cpu is [\d.]+ times as fast as baseline {name} "
        assert re.search(line, said)


@pytest.mark.slow
def test_torch_compile_is_timed_beside_ours(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    row = compared(tiny, ["torch-compile"], tmp_path)["rows"][1]
    assert row["agreement"] > 0.999
    assert list(row["stages"]) == ["preprocess", "infer", "total"]
