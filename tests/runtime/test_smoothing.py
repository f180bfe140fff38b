"""Temporal smoothing: what it holds, what it lets go at once, and that it follows motion."""

from __future__ import annotations

from dataclasses import replace

import cv2
import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from knet_runtime.errors import ConfigError
from knet_runtime.segmentation import Instance, Segmentation
from knet_runtime.smoothing import Smoother
from knet_runtime.types import Frame, Rgb
from knet_synthetic import CAMVID11

HW = (120, 160)
TASKS = pytest.mark.parametrize("task", ["panoptic", "instance"])


def texture(hw: tuple[int, int] = HW, seed: int = 0) -> Rgb:
    """Something that optical flow can hold on to."""
    noise = np.random.default_rng(seed).integers(0, 256, (hw[0] // 4, hw[1] // 4, 3), np.uint8)
    return np.asarray(cv2.resize(noise, hw[::-1], interpolation=cv2.INTER_CUBIC), np.uint8)


def put(
    smoother: Smoother,
    image: Rgb,
    class_map: NDArray[np.generic],
    *,
    stale: bool = False,
    scene: int = 0,
) -> NDArray[np.generic]:
    kept = class_map.copy()
    frame = Frame(image, 0, None, "0", stale=stale, scene=scene)
    result = smoother(frame, Segmentation(class_map, CAMVID11, {})).class_map  # type: ignore[arg-type]
    np.testing.assert_array_equal(class_map, kept)
    assert result.dtype == class_map.dtype
    return result.copy()


def flat(value: int, hw: tuple[int, int] = HW) -> Rgb:
    return np.full(hw, value, np.uint8)


@pytest.mark.parametrize("strength", [1, 2, 5])
def test_a_class_that_stood_is_replaced_after_strength_plus_one_frames(strength: int) -> None:
    smoother, image = Smoother(strength), texture()
    for _ in range(8):
        assert (put(smoother, image, flat(3)) == 3).all()
    for _ in range(strength):
        assert (put(smoother, image, flat(8)) == 3).all()
    assert (put(smoother, image, flat(8)) == 8).all()


def test_a_single_odd_frame_does_not_show() -> None:
    smoother, image = Smoother(1), texture()
    random = np.random.default_rng(1)
    for index in range(12):
        class_map = flat(3)
        if index > 2 and index % 2:
            class_map[random.random(HW) < 0.3] = 8
        assert (put(smoother, image, class_map) == 3).all()


def test_classes_move_with_the_image() -> None:
    """A square that moves 3 pixels a frame stays where it is in the image, with maps that flicker
    by half; held in place it would smear."""
    background, square = texture(seed=1), texture((40, 40), seed=2)
    smoother, random = Smoother(2), np.random.default_rng(0)
    agreements = []
    for index in range(15):
        image, truth = background.copy(), flat(0)
        left = 20 + 3 * index
        image[40:80, left : left + 40] = square
        truth[40:80, left : left + 40] = 8
        seen = truth.copy()
        seen[random.random(HW) < 0.1] = 5
        agreements.append((put(smoother, image, seen) == truth).mean())
    assert agreements[0] < 0.93
    assert min(agreements[4:]) > 0.975


def test_another_scene_and_another_size_take_the_new_map_at_once() -> None:
    smoother = Smoother(4)
    for _ in range(6):
        put(smoother, texture(), flat(3))
    assert (put(smoother, 255 - texture(seed=9), flat(8)) == 8).all()
    for _ in range(6):
        put(smoother, texture(), flat(3))
    assert (put(smoother, texture((90, 200)), flat(1, (90, 200))) == 1).all()


def test_a_scene_of_the_same_look_takes_the_new_map_at_once() -> None:
    smoother = Smoother(4)
    for _ in range(6):
        put(smoother, texture(), flat(3))
    assert (put(smoother, texture(), flat(8)) == 3).all()
    for _ in range(2):
        assert (put(smoother, texture(), flat(8), scene=1) == 8).all()
    assert (put(smoother, texture(), flat(5), stale=True, scene=1) == 8).all()


def test_what_comes_into_view_takes_the_new_map() -> None:
    smoother, wide = Smoother(4), texture((120, 400))
    for index in range(8):
        offset = 8 * index
        class_map = np.asarray((np.arange(offset, offset + 160) // 40) % 11, np.uint8)
        class_map = np.broadcast_to(class_map, HW).copy()
        smoothed = put(smoother, np.ascontiguousarray(wide[:, offset : offset + 160]), class_map)
    assert (smoothed[:, -8:] == class_map[:, -8:]).mean() > 0.99


def test_a_stale_frame_gets_the_last_result_and_changes_nothing() -> None:
    maps = [flat(3)] * 4 + [flat(8)] * 4
    plain, smoother, image = Smoother(2), Smoother(2), texture()
    expected = [put(plain, image, class_map) for class_map in maps]
    for class_map, wanted in zip(maps, expected, strict=True):
        np.testing.assert_array_equal(put(smoother, image, class_map), wanted)
        np.testing.assert_array_equal(put(smoother, image, flat(5), stale=True), wanted)
    assert (put(smoother, texture((50, 60)), flat(5, (50, 60)), stale=True) == 5).all()


def test_the_same_frames_give_the_same_maps() -> None:
    def run() -> list[NDArray[np.generic]]:
        smoother, random = Smoother(2), np.random.default_rng(0)
        moved = [np.roll(texture(), 2 * index, 1) for index in range(6)]
        return [put(smoother, image, random.integers(0, 11, HW, np.uint8)) for image in moved]

    for one, other in zip(run(), run(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("hw", [(1, 1), (8, 300), (16, 16), (17, 33), (900, 17)])
def test_any_size_and_16_bits(hw: tuple[int, int]) -> None:
    smoother, image = Smoother(1), np.zeros((*hw, 3), np.uint8)
    for value in (300, 300, 300, 7):
        smoothed = put(smoother, image, np.full(hw, value, np.uint16))
    assert (smoothed == (300 if min(hw) >= 16 else 7)).all()


def test_strengths_that_can_not_be_are_refused() -> None:
    for strength in (0, -1, 17):
        with pytest.raises(ConfigError, match="from 1 to 16"):
            Smoother(strength)


STUFF, CAR = 3, 8
THINGS = msgspec.structs.replace(CAMVID11, things=(CAR,))


def scene(task: str, left: int | None, *, track: int | None = 1, side: int = 40) -> Segmentation:
    """A square car at ``left``, if there is one, in front of a road that a panoptic result has."""
    if task == "panoptic":
        ids = np.ones(HW, np.uint16)
        if left is not None:
            ids[40 : 40 + side, left : left + side] = 2
        tracks = [None, track]
        return Segmentation.from_panoptic(ids, [STUFF, CAR], [0.9, 0.8], THINGS, {}, tracks)
    car = Instance(CAR, 0.8, left or 0, 40, np.ones((side, side), np.bool_), track)
    return Segmentation.from_instances([] if left is None else [car], HW, THINGS)


def smoothed(smoother: Smoother, image: Rgb, result: Segmentation) -> list[tuple[object, ...]]:
    found = smoother(Frame(image, 0, None, "0"), result)
    assert found.task == result.task
    return [
        (one.class_id, one.track, round(one.score or 0, 3), one.area)
        for one in found.segments
        if one.is_thing
    ]


@TASKS
def test_an_object_that_is_missed_in_a_frame_stays(task: str) -> None:
    smoother, image = Smoother(2), texture()
    car = (CAR, 1, 0.8, 1600)
    for _ in range(5):
        assert smoothed(smoother, image, scene(task, 30)) == [car]
    for _ in range(2):
        assert smoothed(smoother, image, scene(task, None)) == [car]
    assert smoothed(smoother, image, scene(task, None)) == []


@TASKS
def test_two_objects_of_a_class_are_not_one(task: str) -> None:
    """The second takes the place of the first no sooner than another class would."""
    smoother, image = Smoother(2), texture()
    for _ in range(5):
        smoothed(smoother, image, scene(task, 30))
    for _ in range(2):
        assert smoothed(smoother, image, scene(task, 30, track=2)) == [(CAR, 1, 0.8, 1600)]
    assert smoothed(smoother, image, scene(task, 30, track=2)) == [(CAR, 2, 0.8, 1600)]


@TASKS
def test_little_that_is_left_of_an_object_goes(task: str) -> None:
    smoother, image = Smoother(4), texture()
    for _ in range(6):
        smoothed(smoother, image, scene(task, 30))
    changed = image.copy()
    changed[40:80, 30:58] = 255 - changed[40:80, 30:58]  # most of it is uncovered
    assert smoothed(smoother, changed, scene(task, None)) == []


@TASKS
def test_what_lay_under_the_remains_of_an_object_is_shown(task: str) -> None:
    smoother, image = Smoother(4), texture()
    for side in (*[40] * 6, 70):  # what it grew by is not shown yet when it goes
        smoothed(smoother, image, scene(task, 30, side=side))
    found = smoothed(smoother, image, scene(task, 40, track=2, side=8))
    assert found == [(CAR, 2, 0.8, 64)]


@TASKS
def test_what_is_not_smoothed_is_as_it_came(task: str) -> None:
    result = replace(scene(task, 30), image=texture())
    found = Smoother(3)(Frame(texture(), 0, None, "0"), result)
    assert found.image is result.image
    np.testing.assert_array_equal(found.class_map, result.class_map)
    assert [(one.class_id, one.box, one.track) for one in found.segments] == [
        (one.class_id, one.box, one.track) for one in result.segments
    ]


@TASKS
def test_objects_without_tracks_are_refused(task: str) -> None:
    with pytest.raises(ConfigError, match="smoothing needs tracks: let a Tracker see each result"):
        Smoother(2)(Frame(texture(), 0, None, "0"), scene(task, 30, track=None))


def test_tracks_beyond_what_a_map_holds_begin_anew() -> None:
    smoother, image = Smoother(1), texture()
    for _ in range(3):
        assert smoothed(smoother, image, scene("panoptic", 30, track=200_000)) == [
            (CAR, 200_000, 0.8, 1600)
        ]
