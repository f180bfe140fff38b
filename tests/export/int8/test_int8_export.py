"""An int8 bundle from a checkpoint and a folder of images."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from made_once import made_once
from PIL import Image
from traced import traced_before

from knet_deploy.cli.main import main
from knet_export.export import export_bundle
from knet_export.int8.search import QUANTISATION_NAME, Quantisation
from knet_runtime.bundle.store import Bundle, open_bundle
from knet_runtime.engines import open_engine
from knet_runtime.errors import ConfigError, DataError
from knet_runtime.metrics import agreement
from knet_runtime.postprocess import upsampled_argmax
from knet_synthetic import Street

SIZE = (64, 96)


@pytest.fixture(scope="session")
def streets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streets")
    for number in range(8):
        Image.fromarray(Street(number, SIZE).frame(3 * number)[0]).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def bundle(
    checkpoint: Path, free_bundle: Bundle, streets: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    def make(folder: Path) -> None:
        with traced_before(free_bundle):
            export_bundle(
                checkpoint,
                folder / "small.knet",
                precision="int8",
                sizes=free_bundle.manifest.input.sizes,
                calibration=streets,
                calibrator="minmax",
                keep_fp32=["backbone.conv1"],
            )

    return open_bundle(made_once(tmp_path_factory, "int8", make) / "small.knet")


def test_the_bundle_is_int8_and_proven(bundle: Bundle) -> None:
    for one in bundle.manifest.graphs:
        assert one.precision == "int8"
    (parity,) = bundle.graph("logits").parity
    assert parity.passed
    graph = onnx.load(bundle.path / "logits.onnx", load_external_data=False).graph
    inputs = {node.output[0]: node.op_type for node in graph.node}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    kept = [node.name for node in convolutions if inputs.get(node.input[0]) != "DequantizeLinear"]
    assert {name.split("/")[0][:14] for name in kept} == {"backbone.conv1"}
    assert len(convolutions) > 10


def test_the_bundle_says_how_it_was_quantised(bundle: Bundle) -> None:
    data = bundle.file(QUANTISATION_NAME).read_bytes()
    record = msgspec.json.decode(data, type=Quantisation)
    assert record.method == "minmax"
    assert (record.calibrated, record.held_out) == (4, 4)
    assert "backbone.conv1.0/Conv" in record.kept_nodes
    assert record.kept_patterns == ("backbone.conv1",)
    assert [cost.score.agreement for cost in record.blocks] == sorted(
        cost.score.agreement for cost in record.blocks
    )
    card = bundle.file("MODEL_CARD.md").read_text()
    assert f"{100 * record.int8_macs:.1f} % of the multiply-adds" in card
    assert "`backbone.conv1`" in card


def test_both_graphs_see_the_same_classes(bundle: Bundle) -> None:
    images = np.stack([Street(seed, SIZE).frame(50)[0] for seed in (90, 91, 92)])
    with (
        open_engine(bundle, "onnxruntime-cpu") as logits,
        open_engine(bundle, "onnxruntime-cpu", kind="classmap") as classmap,
    ):
        classes = classmap.infer(images)["classmap"]
        for output, found in zip(logits.infer(images)["logits"], classes, strict=True):
            assert agreement(upsampled_argmax(output, SIZE), found) > 0.9999


def test_a_graph_of_free_sizes_can_be_int8(bundle: Bundle) -> None:
    image = Street(5, (96, 128)).frame(0)[0][None]
    with open_engine(bundle.with_input_size((96, 128)), "onnxruntime-cpu") as backend:
        assert backend.infer(image)["logits"].shape == (1, 11, 24, 32)


def test_int8_and_its_images_go_together(checkpoint: Path, streets: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="int8 needs images"):
        export_bundle(checkpoint, tmp_path / "a.knet", precision="int8")
    with pytest.raises(ConfigError, match="--calibration go together"):
        export_bundle(checkpoint, tmp_path / "a.knet", calibration=streets)


def test_a_folder_without_images_leaves_nothing_behind(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: has no images"):
        export_bundle(
            checkpoint, tmp_path / "a.knet", precision="int8", calibration=tmp_path / "empty"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_an_unknown_calibrator_is_refused_by_the_command(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(checkpoint), "-o", str(tmp_path / "a.knet"), "--calibrator", "guess"]
    assert main(words) == 2
    assert "is not one of 'auto', 'minmax', 'percentile', 'entropy'" in capsys.readouterr().err
