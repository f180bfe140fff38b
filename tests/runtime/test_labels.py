from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from knet_runtime.errors import ConfigError, DataError
from knet_runtime.labels import CAMVID11, LabelMap, ade20k, distinct_palette, load_labels_json


def test_camvid_has_eleven_classes_and_ignores_the_twelfth():
    assert CAMVID11.num_classes == 11
    assert CAMVID11.ignore_index == 11
    assert CAMVID11.names[0] == "Sky"


def test_palette_array_is_black_beyond_the_classes():
    table = CAMVID11.palette_array()
    assert table.shape == (256, 3)
    assert table.dtype == np.uint8
    assert tuple(table[8]) == CAMVID11.palette[8]
    assert not table[11:].any()


def test_palette_array_grows_with_the_classes():
    names = tuple(f"c{i}" for i in range(300))
    assert LabelMap(names, distinct_palette(300), 65535).palette_array().shape == (300, 3)


@pytest.mark.parametrize(
    ("names", "palette", "ignore_index", "reason"),
    [
        ((), (), 255, "at least one"),
        (("a", "b"), ((0, 0, 0),), 255, "2 class names but 1 colours"),
        (("a", "a"), ((0, 0, 0), (1, 1, 1)), 255, "differ"),
        (("a",), ((0, 0, 256),), 255, "0 … 255"),
        (("a",), ((0, 0, 0),), 0, "outside the classes"),
        (("a",), ((0, 0, 0),), -1, "outside the classes"),
        (("a",), ((0, 0, 0),), 65536, "65535"),
    ],
)
def test_contradictory_label_map_is_refused(names, palette, ignore_index, reason):
    with pytest.raises(ValueError, match=reason):
        LabelMap(names, palette, ignore_index)


def test_distinct_palette_has_no_colour_twice():
    assert len(set(distinct_palette(255))) == 255
    assert (0, 0, 0) not in distinct_palette(255)


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
    labels = ade20k()
    assert labels.num_classes == 150
    assert labels.ignore_index == 255
    assert (labels.names[12], labels.palette[12]) == ("person", (150, 5, 61))


def test_ade20k_has_the_order_of_the_benchmark(shared_data: Path):
    official = load_labels_json(shared_data / "ade_samples" / "labels150.json").names
    assert all(short in long for short, long in zip(ade20k().names, official, strict=True))


def test_classes_are_found_by_name_in_any_case() -> None:
    assert CAMVID11.indices(["car", "ROAD", " Car "]) == (3, 8)
    assert CAMVID11.indices([]) == ()
    twins = LabelMap(("Bus", "bus"), ((0, 0, 0), (1, 1, 1)), 255)
    assert twins.indices(["Bus"]) == (0,)
    assert twins.indices(["bus"]) == (1,)


def test_an_unknown_class_is_refused_with_the_list_of_classes() -> None:
    with pytest.raises(ConfigError, match="no class 'lorry'; this model's are Sky, Building, Pole"):
        CAMVID11.indices(["Car", "lorry"])
