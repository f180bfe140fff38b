"""Verify, train and export by their commands, and what run takes from odd images and bundles."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from knet_runtime.bundle.store import default_bundle_path, open_bundle, write_bundle
from knet_runtime.golden import GOLDEN_NAME, load_golden, save_golden

Call = Callable[..., Any]


def test_verify_alone_replays_the_golden_tensors(call: Call, copied_bundle: Path) -> None:
    outcome = call("verify", copied_bundle)
    assert outcome.code == 0, outcome.err
    assert "passed" in outcome.out


def test_packaged_models_are_compared_by_name_and_stay_as_they_are(
    call: Call, tmp_path: Path
) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.full((90, 120, 3), 90, np.uint8))
    manifest = default_bundle_path() / "manifest.json"
    before = manifest.read_bytes()
    outcome = call("verify", "default", "--against", "default", "--data", tmp_path)
    assert outcome.code == 0, outcome.err
    assert "against camvid-knet-edge@" in outcome.out
    assert "the verdict is not stored" in outcome.out
    assert "stays as it was installed; copy it, and name the copy: cp -r" in outcome.out
    assert manifest.read_bytes() == before
    outcome = call("verify", "default", "--against", "street-panoptic", "--data", tmp_path)
    assert outcome.code == 2
    assert "have other tasks (semantic against panoptic)" in outcome.err
    outcome = call("eval", "street-panoptic", "--slide", "--data", tmp_path)
    assert outcome.code == 2
    assert "--slide is for checkpoints: a bundle sees images in one way" in outcome.err


def test_verify_wants_checkpoint_and_data_together(call: Call, tmp_path: Path) -> None:
    outcome = call("verify", default_bundle_path(), "--against", tmp_path / "x.safetensors")
    assert outcome.code == 2
    assert "--data" in outcome.err


def test_verify_fails_with_1_when_golden_results_differ(
    call: Call, copied_bundle: Path, tmp_path: Path
) -> None:
    bundle = open_bundle(copied_bundle)
    golden = load_golden(bundle)
    save_golden(tmp_path / GOLDEN_NAME, golden.images, golden.logits + np.float32(1))
    files: dict[str, bytes | Path] = {name: bundle.file(name) for name in bundle.manifest.files}
    files[GOLDEN_NAME] = tmp_path / GOLDEN_NAME
    other = write_bundle(tmp_path / "other.knet", bundle.manifest, files)
    outcome = call("verify", other.path)
    assert outcome.code == 1
    assert "do not trust" in outcome.err


def test_train_says_what_is_wrong_before_any_work(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "run"
    outcome = call("train", "--data", tmp_path / "none", "--out", out)
    assert outcome.code == 2
    assert "is not a folder" in outcome.err
    for setting, word in (
        ("optim.lrr=1", "lrr"),
        ("nope.lr=1", "nope"),
        ("optim.steps=x", "steps"),
    ):
        outcome = call("train", "--data", tmp_path, "--out", out, "--set", setting)
        assert outcome.code == 2
        assert word in outcome.err
        assert len(outcome.err.splitlines()) == 1
    assert call("train", "--data", tmp_path, "--out", out, "--preset", "nonesuch").code == 2
    assert not out.exists()


def test_export_refuses_what_is_no_checkpoint(call: Call, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text("no tensors here")
    for name in ("x.safetensors", "none.safetensors"):
        outcome = call("export", tmp_path / name, "-o", tmp_path / "x.knet")
        assert outcome.code == 2
        assert name in outcome.err
    assert not (tmp_path / "x.knet").exists()


@pytest.mark.parametrize(
    "image",
    [
        np.full((1, 1, 3), 90, np.uint8),
        np.full((20, 30), 40_000, np.uint16),
        np.full((20, 30, 4), 200, np.uint8),
        np.full((20, 30), 77, np.uint8),
    ],
    ids=["1x1", "16 bit", "RGBA", "grey"],
)
def test_unusual_pngs_are_segmented_at_their_size(
    call: Call, tmp_path: Path, image: np.ndarray
) -> None:
    cv2.imwrite(str(tmp_path / "x.png"), image)
    outcome = call("run", tmp_path / "x.png", "--masks", tmp_path / "m")
    assert outcome.code == 0, outcome.err
    mask = cv2.imread(str(tmp_path / "m/x.png"), cv2.IMREAD_UNCHANGED)
    assert mask.shape == image.shape[:2]


def test_a_manifest_path_that_leaves_the_bundle_is_refused(
    call: Call, video: Path, copied_bundle: Path
) -> None:
    manifest = json.loads((copied_bundle / "manifest.json").read_text())
    manifest["files"]["../golden.npz"] = manifest["files"].pop("golden.npz")
    (copied_bundle / "manifest.json").write_text(json.dumps(manifest))
    outcome = call("run", video, "--bundle", copied_bundle)
    assert outcome.code == 2
    assert "../golden.npz" in outcome.err
    assert len(outcome.err.splitlines()) == 1
