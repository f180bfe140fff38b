"""verify: what it measures, what it stores, what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from knet_deploy.cli.main import main
from knet_export.data import LabelledImage, open_images
from knet_export.verify.reference import TorchReference
from knet_export.verify.verify import VerifyReport, verify
from knet_runtime.bundle.manifest import Graph, Kind
from knet_runtime.bundle.store import Bundle, default_bundle_path, open_bundle, write_bundle
from knet_runtime.engines import open_engine
from knet_runtime.errors import BundleError, CheckpointError, ConfigError, DataError
from knet_train.checkpoint import read_checkpoint, read_segment_checkpoint

CPU = "onnxruntime-cpu"
REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def copied(small_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_bundle.path, tmp_path / "copy.knet"))


def measure(bundle: Bundle, checkpoint: Path, streets: Path, kind: Kind = "logits") -> VerifyReport:
    data = open_images(streets, "all", bundle.manifest.labels)
    with open_engine(bundle, CPU, kind) as backend:
        reference = TorchReference(read_checkpoint(checkpoint))
        return verify(bundle, backend, reference, data, data.name)


def changed(bundle: Bundle, path: Path, change: Callable[[onnx.ModelProto], None]) -> Bundle:
    """The bundle with another logits graph, its weights inside."""
    model = onnx.load(bundle.file(bundle.graph("logits").path))
    change(model)
    files: dict[str, Any] = {name: bundle.file(name) for name in bundle.manifest.files}
    files[bundle.graph("logits").path] = model.SerializeToString()
    return write_bundle(path, bundle.manifest, files)


@pytest.mark.parametrize("kind", ["logits", "classmap"])
def test_a_right_bundle_passes_everything_that_is_measured(
    small_bundle: Bundle, checkpoint: Path, streets: Path, kind: Kind
) -> None:
    report = measure(small_bundle, checkpoint, streets, kind)
    assert report.passed, report.failures
    assert report.images == 8
    assert report.same_checkpoint
    assert report.delta_miou is not None
    assert report.delta_miou_interval is not None
    low, high = report.delta_miou_interval
    assert low - 1e-9 <= report.delta_miou <= high + 1e-9
    assert abs(report.delta_miou) <= 0.02
    assert report.agreement >= 0.9999
    assert report.agreement_confident == 1.0
    assert sum(row.share for row in report.margins) == pytest.approx(1)
    agreed = sum(row.share * (row.agreement or 0) for row in report.margins)
    assert agreed == pytest.approx(report.agreement)
    assert (report.max_logit_diff is None) == (kind == "classmap")
    assert len(report.classes) == 11


def test_images_without_labels_give_agreement_and_logits_only(
    small_bundle: Bundle, checkpoint: Path, streets: Path
) -> None:
    data = open_images(streets / "images", "val", small_bundle.manifest.labels)
    with open_engine(small_bundle, CPU) as backend:
        reference = TorchReference(read_checkpoint(checkpoint))
        report = verify(small_bundle, backend, reference, data, data.name)
    assert report.passed
    assert report.delta_miou is report.worst_class is report.miou_reference is None
    assert report.classes == ()
    assert report.max_logit_diff is not None
    assert report.max_logit_diff < 1e-3


def test_nan_logits_fail_and_are_stored_as_failed(
    small_bundle: Bundle, checkpoint: Path, streets: Path, tmp_path: Path
) -> None:
    def poison(model: onnx.ModelProto) -> None:
        (bias,) = [one for one in model.graph.initializer if one.name.endswith("head.fuse.5.bias")]
        bias.CopyFrom(numpy_helper.from_array(np.full(bias.dims, np.nan, np.float32), bias.name))

    broken = changed(small_bundle, tmp_path / "nan.knet", poison)
    report = measure(broken, checkpoint, streets)
    assert not report.passed
    assert "8 of 8 images give NaN or infinity" in report.failures
    assert report.agreement == 0
    assert report.max_logit_diff is None
    arguments = ["--against", str(checkpoint), "--data", str(streets), "--split", "all"]
    page = tmp_path / "page"
    answer = main(["verify", str(broken.path), *arguments, "--engine", CPU, "--report", str(page)])
    assert answer == 1
    (record,) = open_bundle(broken.path).graph("logits").parity
    assert (record.passed, record.max_logit_diff) == (False, None)
    assert json.loads((page / "report.json").read_text())["max_logit_diff"] is None


def test_the_verdict_is_stored_and_a_tighter_limit_fails(
    copied: Path,
    checkpoint: Path,
    streets: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    words = ["verify", str(copied), "--against", str(checkpoint), "--data", str(streets)]
    words += ["--split", "all", "--engine", CPU]
    assert main([*words, "--json", str(tmp_path / "x.json")]) == 0
    (record,) = open_bundle(copied).graph("logits").parity
    assert record.passed
    assert (record.images, record.data) == (8, "streets, split all")
    assert json.loads((tmp_path / "x.json").read_text())["images"] == 8
    capsys.readouterr()
    assert main([*words, "--tolerance", "max_logit_diff=1e-12"]) == 1
    error = capsys.readouterr().err
    assert "largest logit difference" in error
    assert "above 1e-12" in error
    (record,) = open_bundle(copied).graph("logits").parity
    assert not record.passed


def test_a_golden_verdict_does_not_clear_one_on_images(copied: Path, checkpoint: Path) -> None:
    golden = ["verify", str(copied), "--engine", CPU]
    before = open_bundle(copied).graph("logits").parity
    assert main(golden) == 0
    assert open_bundle(copied).graph("logits").parity == before  # the export's own says more
    assert main([*golden, "--tolerance", "max_logit_diff=1e-12"]) == 1
    (record,) = open_bundle(copied).graph("logits").parity
    assert (record.passed, record.data) == (False, "golden images")
    assert main(golden) == 0
    (record,) = open_bundle(copied).graph("logits").parity
    assert record.passed


def test_a_bundle_that_can_not_be_written_is_still_verified(
    copied: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from knet_runtime.bundle import store as bundle

    def full(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(bundle, "write_atomic", full)
    for word in ("classmap", "logits"):
        assert main(["verify", str(copied), "--engine", CPU, "--graph", word]) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "note:" in line]
    assert "the verdict is not stored in the bundle" in note
    assert "Read-only" in note


def test_bundle_against_bundle_needs_no_torch(copied: Path, streets: Path) -> None:
    """And images without labels need nothing that the base install lacks."""
    script = f"""
