"""``knet-deploy models``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from knet_runtime.bundle.store import open_bundle, packaged_models

Call = Callable[..., Any]


def test_every_packaged_model_is_listed_with_what_it_scores(call: Call) -> None:
    answer = call("models")
    assert answer.code == 0
    blocks = [
        dict(line.split(None, 1) for line in block.splitlines())
        for block in answer.out.strip().split("\n\n")
    ]
    assert blocks[0]["model"] == "default"
    assert {block["model"] for block in blocks} == {*packaged_models()}
    for block in blocks:
        manifest = open_bundle(block["model"]).manifest
        assert block["task"] == f"{manifest.task}, {manifest.labels.num_classes} classes"
        assert float(block["score"].split()[1]) > 50
        assert manifest.licence.weights in block["licence"]
        assert Path(block["card"]).is_file()


def test_a_build_without_models_says_so(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knet_runtime.bundle.store.packaged_models", dict)
    assert "carries no models" in call("models").out


def test_a_packaged_model_is_a_reference_by_its_name(
    call: Call, copied_bundle: Path, tmp_path: Path
) -> None:
    """A copy of it: all is equal."""
    words = ["--engine", "onnxruntime-cpu", "--json", tmp_path / "v.json"]
    (tmp_path / "photos").mkdir()
    cv2.imwrite(str(tmp_path / "photos" / "a.png"), np.zeros((60, 80, 3), np.uint8))
    data = tmp_path / "photos"
    answer = call("verify", copied_bundle, "--against", "default", "--data", data, *words)
    assert answer.code == 0, answer.err
    assert json.loads((tmp_path / "v.json").read_text())["agreement"] == 1
