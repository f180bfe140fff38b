"""Ids that last: made-up drives with exact tracks, measured by IDF1 and id switches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest

from knet_runtime.errors import ConfigError
from knet_runtime.labels import LabelMap
from knet_runtime.segmentation import Instance, Segmentation
from knet_runtime.tracking import Tracker
from knet_runtime.types import Frame, Size

HW = (120, 200)
LABELS = LabelMap(
    ("road", "car", "person"), ((128, 64, 128), (0, 0, 142), (220, 20, 60)), 255, things=(1, 2)
)


@dataclass
class Mover:
    """A rectangle: its place (x, y) in a frame, size (width, height), class, and the frames in
    which the network finds it (None: all)."""

    place: Callable[[int], tuple[float, float]]
    size: tuple[int, int] = (40, 24)
    class_id: int = 1
    found: Callable[[int], bool] = lambda _: True


def a_frame(index: int, *, stale: bool = False) -> Frame:
    return Frame(np.zeros((*HW, 3), np.uint8), index, None, f"{index:06d}", stale=stale)


def results(movers: Sequence[Mover], frames: int) -> list[tuple[Segmentation, dict[int, int]]]:
    """Each frame's panoptic result, and which mover each of its segments is. The last mover lies
    above; what is seen of fewer than 40 pixels is not found. Segments are in a new order in each
    frame."""
    drive = []
    random = np.random.default_rng(0)
    for index in range(frames):
        owners = np.zeros(HW, np.intp)
        for number, mover in enumerate(movers, 1):
            if mover.found(index):
                x, y = (round(value) for value in mover.place(index))
                wide, tall = mover.size
                owners[max(0, y) : max(0, y + tall), max(0, x) : max(0, x + wide)] = number
        seen = [n for n in range(1, len(movers) + 1) if (owners == n).sum() >= 40]
        random.shuffle(seen)
        ids = np.ones(HW, np.uint16)
        for id_, number in enumerate(seen, 2):
            ids[owners == number] = id_
        classes = [0, *(movers[number - 1].class_id for number in seen)]
        result = Segmentation.from_panoptic(ids, classes, [0.9] * len(classes), LABELS)
        drive.append((result, dict(enumerate(seen, 2))))
    return drive


def measured(movers: Sequence[Mover], frames: int) -> tuple[float, int, int]:
    """IDF1, id switches, and how many tracks there were."""
    track, together, switches = Tracker(), Counter[tuple[int, int]](), 0
    last: dict[int, int] = {}
    for index, (result, truth) in enumerate(results(movers, frames)):
        for segment in track(a_frame(index), result).segments:
            if segment.is_thing:
                assert segment.track is not None
                mover = truth[segment.id]
                together[mover, segment.track] += 1
                switches += last.get(mover, segment.track) != segment.track
                last[mover] = segment.track
    tracks = sorted({found for _, found in together})

    @cache
    def best(mover: int, taken: frozenset[int]) -> int:
        """The most frames that a one-to-one pairing of movers and tracks can have right."""
        if mover > len(movers):
            return 0
        others = [one for one in tracks if one not in taken and together[mover, one]]
        paired = (together[mover, one] + best(mover + 1, taken | {one}) for one in others)
        return max(best(mover + 1, taken), *paired, 0)

    # Every segment is found as it is, so there are as many true boxes as found ones.
    return best(1, frozenset()) / together.total(), switches, len(tracks)


def along(x: float, y: float, dx: float, dy: float = 0) -> Callable[[int], tuple[float, float]]:
    return lambda index: (x + dx * index, y + dy * index)


DRIVES = {
    "moving": ([Mover(along(0, 10, 3)), Mover(along(150, 60, -3)), Mover(along(80, 90, 0))], 40),
    "fast": ([Mover(along(0, 10, 18), (20, 20)), Mover(along(180, 80, -18), (20, 20))], 10),
    "occlusion": ([Mover(along(0, 40, 3), (24, 16)), Mover(along(60, 20, 0), (40, 60), 2)], 50),
    "occlusion by its own class": (
        [Mover(along(0, 40, 3), (24, 16)), Mover(along(60, 20, 0), (40, 60))],
        50,
    ),
    "stopping half hidden": (
        [
            Mover(lambda index: (min(3 * index, 48), 40), (24, 16)),
            Mover(along(60, 20, 0), (40, 60), 2),
        ],
        50,
    ),
    "crossing": ([Mover(along(0, 40, 4)), Mover(along(160, 50, -4))], 40),
    "crossing on foot": (
        [Mover(along(0, 40, 3), (12, 30), 2), Mover(along(150, 40, -3), (12, 30), 2)],
        45,
    ),
    "entering and leaving": (
        [Mover(along(-40, 20, 5)), Mover(along(-140, 20, 5)), Mover(along(300, 70, -6))],
        60,
    ),
    "missed": (
        [
            Mover(along(0, 20, 3), found=lambda index: index % 3 != 0),
            Mover(along(10, 70, 3), found=lambda index: not 10 <= index < 22),
        ],
        40,
    ),
    "side by side": ([Mover(along(5 * n, 10 + 10 * n, 1), (12, 8), 2) for n in range(8)], 40),
}


@pytest.mark.parametrize("name", DRIVES)
def test_each_object_keeps_one_track(name: str) -> None:
    movers, frames = DRIVES[name]
    assert measured(movers, frames) == (1.0, 0, len(movers))


def test_many_random_objects_rarely_switch() -> None:
    scores, switches, frames = [], 0, 0
    for seed in range(5):
        random = np.random.default_rng(seed)
        movers = []
        for _ in range(7):
            x, y, dx, dy = random.uniform((0, 0, -4, -1), (160, 90, 4, 1))
            hidden = random.integers(0, 6)
            movers.append(
                Mover(
                    along(x, y, dx, dy),
                    (int(random.integers(14, 40)), int(random.integers(10, 30))),
                    int(random.integers(1, 3)),
                    lambda index, hidden=hidden: index % 7 != hidden,
                )
            )
        idf1, switched, _ = measured(movers, 40)
        scores.append(idf1)
        switches += switched
        frames += 40
    assert np.mean(scores) > 0.9
    assert switches < 0.1 * frames


def one(x: int, y: int, class_id: int = 1, size: Size = HW) -> Segmentation:
    mask = np.ones((20, 30), np.bool_)
    return Segmentation.from_instances([Instance(class_id, 0.9, x, y, mask)], size, LABELS)


def tracks(result: Segmentation) -> list[int | None]:
    return [segment.track for segment in result.segments]


NONE = Segmentation.from_instances([], HW, LABELS)


@pytest.mark.parametrize(("missing", "wanted"), [(3, 1), (4, 2)])
def test_a_track_lasts_as_many_frames_out_of_sight_as_it_is_told(missing: int, wanted: int) -> None:
    track = Tracker(patience=3)
    for index in range(5):
        assert tracks(track(a_frame(index), one(10 + 4 * index, 50))) == [1]
    for index in range(5, 5 + missing):
        track(a_frame(index), NONE)
    assert tracks(track(a_frame(9), one(10 + 4 * (5 + missing), 50))) == [wanted]


def test_another_class_and_a_place_far_away_are_new_tracks() -> None:
    track = Tracker()
    assert tracks(track(a_frame(0), one(10, 10))) == [1]
    assert tracks(track(a_frame(1), one(10, 10, class_id=2))) == [2]
    assert tracks(track(a_frame(2), one(160, 90))) == [3]


def test_stale_frames_repeat_the_result_and_count_as_none() -> None:
    track = Tracker(patience=0)
    first = track(a_frame(0), one(10, 10))
    for _ in range(5):
        assert track(a_frame(0, stale=True), one(10, 10)) is first
    assert tracks(track(a_frame(1), one(12, 10))) == [1]


def test_a_change_of_size_begins_anew() -> None:
    track = Tracker()
    track(a_frame(0), one(10, 10))
    assert tracks(track(a_frame(1), one(10, 10, size=(240, 400)))) == [2]


def test_another_scene_begins_anew() -> None:
    track = Tracker()
    assert tracks(track(a_frame(0), one(10, 10))) == [1]
    assert tracks(track(replace(a_frame(1), scene=1), one(10, 10))) == [2]
    assert tracks(track(replace(a_frame(2), scene=1), one(11, 10))) == [2]
    assert tracks(track(replace(a_frame(2, stale=True), scene=1), one(90, 10))) == [2]


def test_stuff_has_no_track_and_the_given_result_is_not_changed() -> None:
    ((result, _),) = results([Mover(along(10, 10, 0))], 1)
    tracked = Tracker()(a_frame(0), result)
    assert tracks(tracked) == [None, 1]
    assert tracks(result) == [None, None]
    np.testing.assert_array_equal(tracked.segment_map, result.segment_map)
    overlapping = Tracker()(a_frame(0), one(10, 10))
    assert [(segment.track, mask.sum()) for segment, mask in overlapping.masks()] == [(1, 600)]


def test_class_maps_and_negative_patience_are_refused() -> None:
    semantic = Segmentation(np.zeros(HW, np.uint8), LABELS)
    with pytest.raises(ConfigError, match="leave --track out"):
        Tracker()(a_frame(0), semantic)
    with pytest.raises(ConfigError, match="patience is -1"):
        Tracker(patience=-1)
