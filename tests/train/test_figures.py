from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from knet_runtime.labels import LabelMap
from knet_runtime.metrics import ConfusionMatrix
from knet_synthetic import CAMVID11
from knet_train.data.check import check, survey
from knet_train.data.dataset import LabelledFolder
from knet_train.data.layouts import ADE20K
from knet_train.figures import draw_confusion, draw_sheet


def drawn(labels: LabelMap, matrix: NDArray[np.int64]) -> NDArray[np.uint8]:
    confusion = ConfusionMatrix(labels.num_classes, labels.ignore_index)
    confusion.matrix = matrix
    return draw_confusion(confusion, labels, "a title")[..., ::-1]


@pytest.mark.parametrize("labels", [CAMVID11, ADE20K], ids=["11", "150"])
def test_dark_cells_are_where_pixels_are(labels: LabelMap) -> None:
    count = labels.num_classes
    diagonal = drawn(labels, np.eye(count, dtype=np.int64) * 9)
    shifted = drawn(labels, np.roll(np.eye(count, dtype=np.int64), 1, axis=1) * 2)
    assert diagonal.shape == shifted.shape
    cell = 46 if count == 11 else 14
    assert diagonal.shape[0] > count * cell
    # The darkest blue, and where it begins: a cell further right once the columns are shifted.
    dark = [np.argwhere((image == (107, 48, 8)).all(2)) for image in (diagonal, shifted)]
    assert len(dark[0]) > count * (cell - 1) ** 2 / 2
    first = [points[points[:, 0] == points[0, 0]][:, 1].min() for points in dark]
    assert abs(first[1] - first[0] - cell) <= 1


def test_a_class_that_was_never_labelled_has_a_grey_row() -> None:
    matrix = np.eye(11, dtype=np.int64)
    whole = drawn(CAMVID11, matrix)
    matrix[4] = 0
    grey = (drawn(CAMVID11, matrix) == 243).all(2).sum() - (whole == 243).all(2).sum()
    assert grey > 0.9 * 11 * 45 * 45


def test_long_and_foreign_names_stay_inside() -> None:
    labels = LabelMap(
        ("Straße", "a very long name of a class, longer than any"), ((0, 0, 0),) * 2, 255
    )
    image = drawn(labels, np.eye(2, dtype=np.int64))
    border = np.concatenate([image[:4].ravel(), image[:, :4].ravel(), image[:, -4:].ravel()])
    assert (border == 255).all()


def test_the_sheet_shows_images_beside_their_painted_labels(
    make_folder: Callable[..., Path],
) -> None:
    root = make_folder([f"p{index:02}" for index in range(20)])
    found = survey(root)
    report, good = check(found)
    shares = {row.name: row.pixels / report.labelled_pixels for row in report.classes}
    sheet = cv2.imdecode(
        np.frombuffer(draw_sheet(LabelledFolder(found.layout, "", good), shares), np.uint8), 1
    )
    few = cv2.imdecode(
        np.frombuffer(draw_sheet(LabelledFolder(found.layout, "", good[:1]), shares), np.uint8), 1
    )
    assert sheet.shape[0] > 3 * few.shape[0]  # four rows of three against one image
    assert sheet.shape[1] > 2.9 * (few.shape[1] - 14)
    magenta = (few == (255, 0, 255)).all(2)
    assert 0 < magenta.sum() < 240  # the label's first line is ignored
