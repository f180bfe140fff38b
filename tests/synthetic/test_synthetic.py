"""The synthetic street: pure, endless, labelled exactly."""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np
import pytest

from knet_synthetic import CAMVID11, Street

SMALL = (180, 240)


@pytest.fixture(scope="module")
def street() -> Street:
    return Street(3, SMALL)


def test_camvid_has_eleven_classes_and_ignores_the_twelfth() -> None:
    assert CAMVID11.num_classes == 11
    assert CAMVID11.ignore_index == 11
    assert CAMVID11.names[0] == "Sky"


def test_frame_is_a_pure_function_of_seed_and_index(street: Street) -> None:
    other = Street(3, SMALL)
    backwards = {index: other.frame(index) for index in (500, 41, 40, 0)}
    for index in (0, 40, 41, 500):
        image, labels = street.frame(index)
        assert np.array_equal(image, backwards[index][0])
        assert np.array_equal(labels, backwards[index][1])


def test_frames_handed_out_are_not_drawn_over(street: Street) -> None:
    image, labels = street.frame(7)
    kept = image.copy(), labels.copy()
    street.frame(200)
    assert np.array_equal(image, kept[0])
    assert np.array_equal(labels, kept[1])


def test_seeds_give_different_streets() -> None:
    frames = [Street(seed, SMALL).frame(30) for seed in range(4)]
    for a in range(4):
        for b in range(a):
            assert np.mean(frames[a][1] != frames[b][1]) > 0.05
            assert np.abs(frames[a][0].astype(int) - frames[b][0]).mean() > 10


@pytest.mark.parametrize("size", [(96, 128), (97, 131), (360, 480), (301, 203), (720, 1280)])
def test_any_size_gives_rgb_and_labels_of_that_size(size: tuple[int, int]) -> None:
    image, labels = Street(11, size).frame(3)
    assert image.shape == (*size, 3)
    assert image.dtype == np.uint8
    assert labels.shape == size
    assert labels.dtype == np.uint8
    assert image.flags.c_contiguous
    assert labels.flags.c_contiguous
    assert labels.max() <= CAMVID11.ignore_index


def test_every_class_appears_in_shares_like_those_of_real_streets() -> None:
    counts = np.zeros(CAMVID11.num_classes + 1)
    for seed in range(8):
        street = Street(seed, SMALL)
        for index in (30, 420):
            labels = street.frame(index)[1]
            counts += np.bincount(labels.ravel(), minlength=len(counts))
    share = dict(zip((*CAMVID11.names, "void"), counts / counts.sum(), strict=True))
    assert share["void"] == 0
    assert min(share[name] for name in CAMVID11.names) > 0.0005
    assert 0.2 < share["Road"] < 0.5
    assert 0.1 < share["Building"] < 0.4
    assert 0.08 < share["Sky"] < 0.3
    assert share["Car"] > 0.015
    assert share["Bicyclist"] < 0.02


def test_consecutive_frames_are_one_smooth_drive(street: Street) -> None:
    labels = [street.frame(index)[1] for index in (60, 61, 62, 120)]
    for before, after in pairwise(labels[:3]):
        assert 0.0 < np.mean(before != after) < 0.08
    assert np.mean(labels[0] != labels[3]) > np.mean(labels[0] != labels[1])


def test_labels_change_where_the_image_does() -> None:
    """Gradients are far stronger on label borders than away from them, and strongest there
    when the labels are not shifted: the two are drawn on one grid."""
    image, labels = Street(5).frame(90)
    grey = cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (3, 3), 0).astype(np.float32)
    across = np.abs(grey[:, 1:] - grey[:, :-1])
    border = labels[:, 1:] != labels[:, :-1]
    assert across[border].mean() > 3 * across[~border].mean()
    aligned = across[border].mean()
    for shift in (-2, -1, 1, 2):
        assert across[np.roll(border, shift, axis=1)].mean() < aligned


def test_sky_is_brighter_and_plainer_than_buildings() -> None:
    sky, walls, rough_sky, rough_walls = [], [], [], []
    for seed in range(4):
        image, labels = Street(seed, SMALL).frame(45)
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
        rough = np.abs(grey - cv2.blur(grey, (5, 5)))
        inside = cv2.erode((labels == 0).astype(np.uint8), np.ones((7, 7))) > 0
        sky.append(grey[labels == 0].mean())
        walls.append(grey[labels == 1].mean())
        rough_sky.append(rough[inside].mean())
        rough_walls.append(rough[labels == 1].mean())
    assert np.mean(sky) > 1.3 * np.mean(walls)
    assert np.mean(rough_walls) > 1.3 * np.mean(rough_sky)


@pytest.mark.parametrize("index", [10**6, 10**9])
def test_the_street_has_no_end(street: Street, index: int) -> None:
    image, labels = street.frame(index)
    assert len(np.unique(labels)) >= 5
    assert image.std() > 15
    after = street.frame(index + 1)[1]
    assert 0.0 < np.mean(labels != after) < 0.1


def test_a_long_drive_meets_passing_cars_and_junctions_without_fail() -> None:
    street = Street(8, (96, 128))
    for index in range(0, 3000, 71):
        labels = street.frame(index)[1]
        assert (labels == 3).mean() > 0.05


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 32 by 32"):
        Street(0, (8, 480))
    with pytest.raises(ValueError, match="not negative"):
        Street(-1)
    with pytest.raises(IndexError, match="begins at frame 0"):
        Street(0, SMALL).frame(-1)


def test_a_scene_is_its_frame_with_every_object_told_apart(street: Street) -> None:
    for index in (0, 40, 500):
        image, labels = street.frame(index)
        same_image, same_labels, objects = street.scene(index)
        assert np.array_equal(image, same_image)
        assert np.array_equal(labels, same_labels)
        assert np.array_equal(objects.ids > 0, np.isin(labels, (8, 9, 10)))
        assert np.unique(objects.ids).tolist() == list(range(len(objects.classes) + 1))
        for id_, class_id in enumerate(objects.classes, 1):
            assert (labels[objects.ids == id_] == class_id).all()
        assert len(set(objects.keys)) == len(objects.keys) > 3


def test_an_object_keeps_its_key_and_nearly_its_place_from_frame_to_frame(street: Street) -> None:
    previous = street.scene(60)[2]
    for index in range(61, 70):
        objects = street.scene(index)[2]
        for key in set(objects.keys) & set(previous.keys):
            now, before = (one.ids == one.keys.index(key) + 1 for one in (objects, previous))
            if min(now.sum(), before.sum()) > 150:
                assert (now & before).sum() > 0.4 * min(now.sum(), before.sum())
        assert len(set(objects.keys) & set(previous.keys)) > 0.7 * len(objects.keys)
        previous = objects