import sys
for name in ("torch", "timm", "onnx", "safetensors", "PIL"):
    sys.modules[name] = None
from knet_deploy.cli.main import main
words = ["verify", {str(copied)!r}, "--against", {str(copied)!r}, "--engine", {CPU!r}]
codes = [main([*words, "--data", {str(streets / "images")!r}])]
codes.append(main([*words, "--data", {str(streets)!r}, "--split", "all"]))
del sys.modules["PIL"]
codes.append(main([*words, "--data", {str(streets)!r}, "--split", "all"]))
print(codes)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.endswith("[0, 2, 0]\n"), done.stderr
    assert "pip install pillow" in done.stderr
    assert "against small@" in done.stdout
    assert "ΔmIoU               +0.0000" in done.stdout


def test_the_packaged_bundle_is_the_kept_checkpoint_on_camvid(shared_data: Path) -> None:
    kept = REPOSITORY / "train" / "default-model" / "knet-edge-camvid.safetensors"
    bundle = open_bundle(default_bundle_path())
    data = open_images(shared_data / "camvid", "val", bundle.manifest.labels)
    reference = TorchReference(read_checkpoint(kept))
    with open_engine(bundle, CPU) as backend:
        report = verify(bundle, backend, reference, islice(data, 0, None, 25), data.name)
    assert report.passed, report.failures
    assert report.images == 5
    assert report.miou_reference is not None
    assert report.miou_reference > 50


def test_the_packaged_panoptic_bundle_is_the_kept_checkpoint_on_camvid(shared_data: Path) -> None:
    kept = REPOSITORY / "train" / "street-panoptic" / "knet-edge-panoptic.safetensors"
    bundle = open_bundle("street-panoptic")
    pictures = shared_data / "camvid" / "images" / "val"
    data = open_images(pictures, "val", bundle.manifest.labels, task="panoptic")
    reference = TorchReference(read_segment_checkpoint(kept))
    with open_engine(bundle, CPU) as backend:
        report = verify(bundle, backend, reference, islice(data, 0, None, 50), data.name)
    assert report.passed, report.failures
    assert report.images == 3


