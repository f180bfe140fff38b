"""The scripts of ``benchmarks/`` that time networks of random weights, at small sizes."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from knet_runtime.bundle.manifest import SizeRange
from knet_runtime.bundle.store import open_bundle
from knet_runtime.preprocess import resize
from knet_runtime.segmenter import Segmenter
from knet_synthetic import Street
from knet_train.config import load_config
from knet_train.foreign import merging_order

FOLDER = Path(__file__).parents[3] / "benchmarks"
PRESET = "knet-edge"
SMALL = [
    "model.backbone=resnet10t",
    "model.channels=32",
    "model.update_channels=32",
    "model.stages=0",
    "loss.stage_weights=[1.0]",
]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """A script as a module, with words on its command line."""
    if not FOLDER.is_dir():
        pytest.skip("benchmarks/ is not beside the tests")
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str, *words: object) -> ModuleType:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *" ".join(map(str, words)).split()])
        return importlib.import_module(name)

    return load


@pytest.fixture
def small(script: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the scripts time is small, and has no stages: it is not about what they find."""
    random_bundle = script("random_bundle")
    monkeypatch.setattr(random_bundle, "load_config", lambda preset: load_config(preset, SMALL))


@pytest.mark.usefixtures("small")
def test_a_random_bundle_is_whole_and_sees_several_classes(
    script: Callable[..., ModuleType], tmp_path: Path
) -> None:
    random_bundle = script("random_bundle")
    model = random_bundle.random_model(PRESET, 11)
    again = random_bundle.random_model(PRESET, 11)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    sizes = SizeRange((64, 64), (128, 128), 8)
    folder = tmp_path / "random.knet"
    random_bundle.write_random(folder, model, PRESET, size=(64, 96), sizes=sizes, max_batch=2)
    bundle = open_bundle(folder)
    assert [one.kind for one in bundle.manifest.graphs] == ["logits", "classmap"]
    frames = [Street(seed, (100, 140)).frame(0)[0] for seed in range(2)]
    for opened in (bundle, bundle.with_input_size((128, 64))):
        with Segmenter(opened, "onnxruntime-cpu") as segmenter:
            found = segmenter.batch(frames)
        size = (opened.manifest.input.height, opened.manifest.input.width)
        with torch.no_grad():
            logits = model(torch.from_numpy(np.stack([resize(frame, size) for frame in frames])))
        large = torch.nn.functional.interpolate(logits, (100, 140), mode="bilinear")
        for one, expected in zip(found, large.argmax(1).numpy(), strict=True):
            assert (one.class_map == expected).mean() > 0.999
            assert len(np.unique(one.class_map)) > 2


@pytest.mark.usefixtures("small")
def test_half_precision_and_more_classes_than_a_byte_holds(
    script: Callable[..., ModuleType], tmp_path: Path
) -> None:
    random_bundle = script("random_bundle")
    model = random_bundle.random_model(PRESET, 300)
    folder = tmp_path / "many.knet"
    bundle = random_bundle.write_random(folder, model, PRESET, size=(64, 64), precision="fp16")
    (only,) = bundle.manifest.graphs
    assert (only.kind, only.precision) == ("logits", "fp16")
    with Segmenter(bundle, "onnxruntime-cpu") as segmenter:
        assert segmenter(Street(1, (64, 64)).frame(0)[0]).class_map.dtype == np.uint16


def test_the_slope_is_the_exponent_of_growth(script: Callable[..., ModuleType]) -> None:
    growth = script("growth")
    assert growth.slopes([(2.0, 3.0)]) == [None]
    assert growth.slopes([(2.0, 3.0), (4.0, 6.0), (8.0, 24.0), (16.0, 24.0)]) == [None, 1, 2, 0]


