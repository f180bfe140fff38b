from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from knet_train.config import Config
from knet_train.knet import KNet
from knet_train.optim import build_optimizer, lr_factor


def test_every_parameter_is_in_one_group_with_its_own_rates(
    tiny_model: KNet, tiny_config: Callable[..., Config]
) -> None:
    config = tiny_config("optim.lr=0.01", "optim.backbone_lr_scale=0.1").optim
    groups = build_optimizer(tiny_model, config).param_groups
    place = {id(p): group for group in groups for p in group["params"]}
    parameters = dict(tiny_model.named_parameters())
    assert sum(len(group["params"]) for group in groups) == len(place) == len(parameters)
    for name, parameter in parameters.items():
        group = place[id(parameter)]
        assert group["lr"] == pytest.approx(0.001 if name.startswith("backbone.") else 0.01)
        assert group["weight_decay"] == (config.weight_decay if parameter.ndim > 1 else 0)


def test_norms_and_biases_are_not_decayed(
    tiny_model: KNet, tiny_config: Callable[..., Config]
) -> None:
    groups = build_optimizer(tiny_model, tiny_config().optim).param_groups
    free = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    norms = (torch.nn.BatchNorm2d, torch.nn.LayerNorm)
    for module in tiny_model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            assert (id(parameter) in free) == (isinstance(module, norms) or name.endswith("bias"))


def test_the_rate_warms_up_then_falls_to_zero(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config("optim.steps=100", "optim.warmup_steps=10", "optim.power=1.0").optim
    factors = [lr_factor(step, config) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == pytest.approx(0.91)
    assert factors[50] == pytest.approx(0.5)
    assert factors[100] == 0
    assert lr_factor(150, config) == 0
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert all(0 < factor <= 1 for factor in factors[:-1])


def test_no_warm_up_begins_at_the_peak(tiny_config: Callable[..., Config]) -> None:
    assert lr_factor(0, tiny_config("optim.warmup_steps=0").optim) == 1
