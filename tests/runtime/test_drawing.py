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


def borders_by_hand(ids: np.ndarray, near: int) -> np.ndarray:
    height, width = ids.shape
    found = np.zeros(ids.shape, bool)
    for y in range(height):
        for x in range(width):
            rows = slice(max(0, y - near), y + near + 1)
            found[y, x] = (ids[rows, max(0, x - near) : x + near + 1] != ids[y, x]).any()
    return found


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("band", [60, 1 << 17])  # pixels; the first draws in bands of two rows
def test_lines_follow_every_border_inside_of_the_coloured_regions(
    monkeypatch: pytest.MonkeyPatch, deep: bool, band: int
) -> None:
    monkeypatch.setattr(drawing, "_BAND", band)
    monkeypatch.setattr(drawing, "line_width", lambda _: 2)
    random = np.random.default_rng(4)
    ids = cv2.resize(random.integers(0, 4, (5, 6), np.uint8), (30, 25), interpolation=0)
    if deep:
        ids = np.where(ids == 3, 300, ids).astype(np.uint16)
    image = random.integers(0, 256, (25, 30, 3), np.uint8)
    colours = {0: (255, 0, 0), 1: (0, 255, 0), int(ids.max()): (0, 0, 255)}
    lines = {**colours, 1: (255, 255, 255)}
    drawn = drawing.lay(image, ids, colours, 0.4, lines)
    plain = drawing.lay(image, ids, colours, 0.4)
    border = borders_by_hand(ids, 2) & (ids != 2)  # 2 has no colour, and so no line
    np.testing.assert_array_equal(drawn[~border], plain[~border])
    np.testing.assert_array_equal(drawn[border], drawing.look_up(ids, lines)[border])
    np.testing.assert_array_equal(drawn[ids == 2], image[ids == 2])
    np.testing.assert_array_equal(drawing.lay(image, ids, colours, 0, lines), image)


def test_one_region_to_the_edge_and_an_empty_image_have_no_line() -> None:
    image = np.full((40, 50, 3), 100, np.uint8)
    colours = {0: (0, 0, 200)}
    drawn = drawing.lay(image, np.zeros((40, 50), np.uint8), colours, 0.4, colours)
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) == 1
    nothing = drawing.lay(image, np.full((40, 50), 255, np.uint8), colours, 0.4, colours)
    np.testing.assert_array_equal(nothing, image)
    assert drawing.lay(image[:0], np.zeros((0, 50), np.uint8), colours, 0.4, colours).size == 0


@pytest.mark.parametrize(
    ("size", "letters"), [((240, 320), 8), ((720, 1280), 11), ((2160, 3840), 30)]
)
def test_text_and_lines_grow_with_the_image(size: tuple[int, int], letters: int) -> None:
    _, tall, _ = drawing.text_size("Road", drawing.text_scale(size))
    assert letters <= tall <= 1.6 * letters
    assert drawing.line_width(size) == {240: 1, 720: 2, 2160: 4}[size[0]]


def test_small_shares_are_not_said_to_be_nothing() -> None:
    assert [drawing._percent(share) for share in (0, 0.001, 0.006, 0.5, 1)] == [
        *("0%", "<1%", "1%", "50%", "100%")
    ]
