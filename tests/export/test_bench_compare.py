"""``knet-deploy bench --compare`` from a checkpoint to the table, with every peer."""

from __future__ import annotations

import json
import re
import shutil
from importlib import util
from pathlib import Path
from typing import Any

import cv2
import pytest

from knet_deploy.cli import main
from knet_runtime.bundle import Bundle


def compared(bundle: Bundle, checkpoint: Path, peers: list[str], folder: Path) -> dict[str, Any]:
    """The report of a contest with these peers, which is also written and drawn."""
    out, plot = folder / "b.json", folder / "b.png"
    words = ["bench", bundle.path, "--compare", ",".join(peers), "--checkpoint", checkpoint]
    few = ["--engine", "onnxruntime-cpu", "--rounds", "1", "--frames", "2", "--sources", "0"]
    files = ["--size", "48x80", "--json", out, "--plot", plot]
    assert main([str(word) for word in (*words, *few, *files)]) == 0
    assert cv2.imread(str(plot)) is not None
    found: dict[str, Any] = json.loads(out.read_text())
    assert found["failures"] == []
    assert [row["contestant"] for row in found["rows"]] == [
        "onnxruntime-cpu",
        *(f"peer {name}" for name in peers),
    ]
    assert len(found["ratios"]) == len(peers)
    return found


@pytest.mark.slow
def test_every_peer_is_timed_beside_ours(
    small_bundle: Bundle, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = ["torch", "torch-channels-last", "ort-naive", "torch-loop"]
    if util.find_spec("openvino"):
        peers.append("openvino")
    for row in compared(small_bundle, checkpoint, peers, tmp_path)["rows"][1:]:
        name = row["contestant"].removeprefix("peer ")
        assert (row["ours"], row["verified"]) == (False, False)
        # OpenVINO may compute in bf16; a loop's own resize gives other pixels.
        exact = name not in ("openvino", "torch-loop")
        assert row["agreement"] > (0.999 if exact else 0.9), name
        assert row["precision"] == "fp32" or name == "openvino"
        assert (row["graph"] is None) == name.startswith("torch")
        assert ("draw" in row["stages"]) == (name == "torch-loop")
        assert row["peak_bytes"] > 1 << 20
    said = capsys.readouterr().out
    for name in peers:
        assert re.search(rf"48×80: onnxruntime-cpu is [\d.]+ times as fast as peer {name} ", said)


@pytest.mark.slow
def test_the_compiled_peer_is_timed_beside_ours(
    small_bundle: Bundle, checkpoint: Path, tmp_path: Path
) -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    row = compared(small_bundle, checkpoint, ["torch-compile"], tmp_path)["rows"][1]
    assert row["agreement"] > 0.999
    assert list(row["stages"]) == ["fit", "infer", "total"]
