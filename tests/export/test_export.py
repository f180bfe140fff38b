"""A checkpoint becomes a bundle that is the same function, or nothing at all."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from traced import traced_before

from knet_deploy.cli.main import main
from knet_export import export as export_module
from knet_export.export import export_bundle
from knet_export.spec import model_card, size_range
from knet_export.verify.measure import default_tolerance
from knet_runtime.bundle.manifest import Licence, Precision, SizeRange
from knet_runtime.bundle.store import Bundle, open_bundle
from knet_runtime.engines import open_engine
from knet_runtime.errors import CheckpointError, ConfigError, DataError, OutputError, ParityError
from knet_runtime.golden import load_golden, replay
from knet_runtime.postprocess import upsampled_argmax
from knet_runtime.segmenter import Segmenter
from knet_runtime.types import Size
from knet_synthetic import Street
from knet_train.checkpoint import read_checkpoint, save_checkpoint
from knet_train.inference import predict

SIZE = (64, 96)


@pytest.fixture
def bundle(small_bundle: Bundle) -> Bundle:
    return small_bundle


def street_images(count: int, size: Size = SIZE) -> NDArray[np.uint8]:
    return np.stack([Street(seed, size).frame(0)[0] for seed in range(count)])


def test_the_bundle_is_the_model_on_frames_of_any_size(bundle: Bundle, checkpoint: Path) -> None:
    loaded = read_checkpoint(checkpoint)
    with Segmenter(bundle) as segment:
        for size in ((64, 96), (120, 97), (33, 200)):
            image, _ = Street(7, (96, 128)).frame(3)
            image = np.ascontiguousarray(np.resize(image, (*size, 3)))
            expected = predict(loaded.model, image, loaded.config)
            assert (segment(image).class_map == expected).mean() >= 0.9995


def test_batches_other_than_the_traced_one_give_the_same_as_single_frames(bundle: Bundle) -> None:
    images = street_images(7)
    with open_engine(bundle, "onnxruntime-cpu") as backend:
        together = backend.infer(images)["logits"]
        alone = np.concatenate([backend.infer(image[None])["logits"] for image in images])
    np.testing.assert_allclose(together, alone, atol=1e-3)
    assert np.abs(together[0] - together[1]).max() > 0.1  # the content matters


def test_logits_are_within_a_thousandth_of_pytorch_and_classes_are_the_same(
    bundle: Bundle, checkpoint: Path
) -> None:
    images = street_images(4)
    with torch.no_grad():
        expected = read_checkpoint(checkpoint).model(torch.from_numpy(images)).numpy()
    with open_engine(bundle, "onnxruntime-cpu") as backend:
        got = backend.infer(images)["logits"]
    assert np.abs(got - expected).max() <= 1e-3 * np.abs(expected).max()
    assert (got.argmax(1) == expected.argmax(1)).mean() >= 0.9999


def test_the_classmap_graph_gives_the_classes_of_the_logits_graph(bundle: Bundle) -> None:
    images = street_images(3)
    with (
        open_engine(bundle, "onnxruntime-cpu") as logits,
        open_engine(bundle, "onnxruntime-cpu", "classmap") as classmap,
    ):
        classes = classmap.infer(images)["classmap"]
        expected = [upsampled_argmax(one, SIZE) for one in logits.infer(images)["logits"]]
    assert classes.dtype == np.uint8
    assert classes.shape == (3, *SIZE)
    assert (classes == np.stack(expected)).mean() >= 0.9999
    assert len(np.unique(classes)) >= 4


def test_the_manifest_states_both_graphs_over_one_file_of_weights(bundle: Bundle) -> None:
    kinds = [(graph.kind, graph.path) for graph in bundle.manifest.graphs]
    assert kinds == [("logits", "logits.onnx"), ("classmap", "classmap.onnx")]
    assert {graph.external_data for graph in bundle.manifest.graphs} == {("weights.bin",)}
    assert {graph.precision for graph in bundle.manifest.graphs} == {"fp32"}
    assert set(bundle.manifest.files) == {
        "logits.onnx",
        "classmap.onnx",
        "weights.bin",
        "golden.npz",
        "MODEL_CARD.md",
    }


def test_golden_tensors_are_the_trained_models_and_parity_is_recorded(
    bundle: Bundle, checkpoint: Path
) -> None:
    with open_engine(bundle, "onnxruntime-cpu") as backend:
        assert replay(bundle, backend).passed
    golden = load_golden(bundle)
    with torch.no_grad():
        trained = read_checkpoint(checkpoint).model(torch.from_numpy(golden.images))
    np.testing.assert_array_equal(golden.logits, trained.numpy())
    assert len(golden.images) == 2
    (parity,) = bundle.graph("logits").parity
    assert parity.passed
    assert parity.images >= 8
    assert parity.agreement >= bundle.graph("logits").tolerance.agreement
    assert parity.miou_reference is not None


def test_a_half_bundle_is_half_as_large_and_keeps_float32_golden_logits(
    bundle: Bundle, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exported by the command: at a size, and for one image at a time."""
    words = ["--precision", "fp16", "--size", "32x64", "--max-batch", "1"]
    assert main(["export", str(checkpoint), "-o", str(tmp_path / "my one.knet"), *words]) == 0
    assert "agreement" in capsys.readouterr().out
    half = open_bundle(tmp_path / "my one.knet")
    spec = half.manifest.input
    assert half.manifest.name == "my-one"  # the names of bundles have no spaces
    assert (spec.height, spec.width, spec.max_batch, spec.sizes) == (32, 64, 1, None)
    assert half.manifest.precision == "fp16"
    sizes = [one.manifest.files["weights.bin"].bytes for one in (half, bundle)]
    assert 0.4 < sizes[0] / sizes[1] < 0.6
    golden = load_golden(half)
    with torch.no_grad():
        trained = read_checkpoint(checkpoint).model(torch.from_numpy(golden.images))
    np.testing.assert_array_equal(golden.logits, trained.numpy())
    with open_engine(half, "onnxruntime-cpu") as backend:
        report = replay(half, backend)
    assert report.passed
    assert report.max_logit_diff is not None
    assert report.max_logit_diff > 1e-5, "nothing is half"


