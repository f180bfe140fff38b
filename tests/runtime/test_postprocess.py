from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from knet_runtime.postprocess import candidates, class_map, restore_class_map, upsampled_argmax
from knet_runtime.preprocess import Geometry

torch = pytest.importorskip("torch", reason="PyTorch's own resize is the reference")
functional = torch.nn.functional

SHAPES = st.tuples(*[st.integers(1, top) for top in (20, 24, 24, 90, 90)])


def noise(seed: int, n: int, h: int, w: int) -> np.ndarray:
    return (3 * np.random.default_rng(seed).normal(size=(n, h, w))).astype(np.float32)


def smooth(seed: int, n: int, h: int, w: int) -> np.ndarray:
    """Logits like a trained network's: broad regions, most classes nowhere near winning."""
    coarse = torch.from_numpy(8 * noise(seed, n, 3, 3))[None]
    wide = functional.interpolate(coarse, (h, w), mode="bicubic", align_corners=False)[0].numpy()
    return np.ascontiguousarray(wide)


def resized(logits: np.ndarray, size: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    planes = torch.from_numpy(logits)[None].to(dtype)
    return functional.interpolate(planes, size, mode="bilinear", align_corners=False)[0]


def margin(planes: torch.Tensor) -> np.ndarray:
    if len(planes) == 1:
        return np.full(planes.shape[1:], np.inf)
    top = planes.topk(2, 0).values
    return (top[0] - top[1]).numpy()


@given(shape=SHAPES, seed=st.integers(0, 2**32 - 1), make=st.sampled_from([noise, smooth]))
@settings(max_examples=150, deadline=None)
def test_map_is_that_of_resize_then_argmax(shape, seed, make):
    n, h, w, height, width = shape
    logits = make(seed, n, h, w)
    exact = resized(logits, (height, width), torch.float64)
    ours = upsampled_argmax(logits, (height, width))
    assert ours.shape == (height, width)
    assert ours.dtype == np.uint8
    different = ours != exact.argmax(0).numpy()
    assert not different[margin(exact) > 1e-5].any()


@given(shape=SHAPES, step=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_ties_go_to_the_lowest_class_also_between_the_corners(shape, step, seed):
    n, h, w, _, _ = shape
    # Whole numbers and binary fractions: float32 is exact here, and many pixels are ties.
    logits = np.random.default_rng(seed).integers(-1, 2, (n, h, w)).astype(np.float32)
    exact = resized(logits, (step * h, step * w), torch.float64).numpy()
    np.testing.assert_array_equal(upsampled_argmax(logits, (step * h, step * w)), exact.argmax(0))


@pytest.mark.parametrize("size", [(360, 480), (720, 1280), (90, 120), (45, 60), (33, 7), (200, 1)])
@pytest.mark.parametrize("make", [noise, smooth])
def test_map_is_that_of_float32_pytorch(size, make):
    logits = make(0, 11, 90, 120)
    planes = resized(logits, size, torch.float32)
    different = upsampled_argmax(logits, size) != planes.argmax(0).numpy()
    assert different.mean() <= 1e-5
    if all(side in (45, 90, 360, 480, 720, 1280) for side in size):
        # At these ratios float32 coordinates are exact, in PyTorch too.
        assert not different[margin(planes) > 1e-5].any()


def test_map_agrees_over_many_pixels_at_awkward_ratios():
    rng = np.random.default_rng(1)
    pixels = wrong = 0
    for seed in range(30):
        h, w, height, width = rng.integers(1, (60, 60, 350, 350))
        logits = (noise, smooth)[seed % 2](seed, 7, h, w)
        planes = resized(logits, (height, width), torch.float32)
        different = upsampled_argmax(logits, (height, width)) != planes.argmax(0).numpy()
        assert not different[margin(planes) > 2e-4].any()
        pixels, wrong = pixels + different.size, wrong + int(different.sum())
    assert wrong / pixels <= 1e-5


@pytest.mark.parametrize(("n", "dtype"), [(150, np.uint8), (256, np.uint8), (300, np.uint16)])
def test_many_classes_keep_their_numbers(n, dtype):
    logits = noise(2, n, 7, 9)
    logits[n - 1, 3, 4] = 50
    ours = upsampled_argmax(logits, (28, 36))
    assert ours.dtype == dtype
    assert ours.max() == n - 1
    assert (ours == resized(logits, (28, 36), torch.float32).argmax(0).numpy()).all()


@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 1, 6), (4, 5, 1), (4, 1, 1), (1, 5, 6)])
def test_lowest_class_wins_a_tie(shape):
    assert not upsampled_argmax(np.zeros(shape, np.float32), (11, 13)).any()


@pytest.mark.parametrize("n", [255, 256, 257, 300])
def test_as_many_candidates_as_classes_are_told_apart(n):
    logits = np.zeros((n, 3, 4), np.float32)
    assert not upsampled_argmax(logits, (12, 16)).any()
    logits[n - 1, 1:] = 1
    expected = resized(logits, (12, 16), torch.float64).numpy().argmax(0)
    assert set(expected.ravel().tolist()) == {0, n - 1}
    np.testing.assert_array_equal(upsampled_argmax(logits, (12, 16)), expected)


def test_lowest_of_the_tied_classes_wins_and_not_class_zero():
    logits = np.zeros((5, 4, 4), np.float32)
    logits[[2, 4]] = 1
    assert (upsampled_argmax(logits, (9, 9)) == 2).all()


def test_classes_that_can_not_win_are_left_out():
    logits = noise(3, 150, 16, 16)
    logits[20:] -= 1000
    assert set(candidates(logits)[0].tolist()) <= set(range(20))


