"""``knet-deploy run`` with bundles of panoptic and instance segmentation."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from knet_runtime.bundle.store import Bundle
from knet_runtime.sinks.encoder import ENCODERS, VideoWriter, working_encoder

Call = Callable[..., Any]
Make = Callable[[str], Bundle]


@pytest.fixture
def street(tmp_path: Path) -> Path:
    """48 × 64 pixels: a red car and a green person on a blue road."""
    image = np.zeros((48, 64, 3), np.uint8)
    image[..., 2] = 255
    image[8:24, 4:20] = (255, 0, 0)
    image[24:44, 40:48] = (0, 255, 0)
    path = tmp_path / "street.png"
    cv2.imwrite(str(path), image[..., ::-1])
    return path


def found(call: Call, street: Path, *options: object) -> list[str]:
    """The classes of the segments, as --json has them."""
    lines = street.with_name("o.jsonl")
    answer = call("run", street, "--self-test", "off", "--json", lines, *options)
    assert answer.code == 0, answer.err
    return sorted(segment["class"] for segment in json.loads(lines.read_text())["segments"])


def test_score_leaves_out_objects_below_it(
    call: Call, street: Path, make_segment_bundle: Make
) -> None:
    panoptic, instance = make_segment_bundle("panoptic").path, make_segment_bundle("instance").path
    assert found(call, street, "-b", panoptic) == ["car", "person", "road"]
    assert found(call, street, "-b", panoptic, "--score", 0.7) == ["car", "road"]
    assert found(call, street, "-b", instance, "--score", 0.6) == ["car", "person"]
    assert found(call, street, "-b", instance, "--score", 0.65) == ["car"]


def test_top_k_keeps_the_best_objects(call: Call, street: Path, make_segment_bundle: Make) -> None:
    bundle = make_segment_bundle("instance").path
    assert found(call, street, "-b", bundle, "--top-k", 1) == ["car"]


def test_what_has_no_scores_refuses_rules_for_them(
    call: Call, street: Path, make_segment_bundle: Make
) -> None:
    panoptic = make_segment_bundle("panoptic").path
    for options, words in (
        (("--score", 0.5), "--score is for bundles of panoptic and instance segmentation"),
        (("--top-k", 3), "--top-k is for bundles of instance segmentation"),
        (("-b", panoptic, "--top-k", 3), "--top-k is for bundles of instance segmentation"),
        (("-b", panoptic, "--score", 1.5), "--score is 1.5; scores lie from 0 to below 1"),
        (("-b", panoptic, "--score", "nan"), "--score is nan"),
    ):
        answer = call("run", street, *options)
        assert answer.code == 2
        assert words in answer.err
        assert len(answer.err.splitlines()) == 1


def test_coco_outputs_hold_the_segments(
    call: Call, street: Path, make_segment_bundle: Make, tmp_path: Path
) -> None:
    bundle, results, folder = (
        make_segment_bundle("panoptic").path,
        tmp_path / "c.json",
        tmp_path / "p",
    )
    options = ("-b", bundle, "--self-test", "off", "--classes", "car,person")
    answer = call("run", street, *options, "--coco", results, "--coco-panoptic", folder)
    assert answer.code == 0, answer.err
    assert str(results) in answer.out
    assert str(folder) in answer.out
    cars, people = json.loads(results.read_text())
    assert (cars["category_id"], people["category_id"]) == (1, 2)
    assert cars["bbox"] == [4, 8, 16, 16]
    (entry,) = json.loads((folder / "panoptic.json").read_text())["annotations"]
    assert [one["category_id"] for one in entry["segments_info"]] == [0, 1, 2]
    again = call("run", street, *options[:4], "--coco-panoptic", folder)
    assert again.code == 2
    assert "--overwrite" in again.err
    assert call("run", street, *options[:4], "--coco-panoptic", folder, "--overwrite").code == 0


def test_coco_outputs_are_refused_for_class_maps(call: Call, street: Path, tmp_path: Path) -> None:
    for option in ("--coco", "--coco-panoptic"):
        answer = call("run", street, option, tmp_path / "o.json")
        assert answer.code == 2
        assert f"{option} is for bundles of panoptic and instance segmentation" in answer.err


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    """Ten frames: a red car goes to the right, 4 pixels a frame; its middle is at 12, 16 … 48."""
    encoder = working_encoder(ENCODERS["h264"], (48, 64))
    video = VideoWriter(tmp_path / "drive.mkv", (48, 64), Fraction(1, 25), Fraction(25), encoder)
    for tick in range(10):
        image = np.zeros((48, 64, 3), np.uint8)
        image[..., 2] = 255
        image[8:24, 4 + 4 * tick : 20 + 4 * tick] = (255, 0, 0)
        video.write(image, tick)
    video.close()
    return tmp_path / "drive.mkv"


def test_track_gives_objects_ids_that_last(
    call: Call, drive: Path, make_segment_bundle: Make, tmp_path: Path
) -> None:
    for task in ("panoptic", "instance"):
        lines = tmp_path / f"{task}.jsonl"
        bundle = make_segment_bundle(task).path
        options = ("-b", bundle, "--self-test", "off", "--track", "--json", lines)
        answer = call("run", drive, *options)
        assert answer.code == 0, answer.err
        found = [json.loads(line)["segments"] for line in lines.read_text().splitlines()]
        cars = [[one["track"] for one in frame if one["class"] == "car"] for frame in found]
        assert cars == [[1]] * 10


def test_tracking_is_for_objects(call: Call, street: Path) -> None:
    answer = call("run", street, "--track")
    assert answer.code == 2
    assert "--track is for bundles of panoptic and instance segmentation" in answer.err
    assert len(answer.err.splitlines()) == 1


def test_smoothed_objects_have_tracks_and_are_counted(
    call: Call, drive: Path, make_segment_bundle: Make, tmp_path: Path
) -> None:
    zones = write_zones(tmp_path / "zones.json", frames=2)
    for task in ("panoptic", "instance"):
        lines, events = tmp_path / f"{task}.jsonl", tmp_path / f"{task}-events.jsonl"
        options = ("-b", make_segment_bundle(task).path, "--self-test", "off", "--smooth", 2)
        answer = call("run", drive, *options, "--count", zones, "--events", events, "--json", lines)
        assert answer.code == 0, answer.err
        last = json.loads(lines.read_text().splitlines()[-1])
        assert [one["track"] for one in last["segments"] if one["class"] == "car"] == [1]
        *_, totals = map(json.loads, events.read_text().splitlines())
        assert totals["totals"]["lines"]["gate"]["car"]["to_left"] == 1


def write_zones(path: Path, **more: object) -> Path:
    yard = {"name": "yard", "polygon": [[20, 10], [40, 10], [40, 40], [20, 40]], "classes": ["car"]}
    gate = {"name": "gate", "line": [[30, 0], [30, 48]]}
    path.write_text(json.dumps({"zones": [yard], "lines": [gate], **more}))
    return path


def test_count_writes_events_and_totals(
    call: Call, drive: Path, make_segment_bundle: Make, tmp_path: Path
) -> None:
    zones, lines = write_zones(tmp_path / "zones.json", frames=2), tmp_path / "e.jsonl"
    for task in ("panoptic", "instance"):
        options = ("-b", make_segment_bundle(task).path, "--self-test", "off", "--count", zones)
        answer = call("run", drive, *options, "--events", lines)
        assert answer.code == 0, answer.err
        assert "yard: car 1 entered, 1 left, 0 present" in answer.out
        assert "gate: car 1 to the left, 0 to the right" in answer.out
        *events, last = map(json.loads, lines.read_text().splitlines())
        assert [(one["event"], one["frame"], one["track"]) for one in events] == [
            *(("entered", 2, 1), ("crossed", 5, 1), ("left", 8, 1))
        ]
        assert events[0] == {
            **{"event": "entered", "frame": 2, "pts": 0.08, "wall": None, "track": 1},
            **{"class": "car", "zone": "yard", "how": "border"},
        }
        assert events[1]["direction"] == "to_left"
        assert last["frames"] == 10
        assert last["totals"]["lines"] == {"gate": {"car": {"to_left": 1, "to_right": 0}}}
        assert last["totals"]["zones"]["yard"]["car"]["present"] == 0


def test_each_of_several_sources_has_its_zones(
    call: Call, drive: Path, make_segment_bundle: Make, tmp_path: Path
) -> None:
    other = drive.with_name("other.mkv")
    other.write_bytes(drive.read_bytes())
    gate = write_zones(tmp_path / "gate.json", zones=[])
    yard = write_zones(tmp_path / "yard.json", lines=[])
    options = ("--source", drive, "--source", other, "--self-test", "off")
    options = (*options, "-b", make_segment_bundle("panoptic").path)
    answer = call(
        "run", *options, "--count", gate, "--count", yard, "--events", tmp_path / "e.jsonl"
    )
    assert answer.code == 0, answer.err
    found = {
        name: [json.loads(line).get("event") for line in (tmp_path / name).read_text().splitlines()]
        for name in ("e.drive.jsonl", "e.other.jsonl")
    }
    assert found == {"e.drive.jsonl": ["crossed", None], "e.other.jsonl": ["entered", None]}
    answer = call("run", *options, "--count", gate, "--count", yard, "--count", yard)
    assert answer.code == 2
    assert "--count is given 3 times for 2 sources" in answer.err


def test_what_cannot_be_counted_is_refused_in_a_line_that_names_the_file(
    call: Call, drive: Path, make_segment_bundle: Make, tmp_path: Path
) -> None:
    bundle, zones = make_segment_bundle("panoptic").path, tmp_path / "zones.json"
    line = {"name": "far", "line": [[0, 0], [65, 48]]}
    road = {"name": "far", "line": [[0, 0], [64, 48]], "classes": ["road"]}
    for lines, words in (
        ([line], f"{zones}: line 'far': [65, 48] lies outside of the image, which is 64 wide"),
        ([road], f"{zones}: line 'far': road is no class of objects"),
        ([], f"{zones}: there is neither a zone nor a line"),
    ):
        write_zones(zones, zones=[], lines=lines)
        answer = call("run", drive, "-b", bundle, "--count", zones, "-o", tmp_path / "o.mp4")
        assert answer.code == 2
        assert words in answer.err
        assert not list(tmp_path.glob("*o.mp4*"))
    answer = call("run", drive, "-b", bundle, "--events", "-")
    assert (answer.code, "add --count ZONES.json" in answer.err) == (2, True)
    answer = call("run", drive, "--count", write_zones(zones))
    assert "--count is for bundles of panoptic and instance segmentation" in answer.err
