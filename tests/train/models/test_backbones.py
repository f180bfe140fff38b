from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from knet_runtime.errors import ConfigError
from knet_train.config import Config
from knet_train.models.backbones import build_backbone, level_channels


@pytest.mark.parametrize(("stride", "levels"), [(4, 4), (8, 3)])
def test_levels_run_from_the_stride_to_32(
    tiny_config: Callable[..., Config], stride: int, levels: int
) -> None:
    backbone = build_backbone(tiny_config(f"model.stride={stride}").model).eval()
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, 96, 64))
    assert [m.shape[1] for m in maps] == level_channels(backbone)
    assert [96 // m.shape[2] for m in maps] == [4, 8, 16, 32][-levels:]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.backbone=resnet5O", r"timm has no 'resnet5O'"),
        ("model.backbone=resnet50x", r"near it: .*resnet"),
        ("model.backbone=vit_tiny_patch16_224", r"cannot give features at strides"),
        ("model.backbone=swinv2_tiny_window8_256", r"channels last|cannot give features"),
    ],
)
def test_what_has_no_levels_is_refused(
    tiny_config: Callable[..., Config], override: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        build_backbone(tiny_config(override).model)


def test_swin_takes_neither_dilation_nor_a_shorter_pyramid(
    tiny_config: Callable[..., Config],
) -> None:
    swin = "model.backbone=swin_tiny_patch4_window7_224"
    for override in ("model.output_stride=8", "model.stride=8"):
        with pytest.raises(ConfigError, match="needs output_stride 32 and stride 4"):
            build_backbone(tiny_config(swin, override).model)
