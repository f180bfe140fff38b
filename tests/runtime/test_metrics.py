from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from knet_runtime.errors import DataError
from knet_runtime.labels import LabelMap
from knet_runtime.metrics import ConfusionMatrix, agreement, worst_class_delta

IGNORE = 255


def maps(seed: int, n: int = 5, shape: tuple[int, ...] = (20, 30)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, n, shape).astype(np.uint8)
    prediction = np.where(rng.random(shape) < 0.7, label, rng.integers(0, n, shape))
    label[rng.random(shape) < 0.1] = IGNORE
    return prediction.astype(np.uint8), label


def counted(prediction: np.ndarray, label: np.ndarray, n: int = 5) -> ConfusionMatrix:
    matrix = ConfusionMatrix(n, IGNORE)
    matrix.update(prediction, label)
    return matrix


@given(seed=st.integers(0, 10_000), n=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_scores_are_those_of_the_definitions(seed, n):
    prediction, label = maps(seed, n)
    matrix = counted(prediction, label, n)
    valid = label != IGNORE
    ious = []
    for index in range(n):
        hits = np.sum((prediction == index) & (label == index) & valid)
        union = np.sum(((prediction == index) | (label == index)) & valid)
        ious.append(hits / union if union else math.nan)
    np.testing.assert_allclose(matrix.iou, ious)
    assert matrix.miou == pytest.approx(np.nanmean(ious))
    assert matrix.scored_classes == np.count_nonzero(np.isfinite(ious))
    assert matrix.pixel_accuracy == pytest.approx(np.mean(prediction[valid] == label[valid]))
    assert matrix.matrix.sum() == valid.sum()


def test_rows_are_labels_and_columns_predictions():
    matrix = counted(np.array([[1, 1, 2]]), np.array([[0, 0, 2]]), 3)
    assert matrix.matrix.tolist() == [[0, 2, 0], [0, 0, 0], [0, 0, 1]]


def test_class_in_neither_labels_nor_predictions_is_left_out_of_the_mean():
    matrix = counted(np.array([[0, 1]]), np.array([[0, 0]]), 4)
    np.testing.assert_array_equal(matrix.iou, [0.5, 0.0, math.nan, math.nan])
    assert matrix.miou == 0.25


def test_nothing_counted_has_no_score():
    matrix = counted(np.zeros((2, 2), np.uint8), np.full((2, 2), IGNORE, np.uint8))
    assert math.isnan(matrix.miou)
    assert math.isnan(matrix.pixel_accuracy)


def test_sum_of_two_is_one_of_both():
    first, second = maps(1), maps(2)
    both = ConfusionMatrix(5, IGNORE)
    both.update(*first)
    both.update(*second)
    assert ((counted(*first) + counted(*second)).matrix == both.matrix).all()
    with pytest.raises(DataError, match="different label maps"):
        counted(*first) + ConfusionMatrix(6, IGNORE)


def test_what_was_predicted_on_ignored_pixels_does_not_matter():
    matrix = counted(np.array([[200, 1]]), np.array([[IGNORE, 1]]))
    assert matrix.matrix.sum() == 1


def test_classes_beyond_255_are_counted():
    label = np.array([[0, 299, 65535]], np.uint16)
    matrix = ConfusionMatrix(300, 65535)
    matrix.update(np.array([[0, 299, 5]], np.uint16), label)
    assert matrix.matrix[299, 299] == 1
    assert matrix.miou == 1.0


@pytest.mark.parametrize(
    ("prediction", "label", "reason"),
    [
        (np.zeros((2, 3), int), np.zeros((3, 2), int), "never resized"),
        (np.zeros((2, 3)), np.zeros((2, 3), int), "prediction is float64"),
        (np.zeros((2, 3), int), np.full((2, 3), 7), "label holds class 7"),
        (np.full((2, 3), -1), np.zeros((2, 3), int), "prediction holds class -1"),
    ],
)
def test_maps_that_do_not_fit_are_refused_and_not_counted(prediction, label, reason):
    matrix = ConfusionMatrix(5, IGNORE)
    with pytest.raises(DataError, match=reason):
        matrix.update(prediction, label)
    assert not matrix.matrix.any()


def test_table_has_a_row_per_class():
    labels = LabelMap(("a", "b"), ((0, 0, 0), (1, 1, 1)), IGNORE)
    rows = counted(np.array([[0, 0, 0]]), np.array([[0, 1, IGNORE]]), 2).rows(labels)
    assert [row.name for row in rows] == ["a", "b"]
    assert (rows[0].iou, rows[0].precision, rows[0].recall, rows[0].pixels) == (0.5, 0.5, 1.0, 1)
    assert math.isnan(rows[1].precision)
    assert rows[1].recall == 0
    with pytest.raises(DataError, match="2 classes"):
        ConfusionMatrix(3, IGNORE).rows(labels)


def test_worst_class_delta_is_signed_and_in_points():
    label = np.array([[0, 0, 1, 1]])
    reference = counted(np.array([[0, 0, 1, 0]]), label, 3)
    better = counted(np.array([[0, 0, 1, 1]]), label, 3)
    delta = worst_class_delta(reference, better)
    assert delta is not None
    assert (delta.index, delta.points) == (1, pytest.approx(50))
    back = worst_class_delta(better, reference)
    assert back is not None
    assert back.points == pytest.approx(-50)


def test_worst_class_delta_leaves_unlabelled_classes_out():
    label = np.array([[0, 0, 0, 0]])
    delta = worst_class_delta(
        counted(np.array([[0, 0, 0, 0]]), label), counted(np.array([[0, 0, 0, 4]]), label)
    )
    assert delta is not None
    assert (delta.index, delta.points) == (0, pytest.approx(-25))


def test_worst_class_delta_of_other_labels_is_refused():
    with pytest.raises(DataError, match="same labels"):
        worst_class_delta(counted(*maps(1)), counted(*maps(2)))
    empty = ConfusionMatrix(5, IGNORE)
    assert worst_class_delta(empty, empty) is None


def test_agreement_is_the_fraction_of_equal_pixels():
    first = np.array([[0, 1], [2, 3]], np.uint8)
    assert agreement(first, first.astype(np.uint16)) == 1.0
    assert agreement(first, np.array([[0, 1], [2, 0]])) == 0.75
    with pytest.raises(DataError, match="never resized"):
        agreement(first, first[:1])
    with pytest.raises(DataError, match="without a pixel"):
        agreement(first[:0], first[:0])


def test_mean_accuracy_leaves_unlabelled_classes_out():
    confusion = ConfusionMatrix(3, 255)
    confusion.update(np.array([0, 0, 1, 2]), np.array([0, 0, 0, 1]))
    assert confusion.mean_accuracy == pytest.approx((2 / 3 + 0) / 2)
    assert math.isnan(ConfusionMatrix(3, 255).mean_accuracy)
