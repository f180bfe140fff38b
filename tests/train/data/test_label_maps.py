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
    path.write_text(json.dumps({"class_names": ["a", "b"]}))
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
        ('{"class_names": ["a", "b"], "colors": []}', r"'colors'; did you mean palette_rgb\?"),
        ('{"class_names": ["a"], "palete_rgb": []}', r"'palete_rgb'; did you mean palette_rgb\?"),
        ('{"class_name": ["a", "b"]}', r"'class_name'; did you mean class_names\?"),
        ('{"classes": ["a", "b"]}', r"'classes'; did you mean class_names\?"),
        ('{"class_names": ["a", "b"], "Ignore": 3}', r"'Ignore'; did you mean ignore_index\?"),
        ('{"class_names": ["a", "b"], "author": "me"}', r"'author'; its keys are class_names, "),
        ("3", "is 3: it wants an object"),
        ("[1, 2]", "class_names"),
        ('["a", "a"]', "differ"),
    ],
)
def test_malformed_labels_json_is_refused_by_name(tmp_path: Path, text, reason):
    path = tmp_path / "labels.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=reason) as caught:
        load_labels_json(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    example = tmp_path / "example.json"
    example.write_text(caught.value.example)
    assert len(caught.value.example.splitlines()) == 3
    assert load_labels_json(example).names == ("background", "crack")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_labels_json_is_read_as_windows_writes_it(tmp_path: Path, encoding: str):
    path = tmp_path / "labels.json"
    path.write_text('{"class_names": ["Hintergrund", "Riß"]}', encoding)
    assert load_labels_json(path).names == ("Hintergrund", "Riß")


def test_a_plain_list_of_names_is_enough(tmp_path: Path):
    path = tmp_path / "labels.json"
    path.write_text('["background", "crack"]')
    labels = load_labels_json(path)
    assert labels.names == ("background", "crack")
    assert (labels.palette, labels.ignore_index) == (distinct_palette(2), 255)


def test_a_file_that_states_all_keys_may_hold_notes(tmp_path: Path):
    path = tmp_path / "labels.json"
    stated = {"class_names": ["a"], "palette_rgb": [[1, 2, 3]], "ignore_index": 9}
    path.write_text(json.dumps({**stated, "source": "where it is from", "void": [0, 0, 0]}))
    assert load_labels_json(path).ignore_index == 9


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
    text = (shared_data / "ade_samples" / "labels150.json").read_text("utf-8")
    official = json.loads(text)["class_names"]
    assert all(short in long for short, long in zip(ADE20K.names, official, strict=True))
