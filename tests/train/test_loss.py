from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from knet_train.config import LossConfig
from knet_train.loss import class_weights, stage_losses

PLAIN = LossConfig(stage_weights=(1.0, 1.0, 1.0), class_balance=0.0, early_label_stride=1)


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
    torch.testing.assert_close(stage_losses(logits, labels, PLAIN, weights, 255), expected)


def test_stage_weights_scale_their_stages() -> None:
    logits, labels = made()
    config = msgspec.structs.replace(PLAIN, stage_weights=(0.0, 0.5, 2.0))
    ones = torch.ones(4)
    expected = 0.5 * plain(logits[1], labels, ones) + 2 * plain(logits[2], labels, ones)
    torch.testing.assert_close(stage_losses(logits, labels, config, ones, 255), expected)


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
    torch.testing.assert_close(stage_losses(logits, labels, config, ones, 255), expected)


def test_what_is_ignored_gets_no_gradient() -> None:
    logits, labels = made(1)
    labels[1] = 255
    stage_losses(
        logits, labels, msgspec.structs.replace(PLAIN, stage_weights=(1.0,)), torch.ones(4), 255
    ).backward()
    assert logits[0].grad is not None
    assert not logits[0].grad[1].any()
    assert logits[0].grad[0].any()


def test_a_batch_without_labels_costs_nothing_and_breaks_nothing() -> None:
    logits, labels = made()
    loss = stage_losses(logits, torch.full_like(labels, 255), PLAIN, torch.ones(4), 255)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(stage.grad is not None and not stage.grad.any() for stage in logits)


def test_another_ignore_index_just_behind_the_classes() -> None:
    logits, labels = made()
    moved = torch.where(labels == 255, torch.tensor(4, dtype=torch.uint8), labels)
    ones = torch.ones(4)
    torch.testing.assert_close(
        stage_losses(logits, moved, PLAIN, ones, 4), stage_losses(logits, labels, PLAIN, ones, 255)
    )


def test_half_precision_logits_are_compared_in_float32() -> None:
    logits, labels = made()
    halves = [stage.detach().bfloat16() for stage in logits]
    loss = stage_losses(halves, labels, PLAIN, torch.ones(4), 255)
    assert loss.dtype == torch.float32


def test_a_rare_class_weighs_more_and_an_absent_one_weighs_one() -> None:
    pixels = np.array([100, 400, 0, 25], np.int64)
    np.testing.assert_allclose(class_weights(pixels, 1.0), [1, 0.25, 1, 4])
    np.testing.assert_allclose(class_weights(pixels, 0.5), [1, 0.5, 1, 2])
    np.testing.assert_allclose(class_weights(pixels, 0.0), 1)
    assert class_weights(pixels, 0.5).dtype == np.float32


def test_no_labelled_pixel_at_all_weighs_every_class_alike() -> None:
    np.testing.assert_array_equal(class_weights(np.zeros(3, np.int64), 0.5), 1)
