"""The losses for instances and panoptic segmentation against the authors' own code."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from narrow_knet import KERNELS, THINGS, Arrays

from knet_train.models.knet import StageOutput
from knet_train.models.segments import SegmentKNet, TrainingOutputs, upsample_twice
from knet_train.published import published_name
from knet_train.segment_loss import (
    Divisors,
    SegmentTargets,
    image_counts,
    loss_divisors,
    match,
    segment_losses,
    shrunk,
)

Narrow = Callable[[str], SegmentKNet]
Stored = Callable[[str], Arrays]
SIZE = (96, 128)
NAMES = {"class": "cls"}


def targets_of(arrays: Arrays, panoptic: bool) -> list[SegmentTargets]:
    found = []
    for index in range(2):
        classes = torch.from_numpy(arrays[f"gt_labels_{index}"])
        packed = np.unpackbits(arrays[f"gt_masks_{index}_packed"], axis=1)
        masks = torch.from_numpy(packed.reshape(-1, *SIZE))
        semantic = torch.from_numpy(arrays[f"gt_sem_{index}"])
        stuff = [c for c in semantic.unique().tolist() if panoptic and THINGS <= c < 133]
        layers = [semantic == label for label in stuff]
        regions = torch.stack(layers) if layers else torch.zeros(0, *SIZE)
        found.append(SegmentTargets(shrunk(masks), classes, shrunk(regions), torch.tensor(stuff)))
    return found


def reference_name(ours: str) -> str:
    """ "stage1_class" as the authors' code calls it."""
    place, kind = ours.split("_")
    if place == "init":
        return f"loss_rpn_{'seg' if kind == 'class' else kind}"
    return f"s{place[-1]}_loss_{NAMES.get(kind, kind)}"


@pytest.fixture(params=["inst", "pan"])
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(narrow: Narrow, task: str) -> SegmentKNet:
    model = narrow(task)
    for name, weight in model.named_parameters():
        if re.match(r"backbone\.(conv1|bn1|layer1)", name):  # as the published recipe freezes
            weight.requires_grad_(False)
    return model


@pytest.fixture
def outputs(model: SegmentKNet, stored: Stored, task: str) -> TrainingOutputs:
    images = torch.from_numpy(stored(f"{task}/train_batch")["img"])
    return model.decode(model.backbone(images))


def test_losses_and_gradients_are_the_authors(
    model: SegmentKNet, outputs: TrainingOutputs, stored: Stored, task: str
) -> None:
    arrays = stored(f"{task}/train_batch")
    losses = segment_losses(
        outputs, targets_of(arrays, task == "pan"), things=model.things, stuff=model.stuff
    )
    expected = arrays["losses"]
    terms = {name for name in expected if "loss_" in name}
    assert {reference_name(name) for name in losses} == terms
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[reference_name(name)], rel=1e-5)
    total = sum(losses.values())
    assert isinstance(total, torch.Tensor)
    assert total.item() == pytest.approx(expected["loss"], rel=1e-6)

    total.backward()
    weights = {published_name(name): weight for name, weight in model.named_parameters()}
    assert weights.keys() == arrays["grad_norms"].keys()
    for name, norm in arrays["grad_norms"].items():
        gradient = weights[name].grad
        if norm is None:
            assert gradient is None
        else:
            assert gradient is not None
            assert float(gradient.norm()) == pytest.approx(norm, rel=1e-4, abs=1e-6)
    for name in (name for name in arrays if name.startswith("grad:")):
        gradient, whole = weights[name.removeprefix("grad:")].grad, arrays[name]
        assert gradient is not None
        difference = np.abs(gradient.numpy().reshape(whole.shape) - whole).max()
        assert difference <= 1e-4 * np.abs(whole).max()


def test_kernels_without_an_object_do_not_count() -> None:
    counts = torch.tensor([[7.0, 2, 100], [1, 0, 50]])
    assert loss_divisors(counts, 4).tolist() == [5, 7, 150]


def test_kernels_get_the_authors_objects(
    outputs: TrainingOutputs, stored: Stored, task: str
) -> None:
    arrays = stored(f"{task}/train_batch")
    targets = targets_of(arrays, task == "pan")
    # The head and the first stage look at the first masks, later stages at the stage before.
    for row, before in enumerate((0, 0, 1, 2)):
        stage = outputs.stages[before]
        masks = upsample_twice(stage.masks[:, :KERNELS]).detach()
        for index, target in enumerate(targets):
            classes = None
            if stage.classes is not None:
                classes = stage.classes[index, :KERNELS].detach()
            found = match(masks[index], classes, target)
            np.testing.assert_array_equal(found.numpy() + 1, arrays["assign"][2 * row + index])


