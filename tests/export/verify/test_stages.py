"""Stages that gather by the reference's masks: what rounding may not do there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_segments import SIZE, spoilt

from knet_deploy.cli.main import main
from knet_export.graph.onnx_graph import OnnxGraph
from knet_export.graph.to_onnx import LOGITS_NAME
from knet_export.verify.stages import hard_masks, stage_differences
from knet_export.verify.verify import verify_bundle
from knet_runtime.bundle.store import Bundle
from knet_runtime.errors import BundleError
from knet_synthetic import Street
from knet_train.checkpoint import read_any_checkpoint
from knet_train.inference import predict_segment_logits, predict_stage_masks
from knet_train.models.segments import SegmentKNet


def compared(
    bundle: Bundle, checkpoint: Path, image: np.ndarray, *, other_masks: bool = False
) -> tuple[float, ...]:
    model = read_any_checkpoint(checkpoint).model
    assert isinstance(model, SegmentKNet)
    masks = predict_stage_masks(model, image)
    _, last = predict_segment_logits(model, image[None])
    if other_masks:
        masks = [-one for one in masks]
    graph = OnnxGraph.load(bundle.file(LOGITS_NAME))
    return stage_differences(graph, {"image": image[None]}, masks, last[0])


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return Street(5, SIZE).frame(0)[0]


def test_a_right_graph_agrees_at_every_stage(
    segment_bundle: Bundle, segment_checkpoint: Path, image: np.ndarray
) -> None:
    differences = compared(segment_bundle, segment_checkpoint, image)
    assert len(differences) == 4  # the first kernels, and three stages
    assert max(differences) < 1e-4


def test_the_masks_are_those_that_are_given(
    segment_bundle: Bundle, segment_checkpoint: Path, image: np.ndarray
) -> None:
    differences = compared(segment_bundle, segment_checkpoint, image, other_masks=True)
    assert min(differences) > 1e-2  # of the first, because they are compared with what was given


def test_a_fault_shows_at_its_own_stage(
    segment_bundle: Bundle, segment_checkpoint: Path, image: np.ndarray, tmp_path: Path
) -> None:
    other, _ = spoilt(segment_bundle, tmp_path / "other.knet")
    differences = compared(other, segment_checkpoint, image)
    assert max(differences[:2]) < 1e-4 < 1e-3 < differences[2]


def test_another_number_of_stages_is_said(
    segment_bundle: Bundle, segment_checkpoint: Path, image: np.ndarray
) -> None:
    graph = OnnxGraph.load(segment_bundle.file(LOGITS_NAME))
    masks = [np.zeros((12, 8, 12), np.float32)] * 3
    with pytest.raises(BundleError, match="3 times, its checkpoint 2 times: export it again"):
        stage_differences(graph, {"image": image[None]}, masks, masks[0])
    assert len(hard_masks(graph)) == 3


def test_verify_holds_the_stages_to_their_limit(
    segment_bundle: Bundle,
    segment_checkpoint: Path,
    image: np.ndarray,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(image).save(photos / "a.png")
    copied = shutil.copytree(segment_bundle.path, tmp_path / "copy.knet")
    against = verify_bundle(copied, segment_bundle.path, photos, engine="onnxruntime-cpu")
    assert against.stages is None  # a bundle's stages are not known
    other, _ = spoilt(segment_bundle, tmp_path / "other.knet")
    written = tmp_path / "report.json"
    words = ["--data", str(photos), "--engine", "onnxruntime-cpu", "--json", str(written)]
    command = ["verify", str(other.path), "--against", str(segment_checkpoint)]
    assert main([*command, *words]) == 1
    said = capsys.readouterr()
    assert "stages 2, 3 with PyTorch's masks:" in said.err
    assert "stages, same masks" in said.out
    assert json.loads(written.read_text())["stages"][2] > 1e-3
