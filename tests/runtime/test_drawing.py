"""Colours, blend and legend."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from knet_runtime import drawing
from knet_runtime.drawing import blend, colourise, legend_strip
from knet_runtime.errors import ConfigError
from knet_runtime.labels import LabelMap, distinct_palette
from knet_synthetic import CAMVID11

MANY = LabelMap(tuple(f"class {i}" for i in range(300)), distinct_palette(300), 65535)


def test_colourise_is_the_palette_bit_for_bit() -> None:
    class_map = np.random.default_rng(0).integers(0, 11, (37, 53), np.uint8)
    colours = colourise(class_map, CAMVID11)
    assert colours.dtype == np.uint8
    np.testing.assert_array_equal(colours, np.array(CAMVID11.palette, np.uint8)[class_map])


def test_colourise_takes_more_than_256_classes() -> None:
    class_map = np.arange(300, dtype=np.uint16).reshape(20, 15)
    np.testing.assert_array_equal(
        colourise(class_map, MANY), np.array(MANY.palette, np.uint8)[class_map]
    )


@pytest.mark.parametrize("deep", [False, True])
def test_values_without_a_class_are_black_alone_and_clear_in_a_blend(deep: bool) -> None:
    values = np.array([[0, 11, 200, 255]], np.uint8)
    class_map = values.astype(np.uint16) if deep else values
    image = np.full((1, 4, 3), 77, np.uint8)
    assert colourise(class_map, CAMVID11)[0, 1:].max() == 0
    mixed = blend(image, class_map, CAMVID11, 1.0)
    assert mixed[0, 0].tolist() == [128, 128, 128]
    np.testing.assert_array_equal(mixed[0, 1:], image[0, 1:])


def test_the_ignore_value_of_a_16_bit_map_is_clear() -> None:
    image = np.full((1, 2, 3), 9, np.uint8)
    mixed = blend(image, np.array([[65535, 299]], np.uint16), MANY, 1.0)
    assert mixed[0].tolist() == [[9, 9, 9], list(MANY.palette[299])]


@settings(deadline=None)
@given(alpha=st.floats(0, 1), seed=st.integers(0, 99), deep=st.booleans())
def test_blend_is_the_stated_integer_formula(alpha: float, seed: int, deep: bool) -> None:
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (7, 9, 3), np.uint8)
    class_map = random.integers(0, 11, (7, 9), np.uint8)
    before = image.copy()
    weight = round(256 * alpha)
    colours = np.array(CAMVID11.palette, np.int64)[class_map]
    expected = (image.astype(np.int64) * (256 - weight) + colours * weight + 128) // 256
    given_map = class_map.astype(np.uint16) if deep else class_map
    np.testing.assert_array_equal(blend(image, given_map, CAMVID11, alpha), expected)
    np.testing.assert_array_equal(image, before)


def test_blend_is_the_formula_for_every_sample_colour_and_weight() -> None:
    greys = tuple((grey, grey, grey) for grey in range(256))
    labels = LabelMap(tuple(map(str, range(256))), greys, 65535)
    class_map, sample = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    image = np.repeat(sample[..., None], 3, 2)
    for weight in range(257):
        expected = (
            sample.astype(int) * (256 - weight) + class_map.astype(int) * weight + 128
        ) // 256
        mixed = blend(image, class_map, labels, weight / 256)
        np.testing.assert_array_equal(mixed, np.repeat(expected[..., None], 3, 2))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_views_are_drawn_as_their_copies(dtype: type) -> None:
    random = np.random.default_rng(1)
    image = random.integers(0, 256, (20, 30, 3), np.uint8)[::-1, 3:17]
    class_map = random.integers(0, 11, (20, 30)).astype(dtype)[::-1, 3:17]
    colours = colourise(class_map, CAMVID11)
    assert colours.flags.c_contiguous
    np.testing.assert_array_equal(colours, colourise(class_map.copy(), CAMVID11))
    np.testing.assert_array_equal(
        blend(image, class_map, CAMVID11, 0.3), blend(image.copy(), class_map.copy(), CAMVID11, 0.3)
    )


def test_alpha_outside_its_range_and_unequal_sizes_are_refused() -> None:
    image, class_map = np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.uint8)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        blend(image, class_map, CAMVID11, 1.5)
    with pytest.raises(ValueError, match="differ in size"):
        blend(image, class_map[:1], CAMVID11, 0.5)


def test_the_legend_shows_every_colour_and_keeps_its_height() -> None:
    shares = dict.fromkeys(CAMVID11.names, 1 / 11)
    strip = legend_strip(CAMVID11, 480, shares)
    assert strip.shape[1:] == (480, 3)
    pixels = {tuple(pixel) for pixel in strip.reshape(-1, 3).tolist()}
    assert set(CAMVID11.palette) <= pixels
    assert legend_strip(CAMVID11, 480).shape == strip.shape
    assert legend_strip(CAMVID11, 480, {"Sky": 1.0}).shape == strip.shape


@pytest.mark.parametrize("width", [1, 16, 4000])
def test_the_legend_fits_any_width(width: int) -> None:
    assert legend_strip(CAMVID11, width).shape[1] == width


def test_the_legend_of_many_classes_shows_the_largest() -> None:
    strip = legend_strip(MANY, 640, {"class 299": 0.9})
    assert strip.shape == legend_strip(MANY, 640, {"class 5": 0.9}).shape
    assert tuple(MANY.palette[299]) in {tuple(p) for p in strip.reshape(-1, 3).tolist()}


@pytest.mark.skipif(not hasattr(cv2, "FontFace"), reason="OpenCV 4 draws ASCII only")
def test_a_legend_with_names_outside_ascii_is_drawn_as_they_are() -> None:
    colours = ((1, 2, 3), (4, 5, 6))
    drawn = legend_strip(LabelMap(("Straße", "道路"), colours, 255), 300)
    marks = legend_strip(LabelMap(("Stra?e", "??"), colours, 255), 300)
    assert drawn.shape != marks.shape or (drawn != marks).any()
    # The sign itself, not one that stands for all that the font lacks.
    other = legend_strip(LabelMap(("Straße", "道德"), colours, 255), 300)
    assert drawn.shape == other.shape
    assert (drawn != other).any()


def test_without_fonts_a_legend_shows_question_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_HAS_FONTS", False)
    colours = ((1, 2, 3), (4, 5, 6))
    drawn = legend_strip(LabelMap(("Straße", "道路"), colours, 255), 300)
    np.testing.assert_array_equal(
        drawn, legend_strip(LabelMap(("Stra?e", "??"), colours, 255), 300)
    )
