from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from coco_folders import save_ids, write_instances, write_panoptic
from hypothesis import given, settings, strategies as st
from PIL import Image

from knet_runtime.labels import LabelMap, distinct_palette
from knet_synthetic import CAMVID11, Street
from knet_train.config import DataConfig, load_config, override_config
from knet_train.data.batches import Augmented, Samples, SegmentSamples, pasted, street_truth
from knet_train.data.segments import open_segments
from knet_train.data.targets import segment_targets
from knet_train.data.truth import Truth
from knet_train.segment_loss import shrunk

CROWD = {
    "id": 1,
    "image_id": 1,
    "category_id": 7,
    "iscrowd": 1,
    "segmentation": {"size": [20, 30], "counts": [100, 200, 300]},
}
CAMVID = LabelMap(CAMVID11.names, CAMVID11.palette, 255, (8, 9, 10))


def data_config(*settings: str) -> DataConfig:
    plain = ("data.eval_size=[64, 96]", "data.crop=[64, 96]", "data.synthetic_share=0")
    return override_config(load_config("knet-edge"), [*plain, *settings]).data


def truth_of(ids: Any, classes: tuple[int, ...], crowds: frozenset[int] = frozenset()) -> Truth:
    layers = np.asarray(ids, np.uint16)
    return Truth(layers, classes, crowds, np.zeros(layers.shape[1:], np.bool_))


