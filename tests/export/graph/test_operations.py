"""The counts of multiply-adds, and the page that states them."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from knet_export.graph.cost import count_cost
from knet_runtime.bundle.store import default_bundle_path
from knet_train.config import load_config, presets

REPOSITORY = Path(__file__).parents[3]
PAGE = REPOSITORY / "docs" / "results" / "models.md"


count_operations = runpy.run_path(str(REPOSITORY / "benchmarks" / "operations.py"))[
    "count_operations"
]


@pytest.mark.parametrize("preset", ["knet-edge", "r50-fcn", "r50-upernet", "swin-t-upernet"])
def test_the_page_states_what_is_counted(preset: str) -> None:
    config = load_config(preset)
    classes = 11 if preset == "knet-edge" else 150
    counted = count_operations(config, classes, config.data.eval_size)
    assert counted.row() in PAGE.read_text("utf-8").splitlines()


def test_the_packaged_model_costs_what_pytorch_counts() -> None:
    found = count_cost(default_bundle_path() / "logits.onnx", (360, 480))
    counted = count_operations(load_config("knet-edge"), 11, (360, 480))
    assert found.multiply_adds == pytest.approx(counted.fused, rel=0.01)
    assert count_cost(default_bundle_path() / "classmap.onnx", (360, 480)) == found


def test_the_page_shows_what_was_built() -> None:
    results = sorted((REPOSITORY / "benchmarks/results").glob("deploy-*.json"))
    shown = subprocess.run(
        [sys.executable, REPOSITORY / "benchmarks/deploy_table.py", "--show", *results],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown in PAGE.read_text("utf-8")
    assert "failed" not in shown
    assert {line.split(" | ")[0][2:] for line in shown.splitlines()[2:]} == set(presets())


def test_a_published_network_counts_as_mmsegmentation_does_and_saves_what_the_algebra_says() -> (
    None
):
    counted = count_operations(load_config("r50-fcn"), 150, (512, 512))
    assert round(2 * counted.published / 1e9, 1) == 410.2  # GFLOP, by mmsegmentation's own tool
    kernels, channels, width, pixels, stages = 150, 512, 256, 64 * 64, 3
    transforms = stages * channels**2 * pixels  # 1×1 convolutions, which are gone
    constant = kernels * channels * 2 * width  # input_layer of the kernels that are weights
    parts = stages * kernels * channels * (2 * channels - 2 * width)  # T mixes a kernel's parts
    offsets = stages * kernels * channels  # one row more in each last linear
    saved = counted.published_kernels - counted.fused_kernels
    assert saved == transforms + constant - parts - offsets
