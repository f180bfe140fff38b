from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from knet_train.config import LossConfig
from knet_train.loss import (
    class_weights,
    distillation_divisor,
    distillation_loss,
    loss_divisors,
    training_loss,
)

PLAIN = LossConfig(
    stage_weights=(1.0, 1.0, 1.0),
    auxiliary_weight=0.0,
    class_balance=0.0,
    mean_over="labelled",
    early_label_stride=1,
)


def made(stages: int = 3, size: tuple[int, int] = (12, 16)) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    logits = [torch.randn(2, 4, 3, 4, requires_grad=True) for _ in range(stages)]
    labels = torch.randint(0, 4, (2, *size), dtype=torch.uint8)
    labels[0, :3] = 255
    return logits, labels


def plain(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    full = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(full, labels.long(), weights, ignore_index=255)


@pytest.mark.parametrize("weights", [torch.ones(4), torch.tensor([0.5, 2.0, 1.0, 3.0])])
def test_at_every_pixel_it_is_plain_cross_entropy(weights: Tensor) -> None:
    logits, labels = made()
    expected = sum(plain(stage, labels, weights) for stage in logits)
    torch.testing.assert_close(training_loss(logits, None, labels, PLAIN, weights, 255), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_gradient_is_that_of_plain_cross_entropy(dtype: torch.dtype) -> None:
    logits, labels = made(stages=3)
    labels[1] = 255  # an image without a labelled pixel
    weights = torch.tensor([0.5, 2.0, 1.0, 3.0])
    given = [stage.detach().to(dtype).requires_grad_() for stage in logits]
    (1000 * training_loss(given, None, labels, PLAIN, weights, 255)).backward()
    same = [stage.detach().requires_grad_() for stage in given]
    sum(1000 * plain(stage.float(), labels, weights) for stage in same).backward()
    for ours, expected in zip(given, same, strict=True):
        assert ours.grad is not None
        assert ours.grad.dtype == dtype
        assert ours.grad.abs().max() > 1
        torch.testing.assert_close(ours.grad, expected.grad)


def test_a_gradient_too_small_for_half_precision_survives_the_scaling_of_the_loss() -> None:
    logits = torch.zeros(1, 2, 2, 2, dtype=torch.float16, requires_grad=True)
    labels = torch.zeros(1, 64, 64, dtype=torch.uint8)
    config = msgspec.structs.replace(PLAIN, stage_weights=(1.0,), mean_over="all")
    loss = training_loss([logits], None, labels, config, torch.full((2,), 1e-12), 255)
    (loss * 2.0**40).backward()
    assert logits.grad is not None
    expected = torch.full((2, 2), 2.0**40 * 1e-12 / 8, dtype=torch.float16)  # 1 / 2 · 1 / 4 pixels
    torch.testing.assert_close(logits.grad[0, 1], expected)


def test_stage_weights_scale_their_stages() -> None:
    logits, labels = made()
    config = msgspec.structs.replace(PLAIN, stage_weights=(0.0, 0.5, 2.0))
    ones = torch.ones(4)
    expected = 0.5 * plain(logits[1], labels, ones) + 2 * plain(logits[2], labels, ones)
    torch.testing.assert_close(training_loss(logits, None, labels, config, ones, 255), expected)


@pytest.mark.parametrize("stride", [2, 3])
def test_early_stages_see_every_nth_label_and_the_last_all(stride: int) -> None:
    logits, labels = made()
    config = msgspec.structs.replace(PLAIN, early_label_stride=stride)
    ones = torch.ones(4)
    first, second = stride // 2, (stride - 1) // 2
    expected = (
        plain(logits[0], labels[:, first::stride, first::stride], ones)
        + plain(logits[1], labels[:, second::stride, second::stride], ones)
        + plain(logits[2], labels, ones)
    )
    torch.testing.assert_close(training_loss(logits, None, labels, config, ones, 255), expected)


def test_what_is_ignored_gets_no_gradient() -> None:
    logits, labels = made(1)
    labels[1] = 255
    training_loss(
        logits,
        None,
        labels,
        msgspec.structs.replace(PLAIN, stage_weights=(1.0,)),
        torch.ones(4),
        255,
    ).backward()
    assert logits[0].grad is not None
    assert not logits[0].grad[1].any()
    assert logits[0].grad[0].any()


def test_a_batch_without_labels_costs_nothing_and_breaks_nothing() -> None:
    logits, labels = made()
    loss = training_loss(logits, None, torch.full_like(labels, 255), PLAIN, torch.ones(4), 255)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(stage.grad is not None and not stage.grad.any() for stage in logits)


def test_another_ignore_index_just_behind_the_classes() -> None:
    logits, labels = made()
    moved = torch.where(labels == 255, torch.tensor(4, dtype=torch.uint8), labels)
    ones = torch.ones(4)
    torch.testing.assert_close(
        training_loss(logits, None, moved, PLAIN, ones, 4),
        training_loss(logits, None, labels, PLAIN, ones, 255),
    )


def test_half_precision_logits_are_compared_in_float32() -> None:
    logits, labels = made()
    halves = [stage.detach().bfloat16() for stage in logits]
    loss = training_loss(halves, None, labels, PLAIN, torch.ones(4), 255)
    assert loss.dtype == torch.float32


def test_a_rare_class_weighs_more_and_an_absent_one_weighs_one() -> None:
    pixels = np.array([100, 400, 0, 25], np.int64)
    np.testing.assert_allclose(class_weights(pixels, 1.0), [1, 0.25, 1, 4])
    np.testing.assert_allclose(class_weights(pixels, 0.5), [1, 0.5, 1, 2])
    np.testing.assert_allclose(class_weights(pixels, 0.0), 1)
    assert class_weights(pixels, 0.5).dtype == np.float32


def test_no_labelled_pixel_at_all_weighs_every_class_alike() -> None:
    np.testing.assert_array_equal(class_weights(np.zeros(3, np.int64), 0.5), 1)


def test_the_mean_over_all_counts_ignored_pixels_as_mmsegmentation_does() -> None:
    logits, labels = made()
    config = msgspec.structs.replace(PLAIN, mean_over="all")
    weights = torch.tensor([0.5, 2.0, 1.0, 3.0])
    expected = torch.zeros(())
    for stage in logits:
        full = F.interpolate(stage, labels.shape[-2:], mode="bilinear", align_corners=False)
        each = F.cross_entropy(full, labels.long(), weights, ignore_index=255, reduction="none")
        expected = expected + each.mean()
    torch.testing.assert_close(training_loss(logits, None, labels, config, weights, 255), expected)


def test_the_auxiliary_classifier_counts_by_its_weight() -> None:
    logits, labels = made()
    auxiliary = torch.randn(2, 4, 2, 2)
    config = msgspec.structs.replace(PLAIN, auxiliary_weight=0.4, early_label_stride=2)
    ones = torch.ones(4)
    without = training_loss(logits, None, labels, config, ones, 255)
    expected = without + 0.4 * plain(auxiliary, labels, ones)
    torch.testing.assert_close(
        training_loss(logits, auxiliary, labels, config, ones, 255), expected
    )


@pytest.mark.parametrize("mean_over", ["labelled", "all"])
def test_the_mean_of_the_parts_is_the_loss_of_the_whole(mean_over: str) -> None:
    """Though one part has far more labels than the other, and heavier ones."""
    logits, labels = made()
    labels[1, 2:] = 255
    auxiliary = torch.randn(2, 4, 2, 2)
    weights = torch.tensor([0.5, 2.0, 1.0, 3.0])
    config = msgspec.structs.replace(
        PLAIN, mean_over=mean_over, auxiliary_weight=0.4, early_label_stride=2
    )
    whole = training_loss(logits, auxiliary, labels, config, weights, 255)
    divisors = loss_divisors(labels, config, weights, 255) / 2
    parts = [
        training_loss(
            [stage[i : i + 1] for stage in logits],
            auxiliary[i : i + 1],
            labels[i : i + 1],
            config,
            weights,
            255,
            divisors,
        )
        for i in range(2)
    ]
    torch.testing.assert_close((parts[0] + parts[1]) / 2, whole)


def soft_labels(size: tuple[int, int] = (6, 8)) -> Tensor:
    torch.manual_seed(1)
    soft = (255 * torch.softmax(2 * torch.randn(2, 4, *size), 1)).round().to(torch.uint8)
    soft[0, :, 2] = 0  # outside of the image
    return soft


@pytest.mark.parametrize("weights", [torch.ones(4), torch.tensor([0.5, 2.0, 1.0, 3.0])])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distillation_is_the_divergence_from_weighted_probabilities(
    weights: Tensor, temperature: float
) -> None:
    logits, _ = made()
    soft = soft_labels()
    config = msgspec.structs.replace(PLAIN, distill_temperature=temperature)
    expected, pixels = torch.zeros(()), torch.zeros(())
    for number in range(2):
        for y in range(6):
            for x in range(8):
                values = soft[number, :, y, x].float()
                if not values.any():
                    continue
                mass = weights * values / values.sum()
                target = torch.softmax(mass.log() / temperature, 0)
                for stage in logits:
                    full = F.interpolate(stage, (6, 8), mode="bilinear", align_corners=False)
                    learnt = torch.log_softmax(full[number, :, y, x] / temperature, 0)
                    terms = torch.special.xlogy(target, target) - target * learnt
                    expected = expected + mass.sum() * temperature**2 * terms.sum()
                pixels = pixels + mass.sum()
    found = distillation_loss(logits, soft, config, weights)
    torch.testing.assert_close(found, expected / pixels)
    gradients = [torch.autograd.grad(one, logits) for one in (found, expected / pixels)]
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, theirs)


def test_with_one_certain_class_distillation_is_the_cross_entropy() -> None:
    logits, labels = made()
    weights = torch.tensor([0.5, 2.0, 1.0, 3.0])
    soft = 255 * (labels[:, None] == torch.arange(4)[:, None, None]).to(torch.uint8)
    torch.testing.assert_close(
        distillation_loss(logits, soft, PLAIN, weights),
        training_loss(logits, None, labels, PLAIN, weights, 255),
    )


def test_a_student_that_is_its_teacher_learns_nothing_whatever_the_temperature() -> None:
    soft, weights = soft_labels(), torch.tensor([0.5, 2.0, 1.0, 3.0])
    mass = weights[:, None, None] * soft / soft.sum(1, keepdim=True).clamp(min=1)
    for temperature in (1.0, 2.5):
        logits = mass.clamp(min=1e-30).log().requires_grad_()
        config = msgspec.structs.replace(
            PLAIN, stage_weights=(1.0,), distill_temperature=temperature
        )
        loss = distillation_loss([logits], soft, config, weights)
        assert abs(float(loss.detach())) < 1e-4
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.abs().max() < 1e-4


def test_distillation_teaches_the_stages_that_are_asked_for() -> None:
    for stages, learn in (("all", [True, True, True]), ("last", [False, False, True])):
        logits, _ = made()
        config = msgspec.structs.replace(PLAIN, distill_stages=stages)
        distillation_loss(logits, soft_labels(), config, torch.ones(4)).backward()
        assert [stage.grad is not None for stage in logits] == learn
    logits, _ = made()
    config = msgspec.structs.replace(PLAIN, stage_weights=(0.0, 0.5, 1.0))
    distillation_loss(logits, soft_labels(), config, torch.ones(4)).backward()
    assert logits[0].grad is None
    assert logits[1].grad is not None


def test_parts_of_a_distilled_step_add_up() -> None:
    logits, _ = made()
    soft, weights = soft_labels(), torch.tensor([0.5, 2.0, 1.0, 3.0])
    whole = distillation_loss(logits, soft, PLAIN, weights)
    divisor = distillation_divisor(soft, weights) / 2
    parts = [
        distillation_loss([s[i : i + 1] for s in logits], soft[i : i + 1], PLAIN, weights, divisor)
        for i in range(2)
    ]
    torch.testing.assert_close((parts[0] + parts[1]) / 2, whole)


def test_without_any_soft_label_nothing_is_distilled() -> None:
    logits, _ = made()
    loss = distillation_loss(logits, torch.zeros_like(soft_labels()), PLAIN, torch.ones(4))
    assert float(loss.detach()) == 0