def test_one_graph_takes_all_sizes(script: Callable[..., ModuleType]) -> None:
    growth = script("growth")
    assert growth.span_of([(64, 64), (64, 64)]) is None
    assert growth.span_of([(64, 64), (64, 96)]) == SizeRange((64, 64), (64, 96), 8)
    assert growth.span_of([(64, 128), (96, 64)]) == SizeRange((64, 64), (96, 128), 8)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_growth_is_measured_against_all_four(
    script: Callable[..., ModuleType], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "new/g.json", tmp_path / "plots/g.png"
    tiny = "--size 64x64 --areas 64x64 64x96 --classes 3 5 --batches 1 2 --sources 1 2"
    words = [tiny, "--rounds", 1, "--frames", 2, "--output", out, "--plot", plot]
    script("growth", *words).main()
    curves = {curve["against"]: curve["points"] for curve in json.loads(out.read_text())["curves"]}
    at = {against: [point["at"] for point in points] for against, points in curves.items()}
    assert at == {"area": [4096, 6144], "classes": [3, 5], "batch": [1, 2], "sources": [1, 2]}
    for points in curves.values():
        assert all(point["ms"] > 0 for point in points)
        assert points[0]["slope"] is None
        assert isinstance(points[1]["slope"], float)
    assert set(curves["area"][0]["stages"]) == {"preprocess", "infer", "postprocess", "total"}
    assert cv2.imread(str(plot)) is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_the_gpu_rows_say_that_they_need_a_gpu(script: Callable[..., ModuleType]) -> None:
    with pytest.raises(SystemExit) as ended:
        script("gpu_rows").main()
    assert str(ended.value) == (
        "gpu_rows: PyTorch sees no GPU here: pass --device cpu to try the script"
    )


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_the_gpu_rows_go_the_same_way_on_a_processor(
    script: Callable[..., ModuleType], tmp_path: Path
) -> None:
    out, plot = tmp_path / "new/g.json", tmp_path / "plots/g.png"
    tiny = "--device cpu --presets knet-edge --size 64 --rounds 1 --times 2 --batches 1 2"
    words = [tiny, "--skip", "torch-compile", "--output", out, "--plot", plot]
    script("gpu_rows", *words).main()
    report = json.loads(out.read_text())
    found = [(row["target"], row["batch"]) for row in report["rows"]]
    names = ("onnxruntime-cpu", "torch-fp32", "torch-fp16")
    assert found == [(name, batch) for name in names for batch in (1, 2)]
    for row in report["rows"]:
        assert row["ms"]["p5"] <= row["ms"]["median"] <= row["ms"]["p99"]
        assert row["frames_per_second"] == pytest.approx(
            1000 * row["batch"] / row["ms"]["median"], abs=0.01
        )
        assert row["matmul_share"] > 0
    assert cv2.imread(str(plot)) is not None


def test_gpu_rows_that_fail_say_why_and_the_others_stand(
    script: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu_rows = script("gpu_rows", "--device", "cpu", "--size", 64, "--batches", 1, "--rounds", 2)
    options = gpu_rows.parse()
    images = np.zeros((1, 64, 64, 3), np.uint8)
    calls: list[int] = []

    def breaks(batch: Any) -> Any:
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("CUDA error: out of memory\nhint")
        return batch

    options.times = 3
    measurements, broken = gpu_rows.rounds(
        {"good": lambda batch: batch, "bad": breaks}, images, options
    )
    assert broken == {"bad": "RuntimeError: CUDA error: out of memory"}
    assert [one.round for one in measurements if one.target == "good"] == [0, 1]

    def never(*_: Any) -> Any:
        raise ValueError("it cannot be exported")

    out = tmp_path / "rows.json"
    monkeypatch.setattr(gpu_rows, "measure", never)
    words = ("--device", "cpu", "--presets", "knet-edge", "r50-fcn", "--output", out)
    with pytest.raises(SystemExit, match="nothing ran"):
        script("gpu_rows", *words).main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["preset"] for row in rows] == ["knet-edge", "r50-fcn"]
    assert {row["failed"] for row in rows} == {"ValueError: it cannot be exported"}


def test_weights_by_their_authors_names_are_imported_as_they_were(
    script: Callable[..., ModuleType],
) -> None:
    """Swin merges four patches in another order there."""
    state = script("random_checkpoint").published_state
    key, value = "backbone.layers.1.downsample.reduction.weight", torch.rand(3, 8)

    class Merging(torch.nn.Module):
        def state_dict(self, *_: object, **__: object) -> dict[str, torch.Tensor]:  # type: ignore[override]
            return {key: value, "init_kernels.weight": value}

    found = state(Merging())
    assert set(found) == {
        "backbone.stages.0.downsample.reduction.weight",
        "rpn_head.init_kernels.weight",
    }
    moved = found["backbone.stages.0.downsample.reduction.weight"]
    assert not torch.equal(moved, value)
    assert torch.equal(merging_order(moved), value)


def test_a_table_goes_on_with_the_rows_that_are_not_there(
    script: Callable[..., ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, asked = tmp_path / "rows.json", []
    rows = [
        {"preset": "r50-fcn", "precision": "fp32", "export_seconds": 1.5},
        {"preset": "knet-edge", "precision": "fp32", "failed": "too little memory"},
    ]
    out.write_text(json.dumps({"rows": rows}))
    words = ("--presets", "r50-fcn", "knet-edge", "--precisions", "fp32", "--output", out)
    module = script("deploy_table", "--images", tmp_path, *words)

    def measured(preset: str, precision: str, _: object) -> dict[str, object]:
        asked.append(preset)
        return {"preset": preset, "precision": precision, "export_seconds": 2.0}

    monkeypatch.setattr(module, "run_row", measured)
    module.main()
    assert asked == ["knet-edge"]
    found = json.loads(out.read_text())["rows"]
    assert [(row["preset"], row["export_seconds"]) for row in found] == [
        ("r50-fcn", 1.5),
        ("knet-edge", 2.0),
    ]
