"""Panoptic quality against the official evaluation's figures, and by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from knet_runtime.errors import DataError
from knet_runtime.labels import LabelMap, distinct_palette
from knet_runtime.panoptic_quality import PanopticQuality, SegmentIds

LABELS = LabelMap(("car", "road"), distinct_palette(2), 255, (0,))


def read(folder: Path, record: dict[str, Any], classes: dict[int, int]) -> SegmentIds:
    picture = cv2.imread(str(folder / record["file_name"]))
    assert picture is not None
    blue, green, red = np.moveaxis(picture.astype(np.int64), 2, 0)
    raw = red + 256 * green + 65536 * blue
    ids = np.zeros(raw.shape, np.uint16)
    for number, segment in enumerate(record["segments_info"], 1):
        ids[raw == segment["id"]] = number
    segments = record["segments_info"]
    crowds = frozenset(number for number, one in enumerate(segments, 1) if one["iscrowd"])
    return SegmentIds(ids, [classes[one["category_id"]] for one in segments], crowds)


def test_it_is_the_official_evaluations(unified: Path) -> None:
    folder = unified / "metrics"
    truth, found, expected = (
        json.loads((folder / f"{name}.json").read_text())
        for name in ("panoptic_gt", "panoptic_pred", "pq_expected")
    )
    categories = truth["categories"]
    classes = {each["id"]: index for index, each in enumerate(categories)}
    names = tuple(each["name"] for each in categories)
    things = tuple(index for index, each in enumerate(categories) if each["isthing"])
    quality = PanopticQuality(LabelMap(names, distinct_palette(len(names)), 255, things))
    answers = {each["image_id"]: each for each in found["annotations"]}
    for record in truth["annotations"]:
        answer = answers[record["image_id"]]
        quality.update(read(folder / "pred", answer, classes), read(folder / "gt", record, classes))
    for ours, theirs in (
        (quality.all, expected["All"]),
        (quality.things, expected["Things"]),
        (quality.stuff, expected["Stuff"]),
    ):
        assert (ours.pq, ours.sq, ours.rq) == pytest.approx(
            (theirs["pq"], theirs["sq"], theirs["rq"]), abs=1e-12
        )
        assert ours.count == theirs["n"]
    for index, ours in enumerate(quality.per_class()):
        theirs = expected["per_class"].get(str(categories[index]["id"]))
        if ours.count:
            assert ours.pq == pytest.approx(theirs["pq"], abs=1e-12)


def ids(*columns: int) -> np.ndarray:
    return np.tile(np.array(columns, np.uint16), (4, 1))


def counts(quality: PanopticQuality) -> list[tuple[int, int, int]]:
    return list(zip(quality.tp.tolist(), quality.fp.tolist(), quality.fn.tolist(), strict=True))


def test_matches_void_and_classes_are_told_apart() -> None:
    quality = PanopticQuality(LABELS)
    # The second found segment lies in void, and is no false positive; half a match is none.
    truth = SegmentIds(ids(1, 1, 1, 0, 0, 2, 2, 2), [0, 1])
    found = SegmentIds(ids(1, 1, 1, 2, 2, 3, 0, 0), [0, 0, 1])
    quality.update(found, truth)
    assert counts(quality) == [(1, 0, 0), (0, 1, 1)]
    assert quality.all.pq == pytest.approx(0.5)
    other = PanopticQuality(LABELS)
    other.update(SegmentIds(ids(1, 1, 1, 0), [1]), SegmentIds(ids(1, 1, 1, 0), [0]))
    assert counts(other) == [(0, 0, 1), (0, 1, 0)]


def test_void_inside_a_match_does_not_count_in_its_union() -> None:
    quality = PanopticQuality(LABELS)
    quality.update(SegmentIds(ids(1, 1, 1, 1), [0]), SegmentIds(ids(1, 1, 0, 0), [0]))
    assert quality.iou.tolist() == [1.0, 0.0]


def test_crowds_are_neither_found_nor_missed() -> None:
    quality = PanopticQuality(LABELS)
    truth = SegmentIds(ids(1, 1, 1, 1, 2, 2), [0, 0], frozenset({1}))
    quality.update(SegmentIds(ids(1, 1, 2, 2, 3, 3), [0, 0, 0]), truth)
    assert counts(quality) == [(1, 0, 0), (0, 0, 0)]
    quality.update(SegmentIds(ids(0, 0, 0, 0, 0, 0), []), truth)
    assert counts(quality) == [(1, 0, 1), (0, 0, 0)]


def test_classes_without_segments_are_left_out_of_the_mean() -> None:
    quality = PanopticQuality(LABELS)
    assert np.isnan(quality.all.pq)
    assert quality.all.count == 0
    quality.update(SegmentIds(ids(1, 1), [0]), SegmentIds(ids(1, 1), [0]))
    assert (quality.all.pq, quality.all.count) == (1.0, 1)
    assert np.isnan(quality.stuff.pq)


def test_maps_of_different_sizes_are_refused() -> None:
    with pytest.raises(DataError, match="the truth is"):
        PanopticQuality(LABELS).update(SegmentIds(ids(1), [0]), SegmentIds(ids(1, 1), [0]))