def nothing(classes: int = 0) -> SegmentTargets:
    """An image without an object, and so many classes of stuff all over it."""
    masks = torch.zeros(0, SIZE[0] // 4, SIZE[1] // 4)
    stuff = torch.ones(classes, SIZE[0] // 4, SIZE[1] // 4)
    none = torch.zeros(0, dtype=torch.int64)
    return SegmentTargets(masks, none, stuff, torch.arange(THINGS, THINGS + classes))


@pytest.mark.parametrize("stuff", [0, 2])
def test_a_batch_without_an_object_has_finite_losses_and_gradients(
    model: SegmentKNet, outputs: TrainingOutputs, task: str, stuff: int
) -> None:
    empty = [nothing(stuff if task == "pan" else 0)] * 2
    losses = segment_losses(outputs, empty, things=model.things, stuff=model.stuff)
    total = sum(losses.values())
    assert isinstance(total, torch.Tensor)
    total.backward()
    assert torch.isfinite(total)
    for weight in model.parameters():
        assert weight.grad is None or torch.isfinite(weight.grad).all()


def test_more_objects_than_kernels_leave_the_rest_unmatched() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(7, 8, 8, generator=generator) > 0.5).float()
    none = nothing()
    crowd = SegmentTargets(masks, torch.zeros(7, dtype=torch.int64), none.stuff, none.stuff_classes)
    found = match(torch.randn(3, 8, 8, generator=generator), None, crowd)
    assert sorted(set(found.tolist())) == sorted(found.tolist())  # each another object
    assert (found >= 0).all()


def voided(void: torch.Tensor | None) -> tuple[TrainingOutputs, SegmentTargets]:
    """Four kernels for objects of class 0 and one for stuff of class 1, on 8 × 8 cells, and an
    image whose left half is an object over stuff."""
    generator = torch.Generator().manual_seed(1)
    masks = torch.randn(1, 5, 4, 4, generator=generator) * 3
    masks[0, 3, :, :2], masks[0, 3, :, 2:] = -9.0, 9.0  # the right half
    classes = torch.randn(1, 5, 2, generator=generator)
    stage = StageOutput(torch.zeros(1, 5, 4), masks.requires_grad_(), classes.requires_grad_())
    semantic = torch.randn(1, 2, 4, 4, generator=generator).requires_grad_()
    thing, stuff = torch.zeros(1, 8, 8), torch.zeros(1, 8, 8)
    thing[:, 2:5, 0:3] = 1
    stuff[:, :, :4] = 1 - thing[:, :, :4]
    first = torch.zeros(1, dtype=torch.int64)
    targets = SegmentTargets(thing, first, stuff, first + 1, void)
    return TrainingOutputs([stage._replace(classes=None), stage], semantic), targets


@pytest.mark.parametrize(("weight", "published"), [("class", 2.0), ("rank", 0.1)])
def test_a_weight_is_that_of_its_own_terms(weight: str, published: float) -> None:
    outputs, targets = voided(None)
    once, twice = (
        segment_losses(outputs, [targets], things=[0], stuff=[1], **settings)
        for settings in ({}, {f"{weight}_weight": 2 * published})
    )
    assert once[f"stage0_{weight}"] > 0
    for name, loss in once.items():
        own = name in (f"stage0_{weight}", f"init_{weight}") and name != "init_class"
        torch.testing.assert_close(twice[name], 2 * loss if own else loss)


@pytest.mark.parametrize("stuff", [1, 0])
def test_the_mean_of_the_parts_of_a_step_is_the_loss_of_the_whole(stuff: int) -> None:
    """Four images with 3, 2, 1 and 0 objects, of which the second half has no stuff."""
    generator = torch.Generator().manual_seed(2)
    masks = torch.randn(4, 4 + stuff, 4, 4, generator=generator) * 3
    classes = torch.randn(4, 4 + stuff, 1 + stuff, generator=generator)
    semantic = torch.randn(4, 1 + stuff, 4, 4, generator=generator)
    targets = []
    for objects, regions in ((3, stuff), (2, stuff), (1, 0), (0, 0)):
        drawn = (torch.rand(objects + regions, 8, 8, generator=generator) > 0.6).float()
        labels = torch.tensor([0] * objects + [1] * regions, dtype=torch.int64)
        targets.append(
            SegmentTargets(drawn[:objects], labels[:objects], drawn[objects:], labels[objects:])
        )

    def losses_of(part: slice, divisors: Divisors | None) -> torch.Tensor:
        stage = StageOutput(torch.zeros(1), masks[part], classes[part])
        outputs = TrainingOutputs([stage._replace(classes=None), stage, stage], semantic[part])
        things, rows = [0], [1] * stuff
        losses = segment_losses(
            outputs, targets[part], things=things, stuff=rows, divisors=divisors
        )
        return torch.stack(list(losses.values()))

    whole, halves = losses_of(slice(None), None), (slice(0, 2), slice(2, 4))
    counts = image_counts(targets)
    assert counts[:, 0].tolist() == [3, 2, 1, 0]
    divisors = loss_divisors(counts, 4)
    parts = [losses_of(half, Divisors(*(divisors / 2))) for half in halves]
    torch.testing.assert_close((parts[0] + parts[1]) / 2, whole)
    torch.testing.assert_close(losses_of(slice(None), Divisors(*divisors)), whole)
    alone = [losses_of(half, None) for half in halves]
    assert ((alone[0] + alone[1]) / 2 - whole).abs().max() > 0.01
    # Four parts, of which one has nothing to find.
    quarters = [losses_of(slice(i, i + 1), Divisors(*(divisors / 4))) for i in range(4)]
    torch.testing.assert_close(torch.stack(quarters).mean(0), whole)


def test_stuff_and_the_classifier_learn_nothing_where_nothing_is_known() -> None:
    void = torch.zeros(8, 8)
    void[:, 4:] = 1
    gradients = {}
    for name, own in (("ignored", void), ("background", None)):
        outputs, targets = voided(own)
        losses = segment_losses(outputs, [targets], things=[0], stuff=[1])
        wanted = ("stage0_mask", "stage0_dice", "init_class")
        sum(losses[name] for name in wanted).backward()  # type: ignore[union-attr]
        mask, semantic = outputs.stages[1].masks.grad, outputs.semantic.grad
        assert mask is not None
        assert semantic is not None
        # The last column's cells reach two columns of the doubled map, both in the right half.
        gradients[name] = mask[0, 4, :, 3], semantic[..., 3]
    assert all(not one.any() for one in gradients["ignored"])
    assert all(one.all() for one in gradients["background"])


def test_an_objects_mask_ends_where_its_label_does_in_void_too() -> None:
    void = torch.zeros(8, 8)
    void[:, 4:] = 1
    outputs, targets = voided(void)
    losses = segment_losses(outputs, [targets], things=[0], stuff=[])
    (losses["stage0_mask"] + losses["stage0_dice"]).backward()
    gradient = outputs.stages[1].masks.grad
    assert gradient is not None
    assert gradient[0, :, :, 3].any(0).all()


def test_a_kernel_that_lies_in_void_is_not_told_that_it_is_none() -> None:
    void = torch.zeros(8, 8)
    void[:, 4:] = 1
    punished = {}
    for name, own in (("ignored", void), ("background", None)):
        outputs, targets = voided(own)
        losses = segment_losses(outputs, [targets], things=[0], stuff=[1])
        losses["stage0_class"].backward()
        gradient = outputs.stages[1].classes.grad  # type: ignore[union-attr]
        assert gradient is not None
        punished[name] = gradient[0].any(1).tolist()
    assert punished["background"] == [True] * 5
    assert punished["ignored"] == [True, True, True, False, True]


def test_a_kernel_on_an_object_is_not_told_that_it_is_none() -> None:
    outputs, targets = voided(None)
    stage = outputs.stages[1]
    masks = torch.full((1, 5, 4, 4), -9.0)
    masks[0, 0, 1:3, 0:2] = 8  # an IoU of 9 / 16 with the object: it is matched
    masks[0, 1, 1:3, 0:2] = 9  # its twin
    masks[0, 2, 1:3, 0:4] = 9  # 9 / 32
    masks[0, 4, :, :2] = 9
    stages = [one._replace(masks=masks) for one in outputs.stages]
    punished = {}
    for iou in (1.0, 0.5, 0.2):
        losses = segment_losses(
            TrainingOutputs(stages, outputs.semantic),
            [targets],
            things=[0],
            stuff=[1],
            negative_iou=iou,
        )
        (gradient,) = torch.autograd.grad(losses["stage0_class"], stage.classes)
        punished[iou] = gradient[0].any(1).tolist()
    assert punished == {
        1.0: [True] * 5,
        0.5: [True, False, True, True, True],
        0.2: [True, False, False, True, True],
    }
