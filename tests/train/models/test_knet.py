from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from knet_train.config import Config, load_config
from knet_train.models.build import build_model
from knet_train.models.knet import KNet


@pytest.mark.parametrize("stride", [4, 8])
@pytest.mark.parametrize("size", [(64, 96), (65, 99), (47, 33)])
def test_logits_of_every_stage_have_the_strides_size(
    tiny_config: Callable[..., Config], stride: int, size: tuple[int, int]
) -> None:
    config = tiny_config(f"model.stride={stride}", "model.stages=2", "loss.stage_weights=[1,1,1]")
    model = build_model(config.model, 5).eval()
    with torch.no_grad():
        logits = model.stage_logits(torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8))
    expected = (2, 5, -(-size[0] // stride), -(-size[1] // stride))
    assert [tuple(stage.shape) for stage in logits] == [expected] * 3


def test_evaluation_is_deterministic_and_takes_bytes_or_floats(tiny_model: KNet) -> None:
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        first = tiny_model(images)
        assert torch.equal(first, tiny_model(images))
        assert torch.equal(first, tiny_model(images.float()))


def test_images_of_a_batch_do_not_touch_one_another(tiny_model: KNet) -> None:
    images = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    model = tiny_model.double()
    with torch.no_grad():
        together, alone = model(images), model(images[2:])
    torch.testing.assert_close(together[2:], alone)


def test_the_edge_preset_has_four_to_five_million_parameters() -> None:
    model = build_model(load_config("knet-edge").model, 11)
    assert 4e6 < sum(p.numel() for p in model.parameters()) < 5e6


def test_every_parameter_gets_a_gradient(tiny_config: Callable[..., Config]) -> None:
    torch.manual_seed(0)
    model = build_model(tiny_config("model.dropout=0").model, 4).train()
    logits = model.stage_logits(torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8))
    sum((stage * torch.randn_like(stage)).sum() for stage in logits).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A feature only reaches the masks through softmax and ReLU: a zero gradient is a dead path.
    assert not silent
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_mean_and_std_are_applied_inside_but_are_no_weights(tiny_model: KNet) -> None:
    assert not {"mean", "std"} & set(tiny_model.state_dict())
    images = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        planes = (images.permute(0, 3, 1, 2).float() - 127.5) / 127.5
        expected = tiny_model.decode(tiny_model.backbone(planes))[-1]
        torch.testing.assert_close(tiny_model(images), expected)


def test_initial_kernels_are_the_first_classifiers_weights(tiny_model: KNet) -> None:
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    seen = []
    tiny_model.stages[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    with torch.no_grad():
        logits = tiny_model.stage_logits(images)
    features, kernels, masks = seen[0]
    weight = tiny_model.conv_seg.weight.flatten(1)
    assert torch.equal(kernels, weight.expand(2, -1, -1))
    assert masks is logits[0]
    torch.testing.assert_close(masks, tiny_model.conv_seg(features))