def test_pruning_over_several_chunks_keeps_every_winner():
    logits = smooth(4, 40, 80, 100)  # 8,000 numbers a plane: 16 classes a chunk
    winners = np.unique(resized(logits, (160, 200), torch.float64).argmax(0).numpy())
    assert set(winners.tolist()) <= set(candidates(logits)[0].tolist())


def test_logits_need_not_be_contiguous():
    logits = noise(5, 6, 20, 30)
    view = logits[:, 2:15, 3:20]
    assert not view.flags.c_contiguous
    expected = upsampled_argmax(np.ascontiguousarray(view), (50, 60))
    assert (upsampled_argmax(view, (50, 60)) == expected).all()


def test_nan_is_refused_wherever_it_stands():
    for corner in [(0, 0, 0), (3, 7, 8), (1, 4, 4)]:
        logits = noise(6, 4, 8, 9)
        logits[corner] = np.nan
        with pytest.raises(ValueError, match="NaN"):
            upsampled_argmax(logits, (16, 18))


def test_infinity_reaches_no_further_than_a_large_number():
    logits = noise(8, 5, 12, 14)
    logits[1, :, :7] = -np.inf
    logits[3, 2, 3] = np.inf
    finite = np.clip(logits, -1e9, 1e9)
    for size in [(48, 56), (31, 77), (12, 14)]:
        np.testing.assert_array_equal(
            upsampled_argmax(logits, size), upsampled_argmax(finite, size)
        )


def test_other_types_and_shapes_are_refused():
    with pytest.raises(ValueError, match="float32"):
        upsampled_argmax(np.zeros((3, 4, 4)), (8, 8))
    with pytest.raises(ValueError, match=r"\[N, h, w\]"):
        upsampled_argmax(np.zeros((1, 3, 4, 4), np.float32), (8, 8))
    with pytest.raises(ValueError, match="no pixel"):
        upsampled_argmax(np.zeros((3, 4, 4), np.float32), (0, 8))


def test_logits_that_do_not_fit_the_geometry_are_refused():
    geometry = Geometry((30, 40), (16, 24), (0, 0, 16, 20))
    for shape in ((3, 4, 5), (3, 5, 6), (4, 6), (3, 32, 48), (3, 0, 0), (3, 2, 3)):
        with pytest.raises(ValueError, match=r"do not fit an input of \(16, 24\)"):
            class_map(np.zeros(shape, np.float32), geometry)


@given(shape=SHAPES, more=st.tuples(*[st.integers(0, 80)] * 2), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_two_steps_go_through_the_size_between(shape, more, seed):
    n, h, w, *size = shape
    via = (h + more[0], w + more[1])
    logits = (noise, smooth)[seed % 2](seed, n, h, w)
    between = resized(logits, via, torch.float64)
    exact = resized(between.numpy(), size, torch.float64)
    different = upsampled_argmax(logits, tuple(size), via) != exact.argmax(0).numpy()
    assert not different[margin(exact) > 1e-5].any()


def test_two_steps_are_not_one():
    logits = noise(5, 40, 12, 16)
    ours = upsampled_argmax(logits, (60, 200), (93, 127))
    assert (ours != upsampled_argmax(logits, (60, 200))).any()


def test_classes_that_win_only_after_two_steps_are_kept():
    for seed in range(30):
        logits = smooth(seed, 150, 8, 9)
        between = resized(logits, (30, 35), torch.float64)
        winners = resized(between.numpy(), (97, 71), torch.float64).argmax(0).unique()
        assert set(winners.tolist()) <= set(candidates(logits, reach=3)[0].tolist())


def test_a_step_through_a_smaller_size_is_refused():
    with pytest.raises(ValueError, match="smaller size"):
        upsampled_argmax(noise(0, 3, 10, 10), (40, 40), (9, 40))


@given(
    source=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    window=st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(1, 16), st.integers(1, 24)),
)
@settings(max_examples=60, deadline=None)
def test_class_map_of_the_graph_takes_its_nearest_class(source, window):
    classes = np.random.default_rng(0).integers(0, 9, (24, 32)).astype(np.uint8)
    top, left, height, width = window
    restored = restore_class_map(classes, Geometry(source, (24, 32), window))
    inside = classes[top : top + height, left : left + width]
    assert (restored.dtype, restored.shape) == (np.uint8, source)
    # A centre that lies between two pixels may take either.
    fits = np.zeros(source, bool)
    for above, left_of in ((-1e-3, -1e-3), (-1e-3, 1e-3), (1e-3, -1e-3), (1e-3, 1e-3)):
        rows = ((np.arange(source[0]) + 0.5) * height / source[0] + above).astype(int)
        columns = ((np.arange(source[1]) + 0.5) * width / source[1] + left_of).astype(int)
        fits |= restored == inside[rows.clip(0, height - 1)][:, columns.clip(0, width - 1)]
    assert fits.all()


def test_class_map_of_the_graph_at_its_own_size_is_left_as_it_is():
    classes = np.arange(12, dtype=np.uint8).reshape(3, 4)
    restored = restore_class_map(classes, Geometry((3, 4), (3, 4), (0, 0, 3, 4)))
    np.testing.assert_array_equal(restored, classes)


def test_class_map_that_does_not_fit_its_geometry_is_refused():
    with pytest.raises(ValueError, match=r"the class map is \(3, 4\), expected \(4, 4\)"):
        restore_class_map(np.zeros((3, 4), np.uint8), Geometry((9, 9), (4, 4), (0, 0, 4, 4)))
