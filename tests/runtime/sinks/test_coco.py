"""COCO's results and panoptic format, as pycocotools and others read them."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco

from knet_runtime.errors import ConfigError, OutputError
from knet_runtime.labels import LabelMap
from knet_runtime.segmentation import Instance, Segmentation
from knet_runtime.sinks import CocoPanoptic, CocoResults
from knet_runtime.types import Frame

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

HW = (48, 64)
LABELS = LabelMap(
    ("road", "car", "person"), ((255, 0, 0), (0, 255, 0), (0, 0, 255)), 255, things=(1, 2)
)


def a_frame(index: int, name: str | None = None, *, stale: bool = False) -> Frame:
    image = np.zeros((*HW, 3), np.uint8)
    return Frame(image, index, Fraction(index), name or f"{index:06d}", stale=stale)


def panoptic(segments: int = 3) -> Segmentation:
    ids = np.ones(HW, np.uint16)
    ids.flat[100 : 100 + 2 * segments] = np.arange(2 * segments) // 2 + 1
    ids[40:] = 0
    classes = [0, *([1] * (segments - 1))]
    return Segmentation.from_panoptic(ids, classes, [0.5] * segments, LABELS)


def instances() -> Segmentation:
    found = [
        Instance(1, 0.8, 4, 8, np.ones((16, 16), np.bool_)),
        Instance(2, 0.9, 12, 8, np.ones((16, 20), np.bool_)),
        Instance(2, 0.4, 13, 9, np.ones((3, 3), np.bool_)),
    ]
    return Segmentation.from_instances(found, HW, LABELS)


def test_results_hold_each_whole_mask_with_its_score(tmp_path: Path) -> None:
    sink = CocoResults(tmp_path / "c.json")
    sink.write(a_frame(0), instances())
    sink.write(a_frame(0, stale=True), instances())
    sink.write(a_frame(1), Segmentation.from_instances([], HW, LABELS))
    sink.write(a_frame(2), instances())
    sink.close()
    assert sink.path == tmp_path / "c.json"
    found = json.loads((tmp_path / "c.json").read_text())
    assert [one["image_id"] for one in found] == [0] * 3 + [2] * 3
    for said, (segment, mask) in zip(found, [*instances().masks()] * 2, strict=True):
        assert (said["category_id"], said["score"]) == (segment.class_id, segment.score)
        left, top, right, bottom = segment.box
        assert said["bbox"] == [left, top, right - left, bottom - top]
        decoded = coco.decode(said["segmentation"])
        np.testing.assert_array_equal(decoded[top:bottom, left:right], mask)


def test_results_of_chosen_classes_and_of_no_object(tmp_path: Path) -> None:
    sink = CocoResults(tmp_path / "c.json", classes=["car"])
    sink.write(a_frame(0), instances())
    sink.close()
    assert [one["category_id"] for one in json.loads((tmp_path / "c.json").read_text())] == [1]
    sink = CocoResults(tmp_path / "none.json")
    sink.write(a_frame(0), Segmentation.from_instances([], HW, LABELS))
    sink.close()
    assert json.loads((tmp_path / "none.json").read_text()) == []
    sink = CocoResults(tmp_path / "nothing.json")
    sink.close()
    assert (sink.path, (tmp_path / "nothing.json").exists()) == (None, False)


@pytest.mark.parametrize("make", [panoptic, instances])
def test_panoptic_pngs_and_json_agree(make: type, tmp_path: Path) -> None:
    sink = CocoPanoptic(tmp_path / "p")
    for index in range(2):
        sink.write(a_frame(index), make())
    sink.close()
    said = json.loads((tmp_path / "p/panoptic.json").read_text())
    assert [(one["name"], one["isthing"]) for one in said["categories"]] == [
        ("road", 0),
        ("car", 1),
        ("person", 1),
    ]
    assert [one["id"] for one in said["images"]] == [0, 1]
    assert {(one["height"], one["width"]) for one in said["images"]} == {HW}
    for entry in said["annotations"]:
        picture = cv2.imread(str(tmp_path / "p" / entry["file_name"]), cv2.IMREAD_COLOR_RGB)
        ids = picture.astype(np.int64) @ (1, 256, 65536)
        assert {one["id"] for one in entry["segments_info"]} == set(np.unique(ids)) - {0}
        for one in entry["segments_info"]:
            assert one["area"] == (ids == one["id"]).sum()
            rows, columns = np.nonzero(ids == one["id"])
            left, top, width, height = one["bbox"]
            assert (left, top) == (columns.min(), rows.min())
            assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)


def test_ids_above_a_byte_go_on_in_green(tmp_path: Path) -> None:
    sink = CocoPanoptic(tmp_path)
    sink.write(a_frame(0), panoptic(300))
    sink.close()
    picture = cv2.imread(str(tmp_path / "000000.png"), cv2.IMREAD_COLOR_RGB)
    np.testing.assert_array_equal(picture.astype(int) @ (1, 256, 65536), panoptic(300).segment_map)


@pytest.mark.parametrize("names", [("000000000139", "7"), ("gate", "7")])
def test_names_that_are_numbers_are_the_ids(names: tuple[str, str], tmp_path: Path) -> None:
    sink = CocoResults(tmp_path / "c.json")
    for index, name in enumerate(names):
        sink.write(a_frame(index, name), panoptic(1))
    sink.close()
    found = [one["image_id"] for one in json.loads((tmp_path / "c.json").read_text())]
    assert found == ([139, 7] if names[0] != "gate" else [0, 1])
    sink = CocoResults(tmp_path / "mixed.json")
    sink.write(a_frame(0, "7"), panoptic(1))
    with pytest.raises(OutputError, match="gate: the names before it are numbers"):
        sink.write(a_frame(1, "gate"), panoptic(1))
    sink.close(complete=False)


def test_what_ends_early_is_whole_json_under_a_partial_name(tmp_path: Path) -> None:
    results, folder = CocoResults(tmp_path / "c.json"), CocoPanoptic(tmp_path / "p")
    for sink in (results, folder):
        sink.write(a_frame(0), panoptic())
        sink.close(complete=False)
    assert results.path == tmp_path / "c.partial.json"
    assert len(json.loads(results.path.read_text())) == 3
    said = json.loads((tmp_path / "p/panoptic.partial.json").read_text())
    assert len(said["annotations"]) == len(said["images"]) == 1
    assert (tmp_path / "p/PARTIAL.txt").exists()


@pytest.mark.parametrize(
    ("lines", "kept"),
    [
        (b'[\n{"image_id":0}\n,{"image_id":1}\n,{"ima', 2),
        (b'[\n{"image_id":0}\n]\n', 1),
        (b"[\n", 0),
    ],
)
def test_what_a_killed_run_left_is_ended_at_the_next_start(
    lines: bytes, kept: int, tmp_path: Path
) -> None:
    (tmp_path / ".c.json.0123abcd.part").write_bytes(lines)
    CocoResults(tmp_path / "c.json").close()
    assert len(json.loads((tmp_path / "c.partial.json").read_text())) == kept


def test_an_overwritten_folder_holds_one_run(tmp_path: Path) -> None:
    for index in range(2):
        sink = CocoPanoptic(tmp_path, overwrite=True)
        sink.write(a_frame(index), panoptic())
        sink.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000001.png", "panoptic.json"]
    with pytest.raises(OutputError, match="masks of another run"):
        CocoPanoptic(tmp_path)


def test_class_maps_are_refused(tmp_path: Path) -> None:
    semantic = Segmentation(np.zeros(HW, np.uint8), LABELS)
    for sink in (CocoResults(tmp_path / "c.json"), CocoPanoptic(tmp_path / "p")):
        with pytest.raises(ConfigError, match="this one is semantic"):
            sink.write(a_frame(0), semantic)
        sink.close(complete=False)
    assert list(tmp_path.iterdir()) == []