def test_a_dynamic_bundle_runs_at_other_sizes(checkpoint: Path, free_bundle: Bundle) -> None:
    assert free_bundle.manifest.input.sizes == SizeRange((64, 64), (256, 512), 8)
    size = (136, 88)
    images = street_images(2, size)
    with torch.no_grad():
        expected = read_checkpoint(checkpoint).model(torch.from_numpy(images)).numpy()
    with open_engine(free_bundle.with_input_size(size), "onnxruntime-cpu") as backend:
        got = backend.infer(images)["logits"]
    assert np.abs(got - expected).max() <= 1e-3 * np.abs(expected).max()


def test_a_bundle_outside_its_tolerance_is_not_written(
    checkpoint: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = msgspec.structs.replace(default_tolerance("fp32"), max_logit_diff=1e-12)
    monkeypatch.setattr(export_module, "check_onnx", lambda *_: None)
    monkeypatch.setattr("knet_export.spec.default_tolerance", lambda _: strict)
    with traced_before(bundle), pytest.raises(ParityError, match="nothing was written"):
        export_bundle(checkpoint, tmp_path / "folder" / "x.knet")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs file size limits")
def test_a_full_disk_is_named_and_leaves_nothing(
    checkpoint: Path, bundle: Bundle, tmp_path: Path
) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with traced_before(bundle), pytest.raises(OutputError, match="free some space"):
            export_bundle(checkpoint, tmp_path / "x.knet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_the_model_card_shows_names_as_they_are(bundle: Bundle, checkpoint: Path) -> None:
    names = ("<script>", "[a](b)", "x_y*", *bundle.manifest.labels.names[3:])
    manifest = msgspec.structs.replace(
        bundle.manifest,
        labels=msgspec.structs.replace(bundle.manifest.labels, names=names),
        licence=Licence("Apache-2.0", "<b>", "see | here\n# title"),
    )
    card = model_card(manifest, read_checkpoint(checkpoint).config)
    assert r": \<script\>, \[a\](b), x\_y\*, " in card
    assert r"weights \<b\>; training data see \| here \# title." in card


def test_exports_do_not_replace_unasked(checkpoint: Path, bundle: Bundle) -> None:
    before = (bundle.path / "manifest.json").read_bytes()
    with pytest.raises(OutputError, match="--force"):
        export_bundle(checkpoint, bundle.path)
    assert (bundle.path / "manifest.json").read_bytes() == before
    assert open_bundle(bundle.path).model_id == bundle.model_id


def changed(checkpoint: Path, folder: Path, key: str, value: float) -> Path:
    """The checkpoint with one number of one weight replaced."""
    loaded = read_checkpoint(checkpoint)
    with torch.no_grad():
        loaded.model.state_dict()[key].view(-1)[3] = value
    path = folder / "changed.safetensors"
    save_checkpoint(path, loaded.model, loaded.config, loaded.labels)
    return path


@pytest.mark.parametrize(
    ("precision", "value", "message"),
    [
        ("fp32", float("nan"), r"stages\.1\.ffn\.0\.bias holds NaN"),
        ("fp16", float("inf"), r"stages\.1\.ffn\.0\.bias holds NaN or infinity"),
    ],
)
def test_weights_that_are_no_numbers_are_named_before_the_export(
    checkpoint: Path, tmp_path: Path, precision: Precision, value: float, message: str
) -> None:
    broken = changed(checkpoint, tmp_path, "stages.1.ffn.0.bias", value)
    with pytest.raises(CheckpointError, match=message):
        export_bundle(broken, tmp_path / "x.knet", precision=precision)
    assert [path.name for path in tmp_path.iterdir()] == ["changed.safetensors"]


def test_a_weight_beyond_fp16_is_named_before_the_export(checkpoint: Path, tmp_path: Path) -> None:
    large = changed(checkpoint, tmp_path, "conv_seg.weight", 1e5)
    steps: list[str] = []
    with pytest.raises(CheckpointError, match=r"classifier\.weight .* fp16 ends at 65504"):
        export_bundle(large, tmp_path / "x.knet", precision="fp16", on_step=steps.append)
    assert steps == ["exporting the graph"]
    assert [path.name for path in tmp_path.iterdir()] == ["changed.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": (66, 96)}, "multiples of 4.*64x96 is near"),
        ({"size": (16, 96)}, "at least 32"),
        ({"max_batch": 0}, "--max-batch 0 must be at least 1"),
        ({"sizes": SizeRange((128, 128), (256, 256), 8)}, "leaves out 64x96"),
        ({"sizes": SizeRange((66, 66), (132, 132), 66)}, "multiples of 132, as all are; 4 is the"),
        ({"size": (512, 512), "sizes": SizeRange((64, 64), (256, 256), 8)}, "widen --min"),
    ],
)
def test_sizes_that_can_not_be_are_refused_with_ones_that_can(
    checkpoint: Path, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        export_bundle(checkpoint, tmp_path / "x.knet", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("least", "most", "message"),
    [
        ((256, 256), (128, 128), "hold none"),
        ((100, 100), (200, 200), "multiples of 8"),
        ((16, 64), (128, 128), "at least 32"),
    ],
)
def test_ranges_that_hold_no_size_are_refused(least: Size, most: Size, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        size_range(least, most)


def test_exporting_with_data_of_other_classes_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    for part in ("images", "labels"):
        (tmp_path / "data" / part).mkdir(parents=True)
    image, label = Street(40, (90, 130)).frame(2)
    cv2.imwrite(str(tmp_path / "data/images/0.png"), image[..., ::-1])
    cv2.imwrite(str(tmp_path / "data/labels/0.png"), label)
    (tmp_path / "data/labels.json").write_text(
        '{"class_names": ["a","b","c","d","e","f","g","h","i","j","k"], "ignore_index": 11}'
    )
    with pytest.raises(DataError, match="other classes"):
        export_bundle(checkpoint, tmp_path / "x.knet", data=tmp_path / "data", split="all")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
