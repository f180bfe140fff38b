from __future__ import annotations

from typing import Literal

import cv2
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from knet_runtime.bundle.manifest import InputSpec
from knet_runtime.errors import SourceError
from knet_runtime.postprocess import class_map
from knet_runtime.preprocess import PAD_GREY, fit_to_input, keep_ratio, keep_ratio_size, resize

Resize = Literal["stretch", "letterbox"]

SOURCES = st.one_of(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.tuples(st.just(1), st.integers(1, 5000)),
    st.tuples(st.integers(1, 5000), st.just(1)),
    st.sampled_from([(1, 1), (2, 3000), (720, 1280), (1080, 1920), (360, 480)]),
)
SPECS = st.builds(
    lambda cells, stride, resize: InputSpec(
        "image", cells[0] * stride, cells[1] * stride, resize, multiple=stride
    ),
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
    st.sampled_from([1, 4, 8]),
    st.sampled_from(["stretch", "letterbox"]),
)


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def spec(height: int, width: int, resize: Resize) -> InputSpec:
    return InputSpec("image", height, width, resize)


@given(source_hw=SOURCES, spec=SPECS)
@settings(max_examples=150, deadline=None)
def test_any_size_fits_and_the_window_lies_on_the_stride(source_hw, spec):
    stride = spec.multiple
    fitted, geometry = fit_to_input(np.full((*source_hw, 3), 7, np.uint8), spec)
    assert fitted.shape == (spec.height, spec.width, 3)
    assert fitted.dtype == np.uint8
    assert fitted.flags.c_contiguous
    assert geometry.source_hw == source_hw
    assert geometry.model_hw == (spec.height, spec.width)
    top, left, height, width = geometry.window
    assert all(side % stride == 0 for side in geometry.window)
    assert height >= stride
    assert width >= stride
    assert 0 <= top <= spec.height - height
    assert 0 <= left <= spec.width - width
    # The window holds the source and nothing else; around it is padding.
    inside = np.zeros((spec.height, spec.width), bool)
    inside[top : top + height, left : left + width] = True
    assert (fitted[inside] == 7).all()
    assert (fitted[~inside] == PAD_GREY).all()
    assert spec.resize == "letterbox" or inside.all()


