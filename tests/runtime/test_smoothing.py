"""Temporal smoothing: what it holds, what it lets go at once, and that it follows motion."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from knet_runtime.errors import ConfigError
from knet_runtime.segmentation import Segmentation
from knet_runtime.smoothing import Smoother
from knet_runtime.types import Frame, Rgb
from knet_synthetic import CAMVID11

HW = (120, 160)


def texture(hw: tuple[int, int] = HW, seed: int = 0) -> Rgb:
    """Something that optical flow can hold on to."""
    noise = np.random.default_rng(seed).integers(0, 256, (hw[0] // 4, hw[1] // 4, 3), np.uint8)
    return np.asarray(cv2.resize(noise, hw[::-1], interpolation=cv2.INTER_CUBIC), np.uint8)


def put(
    smoother: Smoother, image: Rgb, class_map: NDArray[np.generic], *, stale: bool = False
) -> NDArray[np.generic]:
    kept = class_map.copy()
    frame = Frame(image, 0, None, "0", stale=stale)
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
