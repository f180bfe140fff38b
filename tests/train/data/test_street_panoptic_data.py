"""The script that builds the data of the packaged panoptic model, and the cars drawn by hand."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest

FOLDER = Path(__file__).parents[3] / "train" / "street-panoptic"
CAR, ROAD = 8, 3


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not FOLDER.is_dir():
        pytest.skip("train/street-panoptic/ is not beside the tests")
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("make_data")


def _row_of_cars() -> np.ndarray:
    """Three cars of 30 × 20 pixels that touch, a pole before the second, and one alone."""
    labels = np.full((360, 480), ROAD, np.uint8)
    labels[100:120, 40:130] = CAR
    labels[100:120, 84:86] = 2
    labels[200:220, 40:70] = CAR
    return labels


def _cars(script: ModuleType, **row: Any) -> list[tuple[bool, int, int, int]]:
    """Crowd, first column, last column and area of each, from left to right."""
    segments = script.regions(_row_of_cars(), [script.Row(at=(50, 110), **row)])
    return sorted(
        (crowd, int(mask.any(0).argmax()), int(np.flatnonzero(mask.any(0)).max()), int(mask.sum()))
        for value, crowd, mask in segments
        if value == CAR and not mask[210, 50]
    )


def test_lines_cut_a_row_into_its_cars_and_a_pole_does_not(script: ModuleType) -> None:
    lines = [[[70, 95], [70, 125]], [[100, 95], [100, 125]]]
    one, two, three = _cars(script, cuts=lines)
    # A line's pixels are as near to one part as to the other.
    assert one in ((False, 40, 69, 600), (False, 40, 70, 620))
    assert three in ((False, 100, 129, 600), (False, 101, 129, 580))
    assert two == (False, one[2] + 1, three[1] - 1, 1800 - 40 - one[3] - three[3])


def test_a_part_with_a_named_point_and_a_scrap_are_crowds(script: ModuleType) -> None:
    lines = [[[70, 95], [70, 125]], [[118, 94], [134, 110]]]
    found = _cars(script, cuts=lines, crowds=[[100, 110]])
    assert [crowd for crowd, _, _, _ in found] == [False, True, True]
    assert found[2][3] < script.SMALLEST
    assert sum(area for _, _, _, area in found) == 1800 - 40


def test_a_row_without_lines_is_a_crowd_and_other_regions_are_cars(script: ModuleType) -> None:
    assert _cars(script) == [(True, 40, 129, 1760)]
    segments = script.regions(_row_of_cars(), [script.Row(at=(50, 110))])
    alone = [(crowd, int(m.sum())) for value, crowd, m in segments if m[210, 50] and value == CAR]
    assert alone == [(False, 600)]


def test_the_lines_drawn_by_hand_cut_their_regions(script: ModuleType, shared_data: Path) -> None:
    for name, rows in script.json.loads(script.CARS.read_text())["camvid"].items():
        if not any("cuts" in row for row in rows):
            continue
        file = shared_data / "camvid" / "labels" / "train" / f"{name}.png"
        labels = script._read(file, cv2.IMREAD_UNCHANGED)
        labels[labels != CAR] = script.VOID
        parts = list(script.regions(labels, [script.Row(**row) for row in rows]))
        assert (sum(mask for _, _, mask in parts) == (labels == CAR)).all(), name
        of_point = {
            (x, y): number
            for row in rows
            for x, y in [row["at"], *row.get("crowds", ())]
            for number, (_, _, mask) in enumerate(parts)
            if mask[y, x]
        }
        near = cv2.dilate((labels == CAR).astype(np.uint8), np.ones((5, 5), np.uint8))
        _, groups = cv2.connectedComponents(near, connectivity=8)
        for row in rows:
            x, y = row["at"]
            own = [crowd for _, crowd, mask in parts if (groups[mask] == groups[y, x]).all()]
            # Each line leaves one part more than there was.
            assert len(own) > len(row.get("cuts", ())), (name, row)
            assert ("cuts" in row) == (not all(own)), (name, row)
            assert all(parts[of_point[x, y]][1] for x, y in row.get("crowds", ())), (name, row)


def test_every_car_drawn_by_hand_is_seen(script: ModuleType) -> None:
    for name, drawn in script.json.loads(script.CARS.read_text())["motorway"].items():
        on_top = np.zeros((360, 640), int)
        for number, outline in enumerate(drawn["cars"], 1):
            on_top[script._filled(outline, on_top.shape)] = number
        seen = np.bincount(on_top.ravel(), minlength=len(drawn["cars"]) + 1)[1:]
        assert seen.min() >= 20, (name, seen)


def test_a_motorway_picture_has_the_drawn_cars_on_the_teachers_stuff(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "extra"
    folder.mkdir()
    cv2.imwrite(str(folder / "one.jpg"), np.zeros((360, 480, 3), np.uint8))
    maps = np.zeros((11, 180, 240), np.uint8)
    maps[ROAD], maps[CAR, :, 100:], maps[ROAD, :, 100:] = 255, 255, 0
    cv2.imwrite(str(folder / "one.png"), maps.reshape(-1, 240))
    small = [[40, 10], [44, 10], [44, 14], [40, 14]]
    square = [[10, 10], [29, 10], [29, 29], [10, 29]]
    monkeypatch.setattr(script, "CARS", tmp_path / "cars.json")
    script.CARS.write_text(
        script.json.dumps({"motorway": {"one": {"cars": [small, square], "crowds": [square[:3]]}}})
    )
    pictures = list(script.extra(tmp_path))
    assert len({one.name for one in pictures}) == script.TIMES
    picture = pictures[0]
    assert [(value, crowd) for value, crowd, _ in picture.segments] == [
        (ROAD, False),
        (CAR, True),
        (CAR, True),
        (CAR, False),
    ]
    assert picture.segments[-1][2].sum() == 400
