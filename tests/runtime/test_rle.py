"""Run lengths against pycocotools, and the lines that hold them."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import fakes
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from knet_runtime.errors import ConfigError
from knet_runtime.rle import rles_of
from knet_runtime.segmentation import Segmentation
from knet_runtime.sinks import RleLines
from knet_runtime.types import ClassMap, Frame

coco = pytest.importorskip("pycocotools.mask", reason="pip install pycocotools")

# pycocotools' own array, which does not know NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def assert_as_pycocotools(class_map: ClassMap) -> None:
    found = rles_of(class_map, range(int(class_map.max()) + 1))
    assert set(found) == set(np.unique(class_map).tolist())
    for index, (rle, area) in found.items():
        expected = coco.encode(np.asfortranarray(class_map == index, np.uint8))
        assert list(rle.size) == expected["size"]
        assert rle.counts == expected["counts"].decode()
        assert area == coco.area(expected) == int((class_map == index).sum())
        decoded = coco.decode({"size": list(rle.size), "counts": rle.counts})
        np.testing.assert_array_equal(decoded, class_map == index)


@settings(deadline=None, max_examples=60)
@given(
    arrays(
        np.uint8,
        st.tuples(st.integers(1, 40), st.integers(1, 40)),
        elements=st.integers(0, 4),
        fill=st.integers(0, 4),
    )
)
def test_any_map_is_encoded_as_pycocotools_does(class_map: ClassMap) -> None:
    assert_as_pycocotools(class_map)


def test_long_and_short_runs_of_large_maps_are_encoded_alike() -> None:
    random = np.random.default_rng(0)
    class_map = np.zeros((1080, 1920), np.uint8)
    class_map[100:900, 300:1500] = random.integers(0, 3, (800, 1200), np.uint8)
    class_map[:, 1700:] = 3
    assert_as_pycocotools(class_map)


def test_16_bit_maps_and_a_map_of_one_class_are_encoded() -> None:
    assert_as_pycocotools(np.full((7, 5), 2, np.uint8))
    class_map = np.array([[300, 1], [1, 300]], np.uint16)
    (rle, area) = rles_of(class_map, [300, 7])[300]
    decoded = coco.decode({"size": list(rle.size), "counts": rle.counts})
    np.testing.assert_array_equal(decoded, class_map == 300)
    assert area == 2


def a_frame(wall: float | None = None, stale: bool = False) -> tuple[Frame, Segmentation]:
    class_map = np.zeros((6, 8), np.uint8)
    class_map[3:] = 3
    class_map[5, 7] = 11  # not labelled
    pts = Fraction(1, 4)
    return fakes.a_frame(4, pts, (6, 8), class_map=class_map, wall=wall, stale=stale)


def test_a_line_holds_what_is_in_the_frame(tmp_path: Path) -> None:
    sink = RleLines(tmp_path / "o.jsonl", "street@0123")
    sink.write(*a_frame(wall=1700000000.5, stale=True))
    sink.close()
    line = json.loads((tmp_path / "o.jsonl").read_text())
    classes = line.pop("classes")
    assert line == {
        "frame": 4,
        "name": "000004",
        "pts": 0.25,
        "wall": 1700000000.5,
        "stale": True,
        "size": [6, 8],
        "model": "street@0123",
    }
    assert {name: (entry["area"], entry["share"]) for name, entry in classes.items()} == {
        "Sky": (24, 0.5),
        "Road": (23, round(23 / 48, 6)),
    }
    _, mask = a_frame()
    np.testing.assert_array_equal(coco.decode(classes["Road"]["rle"]), mask.class_map == 3)


def test_only_the_chosen_classes_are_written_whatever_their_case(tmp_path: Path) -> None:
    sink = RleLines(tmp_path / "o.jsonl", "m", classes=["ROAD", "car"])
    sink.write(*a_frame())
    sink.close()
    assert list(json.loads((tmp_path / "o.jsonl").read_text())["classes"]) == ["Road"]


def test_an_unknown_class_is_refused_with_the_list(tmp_path: Path) -> None:
    sink = RleLines(tmp_path / "o.jsonl", "m", classes=["rode"])
    with pytest.raises(ConfigError, match="no class 'rode'; this model's are Sky, Building"):
        sink.write(*a_frame())
    sink.close()
    assert list(tmp_path.iterdir()) == []
