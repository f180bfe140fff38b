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


def test_track_gives_objects_ids_that_last(
    call: Call, make_segment_bundle: Make, tmp_path: Path
) -> None:
    encoder = working_encoder(ENCODERS["h264"], (48, 64))
    video = VideoWriter(tmp_path / "drive.mkv", (48, 64), Fraction(1, 25), Fraction(25), encoder)
    for tick in range(6):
        image = np.zeros((48, 64, 3), np.uint8)
        image[..., 2] = 255
        image[8:24, 4 + 4 * tick : 20 + 4 * tick] = (255, 0, 0)
        video.write(image, tick)
    video.close()
    for task in ("panoptic", "instance"):
        lines = tmp_path / f"{task}.jsonl"
        bundle = make_segment_bundle(task).path
        options = ("-b", bundle, "--self-test", "off", "--track", "--json", lines)
        answer = call("run", tmp_path / "drive.mkv", *options)
        assert answer.code == 0, answer.err
        found = [json.loads(line)["segments"] for line in lines.read_text().splitlines()]
        cars = [[one["track"] for one in frame if one["class"] == "car"] for frame in found]
        assert cars == [[1]] * 6


def test_tracking_and_smoothing_are_each_for_their_tasks(
    call: Call, street: Path, make_segment_bundle: Make
) -> None:
    panoptic = make_segment_bundle("panoptic").path
    for options, words in (
        (("--track",), "--track is for bundles of panoptic and instance segmentation"),
        (("-b", panoptic, "--smooth", 2), "--smooth is for bundles of semantic segmentation"),
    ):
        answer = call("run", street, *options)
        assert answer.code == 2
        assert words in answer.err
        assert len(answer.err.splitlines()) == 1
