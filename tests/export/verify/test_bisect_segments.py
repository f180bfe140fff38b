"""A bundle of segments that failed: where it leaves its reference."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from small_segments import spoilt

from knet_deploy.cli.main import main
from knet_export.graph.onnx_graph import OnnxGraph
from knet_export.graph.to_onnx import LOGITS_NAME
from knet_export.verify.align import align
from knet_export.verify.bisect import bisect, with_prefix
from knet_runtime.bundle.store import Bundle
from knet_synthetic import Street


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "images" / "a.png"
    path.parent.mkdir()
    cv2.imwrite(str(path), Street(3, (64, 96)).frame(0)[0][..., ::-1])
    return path


def test_bisect_names_the_module_and_the_weight(
    segment_bundle: Bundle, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = bisect(segment_bundle, "logits", segment_bundle.path, picture)
    assert (found.tensor, found.causes) == (None, ())
    other, weight = spoilt(segment_bundle, tmp_path / "other.knet")
    words = ["--against", str(segment_bundle.path), "--data", str(picture.parent), "--bisect"]
    assert main(["verify", str(other.path), *words, "--engine", "onnxruntime-cpu"]) == 1
    shown = capsys.readouterr().out
    assert "first tensor outside the tolerance:" in shown
    assert "stages.1" in shown
    assert f"constant {weight} differs" in shown


def test_results_stay_themselves_behind_any_prefix(segment_bundle: Bundle) -> None:
    graph = OnnxGraph.load(segment_bundle.file(LOGITS_NAME))
    aligned = align(graph, graph)
    feed = {"image": np.zeros((1, 64, 96, 3), np.uint8)}
    wanted = graph.run(feed, ["class_logits", "mask_logits"])
    count = len(aligned.pairs)
    for prefix in (0, count // 2, count - 1, count):
        found = with_prefix(graph, graph, aligned, feed, prefix)
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3 * np.abs(other).max())
