from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from knet_runtime.errors import ConfigError
from knet_train.config import Config, load_config
from knet_train.mmseg import mmseg_name
from knet_train.models.build import build_model
from knet_train.models.knet import KNet
from knet_train.module import build_optimizer, check_layers, freeze_layers, lr_factor

BACKBONE_TENTH = 'optim.layers=[{pattern="backbone.*", lr_scale=0.1}]'


def test_every_parameter_is_in_one_group_with_its_own_rates(
    tiny_model: KNet, tiny_config: Callable[..., Config]
) -> None:
    config = tiny_config("optim.lr=0.01", BACKBONE_TENTH).optim
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
    warm_up = ("optim.warmup_steps=10", "optim.warmup_start=0.1")
    config = tiny_config("optim.steps=100", *warm_up, "optim.power=1.0").optim
    factors = [lr_factor(step, config) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[5] == pytest.approx(0.55 * 0.95)
    assert factors[10] == pytest.approx(0.9)
    assert factors[50] == pytest.approx(0.5)
    assert factors[100] == 0
    assert lr_factor(150, config) == 0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert all(0 < factor <= 1 for factor in factors[:-1])


def test_no_warm_up_begins_at_the_peak(tiny_config: Callable[..., Config]) -> None:
    assert lr_factor(0, tiny_config("optim.warmup_steps=0").optim) == 1


def test_the_published_schedule_is_mmcvs() -> None:
    """``warmup="linear"``: lr·(1 - (1 - t / n)·(1 - ratio)); a tenth from each milestone on."""
    config = load_config("r50-fcn").optim
    for step in (0, 1, 500, 999, 1000, 59_999):
        late = max(0.0, 1 - step / 1000) * (1 - 0.001)
        assert lr_factor(step, config) == pytest.approx(1 - late)
    assert lr_factor(60_000, config) == pytest.approx(0.1)
    assert lr_factor(71_999, config) == pytest.approx(0.1)
    assert lr_factor(72_000, config) == pytest.approx(0.01)


@pytest.mark.parametrize("preset", ["swin-t-upernet", "swin-l-upernet-640", "r50-fcn"])
def test_the_published_recipes_decay_what_mmsegmentation_decays(preset: str) -> None:
    """Its ``custom_keys`` are parts of its own names; the R-50 recipes decay everything."""
    config = load_config(preset)
    with torch.device("meta"):
        model = build_model(config.model, 150)
    groups = build_optimizer(model, config.optim).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    keys = ("norm", "relative_position_bias_table") if preset.startswith("swin") else ()
    for name, parameter in model.named_parameters():
        free = any(key in mmseg_name(name, config.model.head) for key in keys)
        assert decay[id(parameter)] == (0 if free else 5e-4), name


def test_the_first_rule_that_matches_counts(
    tiny_model: KNet, tiny_config: Callable[..., Config]
) -> None:
    rules = (
        '{pattern="backbone.conv_stem.*", lr_scale=0.0}',
        '{pattern="backbone.*", lr_scale=0.5}',
    )
    config = tiny_config("optim.lr=0.01", f"optim.layers=[{', '.join(rules)}]").optim
    freeze_layers(tiny_model, config)
    groups = build_optimizer(tiny_model, config).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in tiny_model.named_parameters():
        if name.startswith("backbone.conv_stem."):
            assert id(parameter) not in rates
            assert not parameter.requires_grad
        else:
            half = name.startswith("backbone.")
            assert rates[id(parameter)] == pytest.approx(0.005 if half else 0.01)


def test_a_norm_that_is_frozen_as_a_whole_keeps_its_statistics(
    tiny_model: KNet, tiny_config: Callable[..., Config]
) -> None:
    rules = '{pattern="backbone.bn1.*", lr_scale=0.0}, {pattern="head.*.bias", lr_scale=0.0}'
    tiny_model.train()
    freeze_layers(tiny_model, tiny_config(f"optim.layers=[{rules}]").optim)
    frozen, free = tiny_model.backbone.bn1, tiny_model.head.laterals[0][1]
    assert not frozen.training
    assert free.training  # its weight still learns
    before = {key: value.clone() for key, value in tiny_model.state_dict().items()}
    tiny_model(torch.randint(0, 255, (2, 64, 64, 3), dtype=torch.uint8))
    after = tiny_model.state_dict()
    assert torch.equal(before["backbone.bn1.running_mean"], after["backbone.bn1.running_mean"])
    assert not torch.equal(
        before["head.laterals.0.1.running_mean"], after["head.laterals.0.1.running_mean"]
    )


def test_held_norms_keep_their_statistics_and_still_learn(
    tiny_model: KNet, tiny_config: Callable[..., Config]
) -> None:
    config = tiny_config('optim.held_norms=["backbone.*"]').optim
    tiny_model.train()
    freeze_layers(tiny_model, config)
    before = {key: value.clone() for key, value in tiny_model.state_dict().items()}
    tiny_model(torch.randint(0, 255, (2, 64, 64, 3), dtype=torch.uint8))
    moved = {key for key, value in tiny_model.state_dict().items() if (value != before[key]).any()}
    assert any(key.startswith("head.") for key in moved)
    assert not any(key.startswith("backbone.") for key in moved)
    assert all(parameter.requires_grad for parameter in tiny_model.parameters())


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ('optim.layers=[{pattern="bakbone.*", lr_scale=0.1}]', r"optim\.layers: 'bakbone\.\*'"),
        ('optim.no_decay=["*nrom*"]', r"optim\.no_decay: '\*nrom\*' matches no parameter"),
        ('optim.held_norms=["bakbone.*"]', r"optim\.held_norms: 'bakbone\.\*' matches no"),
        ('optim.layers=[{pattern="*", lr_scale=0.0}]', "freezes every parameter"),
    ],
)
def test_rules_that_cannot_be_meant_are_refused(
    tiny_model: KNet, tiny_config: Callable[..., Config], override: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check_layers(tiny_model, tiny_config(override).optim)