def test_another_checkpoint_fails_and_is_not_stored(
    copied: Path,
    checkpoint: Path,
    streets: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from knet_train.checkpoint import save_checkpoint

    loaded = read_checkpoint(checkpoint)
    state = loaded.model.state_dict()
    state["stages.2.fc_mask.weight"] *= -1
    loaded.model.load_state_dict(state)
    other = tmp_path / "other.safetensors"
    save_checkpoint(other, loaded.model, loaded.config, loaded.labels)
    before = (copied / "manifest.json").read_bytes()
    words = ["--against", str(other), "--data", str(streets), "--split", "all", "--engine", CPU]
    assert main(["verify", str(copied), *words]) == 1
    assert "not exported from the reference's checkpoint" in capsys.readouterr().out
    assert (copied / "manifest.json").read_bytes() == before


def test_models_of_another_kind_are_refused_and_never_resized(
    small_bundle: Bundle, checkpoint: Path, tmp_path: Path
) -> None:
    from knet_export.verify.reference import BundleReference

    labels = small_bundle.manifest.labels
    few = msgspec.structs.replace(labels, names=labels.names[:3], palette=labels.palette[:3])
    spec = small_bundle.manifest.input
    graph = small_bundle.graph("logits")

    def graphs(**changes: object) -> tuple[Graph, ...]:
        output = msgspec.structs.replace(graph.outputs[0], **changes)
        return (msgspec.structs.replace(graph, outputs=(output,)),)

    at_8 = {"graphs": graphs(stride=8), "input": msgspec.structs.replace(spec, multiple=8)}
    three = {"graphs": graphs(channels=(3,)), "labels": few}
    letterbox = {"input": msgspec.structs.replace(spec, resize="letterbox")}
    for field, changes, words in (
        ("labels", three, r"other classes \(11 against 3\)"),
        ("input", letterbox, "other ways to fit"),
        ("output", at_8, "strides"),
    ):
        manifest = msgspec.structs.replace(small_bundle.manifest, **changes)
        other = Bundle(small_bundle.path, manifest)
        with pytest.raises(BundleError, match=words):
            BundleReference(other, small_bundle)
        if field != "input":
            with pytest.raises(CheckpointError, match="is not the model of"):
                TorchReference(read_checkpoint(checkpoint)).check(other)
    larger = msgspec.structs.replace(spec, height=128)
    other = Bundle(small_bundle.path, msgspec.structs.replace(small_bundle.manifest, input=larger))
    with pytest.raises(ConfigError, match="was exported for 128×96 only"):
        BundleReference(other, small_bundle)


@pytest.mark.slow
def test_a_dynamic_bundle_is_verified_at_the_size_that_is_asked_for(
    checkpoint: Path,
    free_bundle: Bundle,
    streets: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = shutil.copytree(free_bundle.path, tmp_path / "free.knet")
    words = ["verify", str(bundle), "--against", str(checkpoint), "--data", str(streets)]
    words += ["--split", "all", "--engine", CPU, "--graph", "classmap"]
    assert main([*words, "--size", "96x128"]) == 0
    assert "(fp32 classmap, 96×128)" in capsys.readouterr().out
    (record,) = open_bundle(bundle).graph("classmap").parity
    assert record.data == "streets, split all, at 96×128"
    assert main([*words, "--size", "100x128"]) == 2
    assert "in multiples of 8, not 100×128" in capsys.readouterr().err


def test_options_that_do_not_fit_are_named(
    copied: Path,
    streets: Path,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    both = ["--against", str(checkpoint), "--data", str(streets)]
    (tmp_path / "file").write_text("")
    for words, expected in (
        (["--bisect"], "--bisect goes with --against and --data"),
        (["--report", str(tmp_path / "r")], "--report goes with --against"),
        (["--size", "64x64"], "--size goes with"),
        (["--against", str(checkpoint)], "go together"),
        (["--graph", "both"], "is not one of 'logits', 'classmap'"),
        (["--tolerance", "miou=1"], "write NAME=VALUE"),
        ([*both, "--size", "128x96"], "exported for 64×96 only"),
        ([*both, "--report", str(tmp_path / "file" / "x")], "a part of this path is a file"),
        (["--against", str(checkpoint), "--data", str(tmp_path)], "has no images"),
        (["--against", str(checkpoint), "--data", str(tmp_path / "no")], "is not a folder"),
    ):
        assert main(["verify", str(copied), *words]) == 2, words
        error = capsys.readouterr().err
        assert expected in error
        assert len(error.splitlines()) == 1


def test_broken_data_is_named(small_bundle: Bundle, streets: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(streets, tmp_path / "data"))
    (other / "images" / "03.png").write_bytes(b"no image")
    data = open_images(other, "all", small_bundle.manifest.labels)
    with pytest.raises(Exception, match=r"03\.png"):
        list(data)
    names = [f"class {number}" for number in range(11)]
    (other / "labels.json").write_text(json.dumps({"class_names": names, "ignore_index": 11}))
    with pytest.raises(DataError, match="has other classes than"):
        open_images(other, "all", small_bundle.manifest.labels)


def test_no_images_is_an_error(small_bundle: Bundle, checkpoint: Path) -> None:
    none: list[LabelledImage] = []
    with open_engine(small_bundle, CPU) as backend, pytest.raises(DataError, match="no images"):
        verify(small_bundle, backend, TorchReference(read_checkpoint(checkpoint)), none, "nothing")
