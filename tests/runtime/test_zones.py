"""Zones and lines: which points they hold, how they are read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from knet_runtime.errors import ConfigError
from knet_runtime.labels import LabelMap
from knet_runtime.zones import Line, Zone, Zones, read_zones

LABELS = LabelMap(
    ("road", "car", "person"), ((128, 64, 128), (0, 0, 142), (220, 20, 60)), 255, things=(1, 2)
)
ARROW = ((10.0, 10.0), (90.0, 10.0), (40.0, 50.0), (90.0, 90.0), (10.0, 90.0))


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=3, max_size=7),
    st.lists(st.tuples(st.integers(-4, 44), st.integers(-4, 44)), min_size=20, max_size=20),
)
def test_a_zone_contains_what_opencv_says_lies_in_its_polygon(
    corners: list[tuple[int, int]], points: list[tuple[int, int]]
) -> None:
    zone = Zone("z", tuple(corners))
    try:
        Zones((zone,))
    except ConfigError:
        return  # edges that cross have no inside
    contour = np.array(corners, np.float32)
    for point in points:
        assert zone.contains(point) == (cv2.pointPolygonTest(contour, point, False) >= 0)


def test_borders_and_corners_belong_to_a_zone() -> None:
    zone = Zone("arrow", ARROW)
    assert all(map(zone.contains, (*ARROW, (10, 50), (50, 10), (65, 30))))
    assert not any(map(zone.contains, ((60, 50), (9.9, 50), (40.5, 50), (95, 10), (0, 90))))


def test_sides_of_a_line_are_those_of_who_walks_along_it() -> None:
    down = Line("down", ((50, 0), (50, 100)))  # walking down the image, its right is on the left
    assert down.side((40, 30)) == "right"
    assert down.side((60, 300)) == "left"
    assert down.side((50, 30)) is None
    assert down.crossed((40, 90), (60, 95))
    assert down.crossed((40, 100), (60, 100))
    assert not down.crossed((40, 101), (60, 101))


def write(folder: Path, data: Any) -> Path:
    path = folder / "zones.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data), "utf-8")
    return path


def test_pixels_fractions_and_another_size_name_the_same_places(tmp_path: Path) -> None:
    def read(factor: tuple[float, float], **more: object) -> Zones:
        points = [[x * factor[0], y * factor[1]] for x, y in ARROW]
        line = [[0, 50 * factor[1]], [100 * factor[0], 50 * factor[1]]]
        entries = {
            "zones": [{"name": "yard", "polygon": points, "classes": ["Car"]}],
            "lines": [{"name": "gate", "line": line}],
        }
        return read_zones(write(tmp_path, entries | more)).on((200, 100))

    pixels = read((1, 2))
    assert pixels == read((0.01, 0.01), size=[1, 1]) == read((10, 10), size=[1000, 1000])
    assert pixels.zones[0].polygon == tuple((x, 2 * y) for x, y in ARROW)
    assert (pixels.size, pixels.frames) == ((100, 200), 3)
    assert pixels.on((400, 200)).lines[0].line == ((0, 200), (200, 200))
    assert read((1, 2), frames=9).frames == 9


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    text = json.dumps({"lines": [{"name": "gate", "line": [[0, 0], [9, 9]]}]})
    assert read_zones(write(tmp_path, "\ufeff" + text)).lines[0].name == "gate"


SQUARE = [[0, 0], [10, 0], [10, 10], [0, 10]]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("[1", "is no JSON of zones and lines: Input data was truncated"),
        ("[]", "begin with"),
        ({}, "neither a zone nor a line"),
        ({"zonen": []}, "'zonen' is none of zones, lines, size and frames"),
        ({"zones": {}}, "zones are not a list"),
        ({"zones": [{"polygon": SQUARE}]}, "zone number 1: .*`name`"),
        ({"zones": [{"name": "a", "polygon": SQUARE, "class": "car"}]}, "zone 'a': .*`class`"),
        ({"zones": [{"name": " ", "polygon": SQUARE}]}, "no name that can be shown"),
        ({"zones": [{"name": "a", "polygon": [*SQUARE, "x"]}]}, r"zone 'a': .*polygon\[4\]"),
        ({"zones": [{"name": "a", "polygon": SQUARE[:2]}]}, "zone 'a': 2 points; a polygon has"),
        ({"zones": [{"name": "a", "polygon": [*SQUARE, [0, 0]]}]}, "'a': a point .* twice"),
        (
            {"zones": [{"name": "bow", "polygon": [[0, 0], [9, 9], [9, 0], [0, 9]]}]},
            r"zone 'bow': the edge from \[0, 0\] to \[9, 9\] meets that from \[9, 0\] to \[0, 9\]",
        ),
        ({"zones": [{"name": "a", "polygon": [[0, 0], [9, 0], [5, 0]]}]}, "zone 'a': .* meets"),
        ({"zones": [{"name": "a", "polygon": [*SQUARE, [5, 0]]}]}, "zone 'a': .* meets"),
        ({"lines": [{"name": "g", "line": SQUARE}]}, "line 'g': 4 points; a line has two"),
        ({"lines": [{"name": "g", "line": [[1, 1], [1, 1]]}]}, "line 'g': both points"),
        (
            {"zones": [{"name": "a", "polygon": SQUARE}], "lines": [{"name": "a", "line": SQUARE}]},
            "two have the name 'a'",
        ),
        (
            {"zones": [{"name": "a", "polygon": SQUARE}], "size": [1, 1]},
            r"zone 'a': \[10, 0\] lies outside of the image, which is 1 wide and 1 high",
        ),
        ({"zones": [{"name": "a", "polygon": SQUARE}], "size": [0, 9]}, r"size is \[0.*\]"),
        ({"zones": [{"name": "a", "polygon": SQUARE}], "frames": 0}, "frames is 0"),
        ({"zones": [{"name": "a", "polygon": SQUARE}], "frames": "3"}, "Expected `int`"),
        ('{"zones": [{"name": "a", "polygon": [[1e999, 0]]}]}', "out of range"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(
    tmp_path: Path, data: Any, words: str
) -> None:
    path = write(tmp_path, data)
    with pytest.raises(ConfigError, match=words) as caught:
        read_zones(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.json: No such file"):
        read_zones(tmp_path / "gone.json")
    (tmp_path / "zones.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"zones\.json: is no JSON"):
        read_zones(tmp_path / "zones.json")


def test_points_outside_of_the_frame_and_classes_that_cannot_be_counted_are_refused() -> None:
    far = Zones(lines=(Line("far", ((0, 0), (101, 50))),))
    assert far.on((50, 101)).size == (101, 50)
    with pytest.raises(ConfigError, match=r"line 'far': \[101, 50\] lies outside .* 100 wide"):
        far.on((50, 100))
    for name, words in (
        ("tram", "line 'gate': there is no class 'tram'"),
        ("Road", "line 'gate': road is no class of objects; what can be counted is car, person"),
    ):
        zones = Zones(lines=(Line("gate", ((0, 0), (9, 9)), (name,)),))
        with pytest.raises(ConfigError, match=words):
            zones.check(LABELS)
    Zones(lines=(Line("gate", ((0, 0), (9, 9)), ("CAR", "person")),)).check(LABELS)
