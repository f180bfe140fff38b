"""Instance and panoptic results go everywhere that semantic ones go."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from uuid import uuid4

import av
import cv2
import numpy as np
import pytest
from pycocotools import mask as coco

from knet_runtime.labels import LabelMap
from knet_runtime.painting import shade
from knet_runtime.privacy import Concealed, Concealer
from knet_runtime.segmentation import Instance, Segmentation
from knet_runtime.sinks import (
    JsonLines,
    Look,
    MaskFolder,
    OverlayImage,
    OverlayVideo,
    RawMasks,
    RleLines,
    SharedMasks,
)
from knet_runtime.sinks.raw_masks import read_masks
from knet_runtime.sinks.shared_memory import SharedMaskReader
from knet_runtime.sources.base import SourceInfo
from knet_runtime.types import Frame

# pycocotools' own, under NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

HW = (48, 64)
LABELS = LabelMap(
    ("road", "car", "person"), ((255, 0, 0), (0, 255, 0), (0, 0, 255)), 255, things=(1, 2)
)


def panoptic() -> Segmentation:
    segment_map = np.ones(HW, np.uint16)
    segment_map[8:24, 4:20], segment_map[8:24, 30:50], segment_map[40:] = 2, 3, 0
    return Segmentation.from_panoptic(segment_map, [0, 1, 1], [0.9, 0.8, 0.7], LABELS)


def instances() -> Segmentation:
    found = [
        Instance(1, 0.8, 4, 8, np.ones((16, 16), np.bool_)),
        Instance(2, 0.9, 12, 8, np.ones((16, 20), np.bool_), track=5),
    ]
    return Segmentation.from_instances(found, HW, LABELS)


RESULTS = pytest.mark.parametrize("make", [panoptic, instances], ids=["panoptic", "instance"])
Make = Callable[[], Segmentation]


def frame() -> Frame:
    image = np.random.default_rng(0).integers(90, 160, (*HW, 3), np.uint8)
    return Frame(image, 0, Fraction(0), "000000")


@RESULTS
def test_masks_are_classes_and_segments(make: Make, tmp_path: Path) -> None:
    sink = MaskFolder(tmp_path)
    sink.write(frame(), make())
    sink.close()
    for name, wanted in (("000000", make().class_map), ("000000.segments", make().segment_map)):
        read = cv2.imread(str(tmp_path / f"{name}.png"), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(read, wanted)
        assert read.dtype == wanted.dtype


@RESULTS
def test_a_line_of_json_holds_the_segments(make: Make, tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "o.jsonl", "m")
    sink.write(frame(), make())
    sink.close()
    line = json.loads((tmp_path / "o.jsonl").read_text())
    assert line["shares"] == {name: round(share, 6) for name, share in make().shares().items()}
    for said, segment in zip(line["segments"], make().segments, strict=True):
        assert said == {
            "id": segment.id,
            "class": segment.label,
            "score": segment.score,
            "area": segment.area,
            "box": list(segment.box),
            "track": segment.track,
        }


@RESULTS
def test_rle_lines_hold_a_mask_for_each_segment_of_the_wanted_classes(
    make: Make, tmp_path: Path
) -> None:
    sink = RleLines(tmp_path / "o.jsonl", "m", classes=["car"])
    sink.write(frame(), make())
    sink.close()
    line = json.loads((tmp_path / "o.jsonl").read_text())
    assert "classes" not in line
    cars = [(segment, mask) for segment, mask in make().masks() if segment.label == "car"]
    assert len(line["segments"]) == len(cars) > 0
    for said, (segment, mask) in zip(line["segments"], cars, strict=True):
        decoded = coco.decode(said["rle"])
        left, top, right, bottom = segment.box
        np.testing.assert_array_equal(decoded[top:bottom, left:right], mask)
        assert (said["id"], int(decoded.sum())) == (segment.id, segment.area)


@RESULTS
def test_overlays_colour_the_things(make: Make, tmp_path: Path) -> None:
    image = OverlayImage(tmp_path / "o.png", Look(alpha=1.0, legend=True))
    image.write(frame(), make())
    image.close()
    drawn = cv2.imread(str(tmp_path / "o.png"), cv2.IMREAD_COLOR_RGB)
    assert drawn.shape[0] > HW[0]
    assert (drawn[:48] == shade(LABELS.palette[1], 2)).all(2).sum() > 30
    np.testing.assert_array_equal(drawn[45, :], frame().image[45])
    info = SourceInfo("video", HW, Fraction(25), 1, Fraction(1, 25))
    video = OverlayVideo(tmp_path / "o.mp4", info)
    video.write(frame(), make())
    video.close()
    with av.open(str(tmp_path / "o.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 1


@RESULTS
def test_other_processes_get_the_class_map(make: Make, tmp_path: Path) -> None:
    with (tmp_path / "masks.raw").open("wb") as file:
        raw = RawMasks(file.fileno())
        raw.write(frame(), make())
        raw.close()
    with (tmp_path / "masks.raw").open("rb") as file:
        (read,) = read_masks(file)
    np.testing.assert_array_equal(read.class_map, make().class_map)
    if not Path("/dev/shm").is_dir():
        pytest.skip("needs /dev/shm")
    shared = SharedMasks(f"knet-{uuid4().hex}")
    shared.write(frame(), make())
    with SharedMaskReader(shared.name.removeprefix("shared memory ")) as reader:
        newest = reader.latest()
    shared.close()
    assert newest is not None
    np.testing.assert_array_equal(newest.class_map, make().class_map)


@RESULTS
def test_privacy_hides_things(make: Make, tmp_path: Path) -> None:
    sink = OverlayImage(tmp_path / "o.png", Look(alpha=0.0))
    Concealed(sink, Concealer(LABELS, ["car"])).write(frame(), make())
    drawn = cv2.imread(str(tmp_path / "o.png"), cv2.IMREAD_COLOR_RGB)
    hidden = make().class_map == 1
    assert (drawn != frame().image).any(axis=2)[hidden].mean() > 0.9
    np.testing.assert_array_equal(drawn[45], frame().image[45])
