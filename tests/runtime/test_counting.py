"""Counting: objects that come, leave, cross, linger at borders, are lost; and the drawn street."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import cv2
import msgspec
import numpy as np
import pytest

from knet_runtime.counting import ZoneCounter
from knet_runtime.counts import LineCount, ZoneCount, ZoneEvent, marks
from knet_runtime.errors import ConfigError
from knet_runtime.labels import LabelMap
from knet_runtime.segmentation import Instance, Segmentation
from knet_runtime.tracking import Tracker
from knet_runtime.types import Frame, Size
from knet_runtime.zones import Line, Zone, Zones
from knet_synthetic import Street
from knet_synthetic.canvas import CAMVID11

HW = (100, 200)
LABELS = LabelMap(
    ("road", "car", "person"), ((128, 64, 128), (0, 0, 142), (220, 20, 60)), 255, things=(1, 2)
)
YARD = Zone("yard", ((50, 20), (150, 20), (150, 80), (50, 80)))
GATE = Line("gate", ((100, 0), (100, 60)))  # who walks to the right goes to its left


def a_frame(index: int, *, stale: bool = False, hw: Size = HW) -> Frame:
    time = Fraction(index, 10)
    return Frame(np.zeros((*hw, 3), np.uint8), index, time, f"{index:06d}", stale=stale)


def a_result(
    feet: dict[int, tuple[float, float]], class_id: int = 1, hw: Size = HW
) -> Segmentation:
    """Objects by track, each of 4 × 6 pixels on the ground at (x, y)."""
    mask = np.ones((6, 4), np.bool_)
    found = [
        Instance(class_id, 0.9, round(x) - 2, round(y) - 6, mask, track)
        for track, (x, y) in feet.items()
    ]
    return Segmentation.from_instances(found, hw, LABELS)


def walk(
    zones: Zones, places: Sequence[tuple[float, float] | None], patience: int = 3
) -> tuple[list[ZoneEvent], Segmentation]:
    """All events of one object that is in these places (None: not seen), and the last result."""
    count = ZoneCounter(zones, patience)
    events = []
    for index, place in enumerate(places):
        result = count(a_frame(index), a_result({} if place is None else {7: place}))
        assert result.counts is not None
        events += result.counts.events
    return events, result


def said(events: Sequence[ZoneEvent]) -> list[tuple[str, int, object]]:
    return [
        (one.event, one.frame, one.how if one.event != "crossed" else one.direction)
        for one in events
    ]


def test_who_walks_through_a_zone_and_over_a_line_is_counted_once() -> None:
    zones = Zones((YARD,), (GATE,))
    events, result = walk(zones, [(10 * step, 50) for step in range(1, 19)])
    assert said(events) == [
        ("entered", 4, "border"),
        ("crossed", 10, "to_left"),
        ("left", 15, "border"),
    ]
    assert result.counts is not None
    assert result.counts.totals.zones == {"yard": {"car": ZoneCount(0, 1, 1, 0, 0)}}
    assert result.counts.totals.lines == {"gate": {"car": LineCount(1, 0)}}
    first = events[0]
    assert (first.track, first.label, first.zone, first.pts) == (7, "car", "yard", 0.4)
    back, _ = walk(zones, [(10 * step, 50) for step in range(18, 0, -1)])
    assert said(back)[1] == ("crossed", 9, "to_right")


def test_an_object_is_where_it_stands() -> None:
    """The middle of the lower edge of its box decides."""
    events, _ = walk(Zones((YARD,)), [(100, 19)] * 4 + [(100, 20)] * 4)
    assert said(events) == [("entered", 4, "border")]
    events, _ = walk(Zones((YARD,)), [(100, 80)] * 4 + [(100, 81)] * 4)
    assert said(events) == [("entered", 0, "appeared"), ("left", 4, "border")]


@pytest.mark.parametrize("frames", [1, 3, 5])
def test_who_lingers_at_a_border_counts_only_after_so_many_frames(frames: int) -> None:
    zones = Zones((YARD,), (GATE,), frames=frames)
    flicker = [(49, 50), (50, 50)] * 6  # out and in, in turn
    events, _ = walk(zones, flicker)
    assert len(events) == (11 if frames == 1 else 0)
    events, _ = walk(zones, [(99, 50), (101, 50)] * 6)
    assert len(events) - 1 == (11 if frames == 1 else 0)  # and appeared in the zone
    stays = [(49, 50)] * 6 + [(50, 50)] * (frames - 1)
    assert walk(zones, stays)[0] == []
    assert said(walk(zones, [*stays, (50, 50)])[0]) == [("entered", 6, "border")]


def test_who_is_lost_and_found_again_stays_inside() -> None:
    inside, gone = [(100, 50)] * 4, [None] * 3
    events, _ = walk(Zones((YARD,)), [*inside, *gone, *inside])
    assert said(events) == [("entered", 0, "appeared")]


def test_who_is_not_seen_again_leaves_with_its_track() -> None:
    inside, gone = [(100, 50)] * 4, [None] * 4
    events, result = walk(Zones((YARD,)), [*inside, *gone, *inside])
    assert said(events) == [
        *(("entered", 0, "appeared"), ("left", 3, "lost"), ("entered", 8, "appeared"))
    ]
    assert result.counts is not None
    assert result.counts.totals.zones["yard"]["car"] == ZoneCount(1, 2, 1, 2, 1)
    # Who is lost outside has left nothing.
    assert walk(Zones((YARD,)), [(10, 50)] * 4 + [None] * 9)[0] == []


def test_who_is_in_another_scene_left_with_the_last_one() -> None:
    count = ZoneCounter(Zones((YARD,), (GATE,)))
    events: list[ZoneEvent] = []
    for index, scene in enumerate((0, 0, 0, 1, 1, 1)):
        x, track = (90, 7) if scene == 0 else (110, 8)
        result = count(replace(a_frame(index), scene=scene), a_result({track: (x, 50)}))
        assert result.counts is not None
        events += result.counts.events
    assert said(events) == [
        *(("entered", 0, "appeared"), ("left", 2, "lost"), ("entered", 3, "appeared"))
    ]
    assert result.counts is not None
    assert result.counts.totals.zones["yard"]["car"].present == 1


def test_who_was_out_of_sight_while_crossing_has_crossed() -> None:
    events, _ = walk(Zones(lines=(GATE,)), [(90, 50), None, None, *[(110, 50)] * 3])
    assert said(events) == [("crossed", 3, "to_left")]


def test_who_goes_around_the_end_of_a_line_has_not_crossed_it() -> None:
    around = [(90, 50), (90, 70), (110, 70), (110, 50), (110, 50)]
    events, _ = walk(Zones(lines=(GATE,), frames=1), around)
    assert events == []
    events, _ = walk(Zones(lines=(GATE,), frames=1), [*around, (90, 50)])
    assert said(events) == [("crossed", 5, "to_right")]


def test_who_stands_on_a_line_is_still_on_the_side_it_came_from() -> None:
    on = [(90, 50), (100, 50), (100, 50)]
    assert walk(Zones(lines=(GATE,), frames=1), [*on, (90, 50)])[0] == []
    events, _ = walk(Zones(lines=(GATE,), frames=1), [*on, (101, 50)])
    assert said(events) == [("crossed", 3, "to_left")]


def test_classes_are_counted_apart_or_left_out() -> None:
    zones = Zones((YARD, msgspec.structs.replace(YARD, name="cars", classes=("Car",))), frames=1)
    count = ZoneCounter(zones)
    count(a_frame(0), a_result({1: (100, 50)}))
    result = count(a_frame(1), a_result({2: (90, 50), 3: (80, 50)}, class_id=2))
    assert result.counts is not None
    car, people = ZoneCount(1, 1, appeared=1), ZoneCount(2, 2, appeared=2)
    assert result.counts.totals.zones == {
        "yard": {"car": car, "person": people},
        "cars": {"car": car},
    }
    ((_, text),) = marks(result.counts)[0].texts
    assert text == "yard: 3 · in 3 · out 0"


def test_stale_frames_count_for_nothing() -> None:
    count = ZoneCounter(Zones((YARD,)), patience=1)
    for index in range(2):
        count(a_frame(index), a_result({1: (100, 50)}))
    for _ in range(9):
        result = count(a_frame(1, stale=True), a_result({1: (100, 50)}))
        assert result.counts is not None
        assert (result.counts.events, result.counts.totals.zones) == ((), {"yard": {}})
    assert count(a_frame(2), a_result({1: (100, 50)})).counts.events  # type: ignore[union-attr]


def test_zones_scale_with_frames_of_another_size() -> None:
    count = ZoneCounter(Zones((YARD,), frames=1))
    count(a_frame(0), a_result({}))
    hw = (200, 400)
    result = count(a_frame(1, hw=hw), a_result({1: (290, 100), 2: (310, 100)}, hw=hw))
    assert result.counts is not None
    assert [event.track for event in result.counts.events] == [1]


def test_nothing_is_kept_of_objects_that_are_gone() -> None:
    count = ZoneCounter(Zones((YARD,), (GATE,)), patience=2)
    for index in range(300):
        count(a_frame(index), a_result({index: (100, 50)}))
    assert len(count._tracked) == 3


def test_objects_without_tracks_are_refused() -> None:
    mask = np.ones((4, 4), np.bool_)
    result = Segmentation.from_instances([Instance(1, 0.9, 4, 4, mask)], HW, LABELS)
    with pytest.raises(ConfigError, match="let a Tracker see each result first"):
        ZoneCounter(Zones((YARD,)))(a_frame(0), result)


def test_the_overlay_shows_zones_and_numbers() -> None:
    count = ZoneCounter(Zones((YARD,), (GATE,), frames=1))
    result = count(a_frame(0), a_result({1: (100, 50)}))
    image = np.full((*HW, 3), 90, np.uint8)
    plain = a_result({1: (100, 50)}).overlay(image)
    drawn = result.overlay(image)
    assert (drawn != plain).any(2)[20, 50:150].mean() > 0.9  # the yard's upper border
    assert (result.overlay(image, alpha=0) == image).all()
    large = result.overlay(cv2.resize(image, (400, 200)))
    changed = (large != a_result({1: (100, 50)}).overlay(cv2.resize(image, (400, 200)))).any(2)
    assert changed[40, 100:300].mean() > 0.9


# The drawn street: exact masks, and names that last.
STREET_LABELS = msgspec.structs.replace(CAMVID11, things=(8, 9, 10))
AHEAD = Zone("ahead", ((90, 85), (150, 85), (210, 150), (30, 150)))
KERB = Zone("kerb", ((150, 90), (240, 110), (240, 180), (190, 180)), ("Pedestrian", "Car"))
ACROSS = Line("across", ((0, 105.3), (240, 105.3)))
SLANTED = Line("slanted", ((50.1, 180), (120.1, 75)))
Drive = list[tuple[Segmentation, list[tuple[int, ...]]]]


def drive(seed: int, frames: int, step: int = 2) -> Drive:
    """The exact objects of at least 12 pixels in every frame or every ``step``-th one of 30 a
    second, and the name of each."""
    street = Street(seed, (180, 240))
    results = []
    for index in range(frames):
        _, _, objects = street.scene(step * index)
        counts = np.bincount(objects.ids.ravel(), minlength=len(objects.keys) + 1)[1:]
        kept = [place for place, count in enumerate(counts) if count >= 12]
        table = np.zeros(len(counts) + 1, np.uint16)
        table[[place + 1 for place in kept]] = range(1, len(kept) + 1)
        classes = [objects.classes[place] for place in kept]
        scores = [0.9] * len(kept)
        result = Segmentation.from_panoptic(table[objects.ids], classes, scores, STREET_LABELS)
        results.append((result, [objects.keys[place] for place in kept]))
    return results


def sightings(results: Drive, area: Zone | Line) -> list[tuple[str, list[int], list[list[float]]]]:
    """Class, frames and places of each object that counts there; an object that was not seen for
    more than 15 frames is another one from then on."""
    wanted = [name.casefold() for name in area.classes]
    found: dict[tuple[int, ...], list[tuple[str, list[int], list[list[float]]]]] = {}
    for index, (result, names) in enumerate(results):
        for segment in result.segments:
            if not wanted or segment.label.casefold() in wanted:
                parts = found.setdefault(names[segment.id - 1], [])
                if not parts or index - parts[-1][1][-1] > 16:
                    parts.append((segment.label, [], []))
                left, _, right, bottom = segment.box
                parts[-1][1].append(index)
                parts[-1][2].append([(left + right) / 2, bottom])
    return [part for parts in found.values() for part in parts]


def expected(results: Drive, area: Zone | Line) -> Counter[tuple[str, str]]:
    """What is to be counted there, from the exact tracks alone."""
    total: Counter[tuple[str, str]] = Counter()
    for label, frames, places in sightings(results, area):
        if isinstance(area, Zone):
            contour = np.array(area.polygon, np.float32)
            sides = [cv2.pointPolygonTest(contour, place, False) >= 0 for place in places]
            state, words = False, ("left", "entered")
        else:
            a, b = np.array(area.line)
            turns = [float(np.linalg.det([b - a, np.array(place) - a])) for place in places]
            sides = [turn > 0 for turn in turns]
            state, words = sides[0], ("to_left", "to_right")
        for end in range(3, len(sides) + 1):
            if set(sides[end - 3 : end]) == {not state}:
                state = not state
                total[label, words[state]] += isinstance(area, Zone) or _meets(
                    area, places[end - 4], places[end - 3]
                )
        if isinstance(area, Zone) and state and len(results) - 1 - frames[-1] > 15:
            total[label, "left"] += 1
    return +total


def _meets(line: Line, before: list[float], after: list[float]) -> bool:
    """Solves for the point that a line and a step have in common."""
    a, b, p, q = (np.array(point, float) for point in (*line.line, before, after))
    along, step = np.linalg.solve(np.stack([b - a, p - q], 1), p - a)
    return bool(0 <= along <= 1 and 0 <= step <= 1)


def test_counts_on_the_drawn_street_are_those_of_the_exact_tracks() -> None:
    zones = Zones((AHEAD, KERB), (ACROSS, SLANTED))
    results = drive(3, 60)
    names: dict[tuple[int, ...], int] = {}
    track, count, count_exact = Tracker(), ZoneCounter(zones), ZoneCounter(zones)
    for index, (result, keys) in enumerate(results):
        frame = a_frame(index)
        ids = {one.id: names.setdefault(keys[one.id - 1], len(names)) for one in result.segments}
        exact = count_exact(frame, result.with_tracks(ids)).counts
        tracked = count(frame, track(frame, result)).counts
    assert exact is not None
    assert tracked is not None
    assert tracked.totals == exact.totals
    for area in zones.areas():
        wanted = expected(results, area)
        assert wanted
        totals = exact.totals.zones if isinstance(area, Zone) else exact.totals.lines
        kinds = ("entered", "left") if isinstance(area, Zone) else ("to_left", "to_right")
        found = Counter(
            {
                (label, kind): getattr(one, kind)
                for label, one in totals[area.name].items()
                for kind in kinds
            }
        )
        assert +found == wanted
        if isinstance(area, Zone):
            assert all(one.present == one.entered - one.left for one in totals[area.name].values())


@pytest.mark.parametrize("seed", [0, 4, 20, 24])
def test_counts_of_tracks_are_those_of_the_exact_ones(seed: int) -> None:
    zones = Zones((AHEAD, KERB), (ACROSS, SLANTED))
    names: dict[tuple[int, ...], int] = {}
    track, count, count_exact = Tracker(), ZoneCounter(zones), ZoneCounter(zones)
    for index, (result, keys) in enumerate(drive(seed, 45, step=1)):
        frame = a_frame(index)
        ids = {one.id: names.setdefault(keys[one.id - 1], len(names)) for one in result.segments}
        exact = count_exact(frame, result.with_tracks(ids)).counts
        tracked = count(frame, track(frame, result)).counts
    assert exact is not None
    assert tracked is not None
    assert any(exact.totals.zones.values())
    assert tracked.totals == exact.totals
