"""``knet-deploy bench --compare`` from a checkpoint to the table, with every baseline."""

from __future__ import annotations

import importlib
import json
import re
from functools import partial
from importlib import util
from pathlib import Path

import cv2
import pytest

from knet_deploy.bench import baselines as baselines_module
from knet_deploy.cli.main import main
from knet_runtime.bundle.store import Bundle


@pytest.mark.slow
@pytest.mark.usefixtures("_quick", "_plain_before")
def test_baselines_are_timed_beside_ours(
    checkpoint: Path,
    small_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without torch and torch-channels-last, of which torch-compile is made. That is traced and not
    compiled: its C++ takes minutes, and is not ours."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    eagerly = importlib.import_module("bench_targets").compiled_by_eager
    make = baselines_module.make_baselines

    def made(*words: object) -> dict[str, object]:
        makers = make(*words)  # type: ignore[arg-type]
        return {**makers, "torch-compile": partial(eagerly, makers["torch-compile"])}

    monkeypatch.setattr(baselines_module, "make_baselines", made)
    baselines = ["torch-compile", "ort-naive", "torch-loop"]
    if util.find_spec("openvino"):
        baselines.append("openvino")
    out, plot = tmp_path / "b.json", tmp_path / "b.png"
    words = ["bench", small_bundle.path, "--compare", ",".join(baselines)]
    few = ["--engine", "onnxruntime-cpu", "--rounds", "1", "--frames", "2", "--sources", "0"]
    files = ["--checkpoint", checkpoint, "--size", "90x130", "--json", out, "--plot", plot]
    assert main([str(word) for word in (*words, *few, *files)]) == 0
    assert cv2.imread(str(plot)) is not None
    found = json.loads(out.read_text())
    assert found["failures"] == []
    assert [row["target"] for row in found["rows"]] == [
        "onnxruntime-cpu",
        *(f"baseline {name}" for name in baselines),
    ]
    assert len(found["ratios"]) == len(baselines)
    for row in found["rows"][1:]:
        name = row["target"].removeprefix("baseline ")
        assert (row["ours"], row["verified"]) == (False, False)
        # OpenVINO may compute in bf16; a loop's own resize gives other pixels.
        exact = name not in ("openvino", "torch-loop")
        assert row["agreement"] > (0.999 if exact else 0.9), name
        assert row["precision"] == "fp32" or name == "openvino"
        assert (row["graph"] is None) == name.startswith("torch")
        assert ("draw" in row["stages"]) == (name == "torch-loop")
        assert ("postprocess" in row["stages"]) == (name != "torch-compile")
        assert row["peak_bytes"] > 1 << 20
    said = capsys.readouterr().out
    for name in baselines:
        line = rf"90×130: onnxruntime-cpu is [\d.]+ times as fast as baseline {name} "
        assert re.search(line, said)
