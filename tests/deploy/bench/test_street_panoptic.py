"""The script that sets panoptic models beside connected components."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from knet_runtime.labels import LabelMap
from knet_runtime.preprocess import Geometry

FOLDER = Path(__file__).parents[3] / "benchmarks"
LABELS = LabelMap(("road", "car"), ((128, 64, 128), (0, 0, 142)), 255, things=(1,))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not FOLDER.is_dir():
        pytest.skip("benchmarks/ is not beside the tests")
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("street_panoptic")


def test_connected_regions_of_things_are_objects_and_stuff_is_one_segment(
    script: ModuleType,
) -> None:
    logits = np.zeros((2, 12, 20), np.float32)
    logits[1] = -5
    logits[1, 2:6, 1:5], logits[1, 2:6, 10:14], logits[1, 9, 9] = 2, 1, 3
    geometry = Geometry((12, 20), (12, 20), (0, 0, 12, 20))
    found = script.components(logits, geometry, LABELS, 0)
    assert [(one.label, one.area) for one in found.segments] == [
        ("road", 240 - 33),
        ("car", 16),
        ("car", 16),
        ("car", 1),
    ]
    scores = [one.score for one in found.segments[1:]]
    assert scores == pytest.approx([1 / (1 + np.exp(-logit)) for logit in (2, 1, 3)])
    assert not (found.segment_map == 0).any()
    large = script.components(logits, geometry, LABELS, 2)
    assert [one.area for one in large.segments] == [240 - 33, 16, 16]
    assert int((large.segment_map == 0).sum()) == 1