@pytest.mark.parametrize("size", [(64, 96), (96, 32), (70, 45), (33, 130)])
def test_targets_are_the_objects_masks_made_smaller_bilinearly(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(sum(size))
    ids = np.kron(rng.integers(0, 7, (2, 40, 40)), np.ones((1, 4, 4)))[:, : size[0], : size[1]]
    ids[1][rng.random(size) < 0.5] = 0
    ids[1][ids[1] > 0] += 6
    classes = tuple(rng.permutation(12).tolist())
    things = range(6)
    targets = segment_targets(
        torch.from_numpy(ids.astype(np.int64)), truth_of(ids, classes), things
    )
    padded = np.zeros((2, -(-size[0] // 32) * 32, -(-size[1] // 32) * 32))
    padded[:, : size[0], : size[1]] = ids
    for masks, found in ((targets.masks, targets.classes), (targets.stuff, targets.stuff_classes)):
        assert masks.dtype == torch.float32
        for mask, class_id in zip(masks, found.tolist(), strict=True):
            own = (padded == classes.index(class_id) + 1).any(0)
            assert torch.equal(mask, shrunk(torch.from_numpy(own)[None])[0])
    assert sorted(targets.classes.tolist()) == list(things)
    assert sorted(targets.stuff_classes.tolist()) == [c for c in range(12) if c not in things]


def test_crowds_and_what_the_crop_has_lost_are_no_target() -> None:
    ids = torch.zeros((1, 64, 64), dtype=torch.int64)
    ids[0, :20, :20], ids[0, 30:50, 30:50] = 1, 2
    ids[0, 60, 60] = 3  # between the pixels that are looked at
    truth = truth_of(ids, (0, 0, 1, 1), frozenset({2}))
    targets = segment_targets(ids, truth, (0, 1))
    assert targets.classes.tolist() == [0]
    assert len(targets.stuff) == 0


def test_the_image_and_its_objects_are_augmented_alike(tmp_path: Path) -> None:
    write_panoptic(tmp_path, images=1)
    ids = np.full((64, 96), 300)
    ids[20:44, 30:62] = 11
    save_ids(tmp_path / "annotations" / "panoptic_train" / "p0.png", ids)
    pixels = np.repeat(np.where(ids == 11, 255, 0).astype(np.uint8)[..., None], 3, -1)
    Image.fromarray(pixels).save(tmp_path / "train" / "p0.png")
    path = tmp_path / "annotations" / "panoptic_train.json"
    path.write_text(path.read_text().replace("p0.jpg", "p0.png"))
    folder = open_segments(tmp_path, "train", "panoptic")
    settings = data_config("data.photometric=0")
    samples = SegmentSamples(folder, settings, 3, 20, ignore_void=True)
    seen = []
    for index in range(20):
        image, targets = samples[index]
        assert image.shape == (64, 96, 3)
        if not len(targets.masks):
            continue
        shown = shrunk(image[None, ..., 0] > 150)[0]
        assert (shown - targets.masks[0]).abs().mean() < 0.05
        seen.append(float(targets.masks[0].sum()))
    assert len(seen) > 15
    assert max(seen) > 2 * min(seen)


@pytest.mark.parametrize("ignore", [True, False])
def test_what_is_not_labelled_is_void_where_it_is_to_be_ignored(
    tmp_path: Path, ignore: bool
) -> None:
    write_panoptic(tmp_path, images=1)
    ids = np.full((64, 96), 300)
    ids[:, :24] = 0
    save_ids(tmp_path / "annotations" / "panoptic_train" / "p0.png", ids)
    folder = open_segments(tmp_path, "train", "panoptic")
    settings = data_config("data.scale=[1, 1]", "data.aspect=1", "data.flip=0")
    _, targets = SegmentSamples(folder, settings, 3, 1, ignore_void=ignore)[0]
    (stuff,) = targets.stuff
    assert stuff[:, 6:].min() == 1
    assert stuff[:, :6].max() == 0
    if ignore:
        assert targets.void is not None
        assert torch.equal(targets.void, 1 - stuff)
    else:
        assert targets.void is None


def test_void_is_made_smaller_and_so_is_padding() -> None:
    ids = torch.zeros((1, 40, 50), dtype=torch.int64)
    void = torch.zeros((40, 50), dtype=torch.bool)
    void[:8, :8] = True
    targets = segment_targets(ids, truth_of(ids, ()), (0,), void)
    assert targets.void is not None
    assert targets.void.shape == (16, 16)
    known = 1 - targets.void
    assert known[:2, :2].sum() == 0
    assert known[2:10, 2:12].min() == 1
    assert known[:, 13:].sum() == 0
    assert known[10:].sum() == 0


def test_a_sample_is_a_function_of_seed_and_index(tmp_path: Path) -> None:
    write_panoptic(tmp_path, images=3)
    folder = open_segments(tmp_path, "train", "panoptic")
    one, other = (SegmentSamples(folder, data_config(), 1, 9, ignore_void=True) for _ in range(2))
    for index in (5, 0, 8):
        first, second = one[index], other[index]
        assert torch.equal(first[0], second[0])
        for a, b in zip(first[1], second[1], strict=True):
            assert torch.equal(a, b)


def test_copy_paste_lays_things_of_another_image_on_top(tmp_path: Path) -> None:
    write_panoptic(tmp_path, images=2)
    json_path = tmp_path / "annotations" / "panoptic_train.json"
    json_path.write_text(json_path.read_text().replace(".jpg", ".png"))
    for number, grey in enumerate((40, 200)):
        ids = np.full((64, 96), 300)
        ids[:, :8] = 0
        ids[16:32, 16:40] = 11 + number
        ids[40:56, 48:80] = 1_000_000
        ids[16:32, 64:80] = 5  # the crowd
        save_ids(tmp_path / "annotations" / "panoptic_train" / f"p{number}.png", ids)
        path = tmp_path / "train" / f"p{number}.png"
        Image.fromarray(np.full((64, 96, 3), grey, np.uint8)).save(path)
    folder = open_segments(tmp_path, "train", "panoptic")
    still = ["data.scale=[1, 1]", "data.aspect=1", "data.flip=0", "data.photometric=0"]
    settings = data_config(*still, "data.copy_paste=1")
    samples = SegmentSamples(folder, settings, 7, 40, ignore_void=True)
    plain = SegmentSamples(folder, data_config(*still), 7, 40, ignore_void=True)
    areas = set()
    for index in range(40):
        (image, targets), (before, own) = samples[index], plain[index]
        foreign = image[..., 0] != before[..., 0]
        masks = targets.masks
        assert len(masks) == len(own.masks)  # both images' objects lie at the same places
        assert foreign.sum() in (0, 16 * 24, 16 * 32, 16 * 56)
        assert not foreign[16:32, 64:80].any()
        assert not foreign[:, :8].any()
        assert (masks.sum(0) <= 1).all()
        assert torch.equal(masks.sum(0), own.masks.sum(0))
        assert torch.equal(targets.stuff, own.stuff)
        assert targets.void is not None
        assert own.void is not None
        assert torch.equal(targets.void, own.void)
        assert torch.equal(image, samples[index][0])
        areas.add(int(foreign.sum()))
    assert areas == {0, 16 * 24, 16 * 32, 16 * 56}


def test_a_pasted_object_is_known_and_hides_what_was_there() -> None:
    ids = torch.zeros((2, 32, 32), dtype=torch.int32)
    ids[0, :, :16], ids[1, :16, :8] = 1, 2
    void = torch.zeros((32, 32), dtype=torch.bool)
    void[:, 16:] = True
    below = Augmented(
        torch.zeros((32, 32, 3), dtype=torch.uint8),
        ids,
        void,
        truth_of(ids, (2, 0), frozenset({1})),
    )
    others = torch.zeros((1, 32, 32), dtype=torch.int32)
    others[0, 8:24, 4:28], others[0, 24:] = 1, 2
    above = Augmented(
        torch.full((32, 32, 3), 9, dtype=torch.uint8), others, void, truth_of(others, (0, 3))
    )

    class Always:
        def random(self) -> float:
            return 0.9

    image, moved, unknown, truth = pasted(below, above, (0, 1, 2), Always())  # type: ignore[arg-type]
    on_top = others[0] == 1
    assert truth.classes == (2, 0, 0)
    assert truth.crowds == {1}
    assert torch.equal(image[..., 1] == 9, on_top)
    assert torch.equal((moved == 3).any(0), on_top)
    assert not (moved[:, on_top] != 3)[0].any()
    assert not moved[1][on_top].any()
    assert torch.equal(unknown, void & ~on_top)
    assert torch.equal(moved[:, ~on_top], ids[:, ~on_top])
    assert ids[0, 10, 10] == 1  # the sample itself is as it was


@pytest.mark.parametrize("names", [CAMVID11.names, ("Bicyclist", "Car"), ("Car", "Road")])
def test_synthetic_streets_in_the_classes_of_the_data(names: tuple[str, ...]) -> None:
    things = tuple(i for i, name in enumerate(names) if name in ("Car", "Pedestrian", "Bicyclist"))
    labels = LabelMap(tuple(names), distinct_palette(len(names)), 255, things)
    street = Street(3, (96, 128))
    _, classes, objects = street.scene(40)
    image, truth = street_truth(street, 40, labels)
    assert image.shape == (96, 128, 3)
    own = np.array([255, *truth.classes])[truth.ids[0]]
    for index, name in enumerate(CAMVID11.names):
        expected = names.index(name) if name in names else 255
        assert (own[classes == index] == expected).all()
    cars = sum(1 for one in objects.classes if one == CAMVID11.names.index("Car"))
    assert sum(1 for one in truth.classes if one == names.index("Car")) == cars


@settings(max_examples=20, deadline=None)
@given(
    blocks=st.tuples(st.integers(4, 16), st.integers(4, 16)),
    crop=st.tuples(st.integers(32, 100), st.integers(32, 100)),
    scale=st.floats(0.4, 2),
    aspect=st.floats(1, 2),
    flip=st.sampled_from([0, 1]),
    index=st.integers(0, 1000),
)
def test_pixels_classes_and_objects_stay_in_step(
    blocks: tuple[int, int],
    crop: tuple[int, int],
    scale: float,
    aspect: float,
    flip: int,
    index: int,
) -> None:
    # No segment is so thin that it could lie between the pixels of the smaller image.
    grid = np.random.default_rng(index).integers(0, 5, blocks)
    ids = np.kron(grid, np.ones((8, 8))).astype(np.int32)
    size = ids.shape
    levels = np.array([0, 50, 100, 180, 250, 128])  # of ids, and at -1 what pads the image
    classes = np.array([5, 7, 9, 7, 8])
    pixels = levels[ids].astype(np.uint8)[..., None].repeat(3, -1)
    config = data_config(
        f"data.eval_size={list(size)}",
        f"data.crop={list(crop)}",
        f"data.scale=[{scale}, {scale}]",
        f"data.aspect={aspect}",
        f"data.flip={flip}",
        "data.photometric=0",
    )
    planes = np.stack([classes[ids], ids])
    image, moved, _ = Samples(1, config, 0, 1001).augmented((3, index), pixels, planes, -1)
    assert image.shape == (*crop, 3)
    assert moved.shape == (2, *crop)
    found = moved[1].numpy()
    assert np.array_equal(moved[0], np.where(found < 0, -1, classes[found]))
    # A pixel of the image is blended from its neighbours only where these are of several segments.
    kernel = np.ones((5, 5), np.uint8)
    around = found.astype(np.int16)
    plain = cv2.erode(around, kernel) == cv2.dilate(around, kernel)
    differs = np.abs(image[..., 0].numpy().astype(int) - levels[found]) > 2
    assert not (differs & plain)[2:-2, 2:-2].any()  # what lies beyond the edges is not known


def test_an_image_without_an_object_is_a_sample(tmp_path: Path) -> None:
    write_instances(tmp_path, [CROWD], images=2)
    folder = open_segments(tmp_path, "train", "instance")
    for index in range(2):
        truth = folder.read_truth(index)
        targets = segment_targets(torch.from_numpy(truth.ids.astype(np.int64)), truth, (0, 1))
        assert [len(part) for part in targets[:4]] == [0, 0, 0, 0]
        assert targets.masks.shape[1:] == (8, 8)  # 20 × 30, padded to 32 × 32
