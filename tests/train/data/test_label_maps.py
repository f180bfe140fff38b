from __future__ import annotations

import json
from pathlib import Path

import pytest

from knet_runtime.errors import DataError
from knet_runtime.labels import distinct_palette
from knet_synthetic import CAMVID11
from knet_train.data.layouts import ADE20K, load_labels_json


def test_labels_json_is_read_and_its_missing_palette_made(tmp_path: Path):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({"class_names": ["a", "b"], "note": "other keys are not ours"}))
    labels = load_labels_json(path)
    assert labels.names == ("a", "b")
    assert labels.ignore_index == 255
    assert labels.palette == distinct_palette(2)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "needs a labels.json"),
        ("{", "labels.json"),
        ("{}", "class_names"),
        ('{"class_names": []}', "at least one"),
        ('{"class_names": ["a"], "palette_rgb": [[0, 0]]}', "palette_rgb"),
    ],
)
def test_malformed_labels_json_is_refused_by_name(tmp_path: Path, text, reason):
    path = tmp_path / "labels.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=reason) as caught:
        load_labels_json(path)
    assert str(path) in str(caught.value)


def test_camvid_labels_on_disk_are_the_built_in_ones(shared_data: Path):
    found = sorted((shared_data / "camvid").rglob("labels.json"))
    if not found:
        pytest.skip("this CamVid has no labels.json")
    labels = load_labels_json(found[0])
    assert labels.names == CAMVID11.names
    assert labels.ignore_index == CAMVID11.ignore_index


def test_ade20k_has_150_classes_with_the_palette_of_the_published_models():
    assert ADE20K.num_classes == 150
    assert ADE20K.ignore_index == 255
    assert (ADE20K.names[12], ADE20K.palette[12]) == ("person", (150, 5, 61))


def test_ade20k_has_the_order_of_the_benchmark(shared_data: Path):
    official = load_labels_json(shared_data / "ade_samples" / "labels150.json").names
    assert all(short in long for short, long in zip(ADE20K.names, official, strict=True))
