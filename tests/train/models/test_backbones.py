from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from knet_runtime.errors import CheckpointError, ConfigError
from knet_train.config import Config
from knet_train.models.backbones import build_backbone, level_channels, load_pretrained


@pytest.mark.parametrize(("stride", "levels"), [(4, 4), (8, 3)])
def test_levels_run_from_the_stride_to_32(
    tiny_config: Callable[..., Config], stride: int, levels: int
) -> None:
    backbone = build_backbone(tiny_config(f"model.stride={stride}").model).eval()
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, 96, 64))
    assert [m.shape[1] for m in maps] == level_channels(backbone)
    assert [96 // m.shape[2] for m in maps] == [4, 8, 16, 32][-levels:]


def test_a_file_of_weights_is_loaded(
    tiny_config: Callable[..., Config], backbone_file: Path
) -> None:
    backbone = build_backbone(tiny_config().model)
    load_pretrained(backbone, tiny_config().model, backbone_file)
    stored = load_file(backbone_file)
    assert all(torch.equal(value, stored[key]) for key, value in backbone.state_dict().items())


def test_a_whole_classifier_serves_too(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    classifier = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    save_file(classifier.state_dict(), tmp_path / "model.safetensors")
    for stride in (4, 8):
        config = tiny_config(f"model.stride={stride}").model
        backbone = build_backbone(config)
        load_pretrained(backbone, config, tmp_path / "model.safetensors")
        assert torch.equal(backbone.state_dict()["conv_stem.weight"], classifier.conv_stem.weight)


def test_the_real_weights_fit(tiny_config: Callable[..., Config], shared_data: Path) -> None:
    config = tiny_config().model
    file = shared_data / "backbones" / "tf_efficientnet_lite0.safetensors"
    load_pretrained(build_backbone(config), config, file)


def test_missing_and_misshapen_weights_are_named(
    tiny_config: Callable[..., Config], backbone_file: Path, tmp_path: Path
) -> None:
    config = tiny_config().model
    state = load_file(backbone_file)
    path = tmp_path / "odd.safetensors"
    save_file({k: v for k, v in state.items() if k != "bn1.weight"}, path)
    with pytest.raises(CheckpointError, match=r"odd\.safetensors .*1 weights missing.*bn1\.weight"):
        load_pretrained(build_backbone(config), config, path)
    save_file({**state, "bn1.weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"1 of another shape.*bn1\.weight.*wants timm/"):
        load_pretrained(build_backbone(config), config, path)


def test_unreadable_files_are_named(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    config = tiny_config().model
    (tmp_path / "text.safetensors").write_text("words " * 50)
    for name in ("text.safetensors", "absent.safetensors"):
        with pytest.raises(CheckpointError, match=rf"{name} is not a readable .* pass timm/"):
            load_pretrained(build_backbone(config), config, tmp_path / name)


def test_an_unreachable_hub_names_both_ways_out(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(name: str, **_: object) -> None:
        assert name == "hf_hub:timm/tf_efficientnet_lite0.in1k"
        raise ConnectionError("no route to host")

    backbone = build_backbone(tiny_config().model)
    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(
        CheckpointError, match=r"ConnectionError.*connect to the network.*--backbone-weights"
    ):
        load_pretrained(backbone, tiny_config().model, None)


def test_the_hubs_weights_are_loaded(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = build_backbone(tiny_config().model)
    create = timm.create_model
    made = []

    def from_hub(name: str, *, pretrained: bool) -> torch.nn.Module:
        assert pretrained
        made.append(create("tf_efficientnet_lite0", pretrained=False))
        return made[0]

    monkeypatch.setattr(timm, "create_model", from_hub)
    load_pretrained(backbone, tiny_config().model, None)
    assert torch.equal(backbone.state_dict()["conv_stem.weight"], made[0].conv_stem.weight)


@pytest.mark.parametrize("name", ["convnext_atto", "swin_tiny_patch4_window7_224", "resnet18"])
def test_a_classifier_of_any_backbone_serves(
    tiny_config: Callable[..., Config], tmp_path: Path, name: str
) -> None:
    config = tiny_config("model.head=uper", f"model.backbone={name}").model
    classifier = timm.create_model(name, pretrained=False)
    save_file(classifier.state_dict(), tmp_path / "model.safetensors")
    backbone = build_backbone(config)
    load_pretrained(backbone, config, tmp_path / "model.safetensors")
    stored = {k.replace(".", "_"): v for k, v in classifier.state_dict().items()}
    loaded = {k.replace(".", "_"): v for k, v in backbone.state_dict().items() if k[:5] != "norms"}
    assert loaded
    assert all(torch.equal(value, stored[key]) for key, value in loaded.items())


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.backbone=resnet5O", r"timm has no 'resnet5O'"),
        ("model.backbone=resnet50x", r"near it: .*resnet"),
        ("model.backbone=vit_tiny_patch16_224", r"can not give features at strides"),
        ("model.backbone=swinv2_tiny_window8_256", r"channels last|can not give features"),
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
