"""Ranges for int8: what is counted, what is made of it, and on which images."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from knet_export.data import ImageSet, open_images
from knet_export.int8 import Method
from knet_export.int8.calibrate import Histogram, split_images
from knet_runtime.errors import DataError, SourceError
from knet_synthetic import CAMVID11, Street

METHODS: tuple[Method, ...] = get_args(Method)


def counted(*arrays: np.ndarray) -> Histogram:
    histogram = Histogram()
    for array in arrays:
        histogram.add(array.astype(np.float32))
    return histogram


def test_minmax_is_the_largest_size_of_either_sign() -> None:
    assert counted(np.array([0.5, -3.0]), np.array([[2.0]])).threshold("minmax") == 3.0


@pytest.mark.parametrize("percent", [50.0, 99.0, 99.99])
def test_percentiles_are_numpys_up_to_a_bin(percent: float) -> None:
    values = np.random.default_rng(0).standard_normal(200_000)
    # Growing values make the histogram grow again and again.
    parts = np.array_split(values[np.abs(values).argsort()], 50)
    expected = np.percentile(np.abs(values), percent)
    found = counted(*parts).threshold("percentile", percent)
    assert abs(found - expected) < 2 * np.abs(values).max() / 2048


def test_the_order_of_images_changes_no_threshold_by_more_than_a_bin() -> None:
    parts = [np.random.default_rng(seed).normal(0, seed + 1, 1000) for seed in range(8)]
    one, other = counted(*parts), counted(*reversed(parts))
    assert one.counts.sum() == other.counts.sum() == 8000
    assert one.threshold("minmax") == other.threshold("minmax")
    a, b = (histogram.threshold("percentile", 99) for histogram in (one, other))
    assert abs(a - b) < one.largest / 1024


def test_entropy_clips_a_lone_outlier_and_keeps_an_even_spread() -> None:
    rng = np.random.default_rng(0)
    tail = counted(rng.standard_normal(100_000), np.array([40.0]))
    assert tail.threshold("entropy") < 15
    even = counted(rng.uniform(0, 6, 100_000))
    assert even.threshold("entropy") > 5.5


def test_no_threshold_passes_what_a_relu6_lets_through() -> None:
    values = np.random.default_rng(0).normal(2, 4, 50_000).clip(0, 6)
    for method in METHODS:
        assert counted(values).threshold(method, 99.999) <= 6.0


def test_what_was_always_zero_has_no_range() -> None:
    zeros = counted(np.zeros((3, 4)))
    assert [zeros.threshold(method, 99.9) for method in METHODS] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_not_counted(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        counted(np.array([1.0, bad]))


def write_images(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        Image.fromarray(Street(number, (32, 48)).frame(0)[0]).save(folder / f"{number}.png")
    return folder


def open_calibration(path: Path) -> ImageSet:
    return open_images(path, "train", CAMVID11, "--calibration")


def test_images_that_score_are_not_those_that_are_measured() -> None:
    ranged, scored = split_images(7)
    assert sorted(ranged + scored) == list(range(7))
    assert len(scored) == 3


def test_a_lone_image_serves_as_both() -> None:
    assert split_images(1) == ([0], [0])


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"--calibration .*nothing: has no images"):
        open_calibration(tmp_path / "nothing")
    with pytest.raises(DataError, match="absent is not a folder"):
        open_calibration(tmp_path / "absent")


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "some", 2)
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    images = open_calibration(folder)
    assert images.read(0)[0].shape == (32, 48, 3)
    with pytest.raises(SourceError, match=r"1\.png"):
        images.read(1)


def test_a_data_set_is_read_with_its_labels_and_never_by_its_validation_split(
    tmp_path: Path,
) -> None:
    root = data_set(tmp_path / "data", CAMVID11.names)
    images = open_calibration(root)
    assert images.name == "data, split train"
    assert [path.stem for path in images.images] == ["b"]
    image, label = images.read(0)
    assert label is not None
    assert label.shape == image.shape[:2]


def test_a_data_set_of_other_classes_is_refused(tmp_path: Path) -> None:
    root = data_set(tmp_path / "data", ("road", "sky"))
    with pytest.raises(DataError, match="2 instead of 11"):
        open_calibration(root)


def test_a_data_set_with_another_ignore_index_is_refused(tmp_path: Path) -> None:
    root = data_set(tmp_path / "data", CAMVID11.names, ignore_index=255)
    with pytest.raises(DataError, match="the ignore index 255 instead of 11"):
        open_calibration(root)


def data_set(root: Path, names: tuple[str, ...], ignore_index: int = 11) -> Path:
    for split, stem in (("val", "a"), ("train", "b")):
        image, label = Street(1, (32, 48)).frame(0)
        for kind, pixels in (("images", image), ("labels", label)):
            (root / kind / split).mkdir(parents=True)
            Image.fromarray(pixels).save(root / kind / split / f"{stem}.png")
    quoted = ", ".join(f'"{name}"' for name in names)
    (root / "labels.json").write_text(
        f'{{"class_names": [{quoted}], "ignore_index": {ignore_index}}}'
    )
    return root