@given(source_hw=SOURCES, spec=SPECS, seed=st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_a_point_of_the_logits_comes_back_to_where_it_came_from(source_hw, spec, seed):
    """One cell of the logits is marked: in the class map only source pixels less than a cell from
    it may be, and the one in its middle must be (where the class map has that many pixels)."""
    stride = spec.multiple
    _, geometry = fit_to_input(np.zeros((*source_hw, 3), np.uint8), spec)
    top, left, height, width = (side // stride for side in geometry.window)
    rng = np.random.default_rng(seed)
    row, column = int(rng.integers(height)), int(rng.integers(width))
    logits = np.zeros((2, spec.height // stride, spec.width // stride), np.float32)
    logits[1, top + row, left + column] = 3  # wins as far as a weight of 1/3 reaches
    logits[0] = 1
    found = class_map(logits, geometry)
    assert found.shape == source_hw
    for axis, (cell, cells) in enumerate(((row, height), (column, width))):
        size = source_hw[axis]
        marked = np.flatnonzero(found.any(1 - axis))
        # Pixel centres, in cells: a marked one is less than a cell from the centre of its cell.
        distance = np.abs((marked + 0.5) * cells / size - (cell + 0.5))
        assert (distance < 1).all()
    nearest = [
        min(int((cell + 0.5) * size / cells), size - 1)
        for cell, cells, size in ((row, height, source_hw[0]), (column, width, source_hw[1]))
    ]
    if source_hw[0] >= 4 * height and source_hw[1] >= 4 * width:
        assert found[nearest[0], nearest[1]] == 1


@given(source_hw=SOURCES, seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("mode", ["stretch", "letterbox"])
def test_a_half_and_half_image_comes_back_half_and_half(mode, source_hw, seed):
    """The left part of the source is bright: found again at the right column, within one cell."""
    stride, (height, width) = 4, source_hw
    split = int(np.random.default_rng(seed).integers(width + 1))
    source = np.zeros((height, width, 3), np.uint8)
    source[:, :split] = 255
    fitted, geometry = fit_to_input(source, spec(32, 48, mode))
    cells = fitted.reshape(8, stride, 12, stride, 3).mean((1, 3, 4)).astype(np.float32)
    found = class_map(np.stack([255 - cells, cells]), geometry)
    columns = np.arange(width) + 0.5
    cell = width / (geometry.window[3] / stride)
    sure = np.abs(columns - split) > cell
    assert (found[:, sure] == (columns < split)[sure]).all()


def test_letterbox_keeps_the_ratio_to_half_a_stride():
    _, geometry = fit_to_input(image(720, 1280), spec(360, 480, "letterbox"))
    assert geometry.window == (44, 0, 272, 480)  # 270 rows, snapped to 272
    _, geometry = fit_to_input(image(1280, 720), spec(360, 480, "letterbox"))
    assert geometry.window == (0, 136, 360, 204)


def test_a_image_of_the_right_size_is_untouched():
    source = image(32, 48)
    for mode in ("stretch", "letterbox"):
        fitted, geometry = fit_to_input(source, spec(32, 48, mode))
        assert (fitted == source).all()
        assert geometry.window == (0, 0, 32, 48)


def test_a_view_is_fitted_like_its_copy():
    source = image(64, 50)
    for view in (source[::2, ::-1], source[5:40, 3:33], source[..., ::-1]):
        fitted, _ = fit_to_input(view, spec(32, 48, "stretch"))
        expected, _ = fit_to_input(np.ascontiguousarray(view), spec(32, 48, "stretch"))
        assert fitted.flags.c_contiguous
        assert (fitted == expected).all()


def test_growing_and_mild_shrinking_are_linear():
    source = image(60, 80)
    for size in [(120, 160), (30, 40), (31, 200)]:
        expected = cv2.resize(source, size[::-1], interpolation=cv2.INTER_LINEAR)
        assert (resize(source, size) == expected).all()


def test_strong_shrinking_reads_every_pixel():
    source = np.zeros((100, 100, 3), np.uint8)
    source[:, ::10] = 255  # thin lines that two taps per axis would miss or double
    shrunk = resize(source, (10, 10))
    assert np.abs(shrunk.astype(int) - 25.5).max() <= 1


def test_shrinking_one_axis_and_growing_the_other_averages_only_the_first():
    source = np.zeros((4, 100, 3), np.uint8)
    source[:, ::10] = 255
    source[2:] //= 2
    mixed = resize(source, (8, 10))
    assert mixed.shape == (8, 10, 3)
    assert np.abs(mixed[0].astype(int) - 25.5).max() <= 1
    assert np.abs(mixed[7].astype(int) - 12.75).max() <= 1


@pytest.mark.parametrize(
    ("image", "mend"),
    [
        (np.zeros((4, 4), np.uint8), "COLOR_GRAY2RGB"),
        (np.zeros((4, 4, 1), np.uint8), "COLOR_GRAY2RGB"),
        (np.zeros((4, 4, 4), np.uint8), r"\[\.\.\., :3\]"),
        (np.zeros((3, 4, 5), np.uint8), r"transpose\(1, 2, 0\)"),
        (np.zeros((1, 4, 5, 3), np.uint8), "one frame at a time"),
        (np.zeros((4, 4, 3), np.float32), r"astype\(np.uint8\)"),
        (np.zeros((0, 4, 3), np.uint8), "skip it"),
        ([[0, 0, 0]], r"np\.asarray"),
    ],
)
def test_what_is_no_frame_is_refused_with_the_mend(image, mend):
    with pytest.raises(SourceError, match=mend):
        fit_to_input(image, spec(32, 48, "stretch"))


def test_an_input_off_the_stride_is_refused():
    with pytest.raises(ValueError, match="must be a multiple of 4"):
        spec(30, 48, "stretch")


@pytest.mark.parametrize(
    ("source", "scale", "expected"),
    [
        ((512, 683), (2048, 512), (512, 683)),
        ((364, 500), (2048, 512), (512, 703)),
        ((300, 400), (2048, 512), (512, 683)),
        ((100, 1000), (2048, 512), (205, 2048)),
        ((1000, 100), (2048, 640), (2048, 205)),
        ((1, 5000), (2048, 512), (1, 2048)),
    ],
)
def test_keep_ratio_fits_inside_longest_and_shortest_side(source, scale, expected):
    assert keep_ratio_size(source, scale) == expected


def test_keep_ratio_is_linear_also_where_it_shrinks():
    image = np.random.default_rng(0).integers(0, 256, (90, 200, 3), np.uint8)
    expected = cv2.resize(image, (64, 29), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(keep_ratio(image, (64, 32)), expected)
    np.testing.assert_array_equal(keep_ratio(image, (200, 90)), image)
    with pytest.raises(SourceError, match="grey"):
        keep_ratio(image[..., 0], (64, 32))
