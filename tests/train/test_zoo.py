"""The seven published K-Nets, built from the small parts that knet-edge is built from."""

from __future__ import annotations

import pytest
import timm
import torch

from knet_train.config import load_config, presets
from knet_train.models.backbones import SwinBackbone, _run_block
from knet_train.models.build import build_model

# Parameters at inference with 150 classes, and the stride of the logits.
PUBLISHED = {
    "r50-fcn": (60_412_150, 8),
    "r50-pspnet": (59_889_910, 8),
    "r50-deeplabv3": (79_027_446, 8),
    "r50-upernet": (77_329_654, 4),
    "swin-t-upernet": (72_229_968, 4),
    "swin-l-upernet-512": (245_163_306, 4),
    "swin-l-upernet-640": (245_163_306, 4),
}


def test_every_published_row_is_a_preset() -> None:
    semantic = {name for name in presets() if load_config(name).model.task == "semantic"}
    assert semantic == {*PUBLISHED, "knet-edge"}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_published_row_has_its_parameters_and_its_maps(preset: str) -> None:
    count, stride = PUBLISHED[preset]
    config = load_config(preset)
    assert config.preset == preset
    with torch.device("meta"):
        model = build_model(config.model, 150)
        named = dict(model.named_parameters())
        inference = {name: p for name, p in named.items() if not name.startswith("auxiliary.")}
        assert sum(p.numel() for p in inference.values()) == count
        assert len(inference) < len(named), "the published recipe has an auxiliary classifier"
        stages, auxiliary = model.training_logits(torch.zeros(2, 66, 99, 3, dtype=torch.uint8))
    assert auxiliary is not None
    assert auxiliary.shape[:2] == (2, 150)
    expected = (2, 150, -(-66 // stride), -(-99 // stride))
    assert [tuple(stage.shape) for stage in stages] == [expected] * 4
    assert model.stages[0].updator.width == 256


@pytest.mark.parametrize("backbone", ["convnext_tiny", "resnet18", "mobilenetv3_small_050"])
@pytest.mark.parametrize("head", ["fpn", "uper"])
def test_any_backbone_with_levels_can_be_named(backbone: str, head: str) -> None:
    names = [f"model.backbone={backbone}", f"model.head={head}"]
    with torch.device("meta"):
        model = build_model(load_config("r50-upernet", names).model, 7).eval()
        logits = model(torch.zeros(1, 64, 96, 3, dtype=torch.uint8))
    assert logits.shape == (1, 7, 16, 24)


def test_swin_equals_timms_own_where_nothing_is_padded() -> None:
    torch.manual_seed(0)
    name = "swin_tiny_patch4_window7_224"
    ours = SwinBackbone(name, 0.0).eval()
    plain = timm.create_model(name, features_only=True, img_size=448).eval()
    state = {k.replace("layers.", "layers_"): v for k, v in ours.state_dict().items()}
    plain.load_state_dict({k: v for k, v in state.items() if not k.startswith("norms.")})
    image = torch.randn(1, 3, 448, 448)  # 112, 56, 28 and 14 tokens a side: whole windows of 7
    with torch.no_grad():
        for level, norm, reference in zip(ours(image), ours.norms, plain(image), strict=True):
            expected = norm(reference).permute(0, 3, 1, 2)
            torch.testing.assert_close(level, expected, atol=1e-4, rtol=1e-4)


def test_swin_pads_before_it_rolls() -> None:
    """A window of the rolled map must hold the last rows beside the first ones only across padding:
    so one token at the far edge reaches the near edge in stock timm, and must not here."""
    torch.manual_seed(0)
    net = SwinBackbone("swin_tiny_patch4_window7_224", 0.0).eval()
    first = net.layers[0]
    tokens = torch.randn(1, 9, 9, 96)
    moved = tokens.clone()
    moved[:, -1] += 1.0
    with torch.no_grad():
        change = (_run_block(first.blocks[1], moved) - _run_block(first.blocks[1], tokens)).abs()
    # Padded to 14 rows and rolled by 3, rows 3 … 8 share a window; rows 0 … 2 do not see row 8.
    assert float(change[:, :3].max()) == 0
    assert float(change[:, 3:].max()) > 0


def test_gradient_checkpointing_changes_nothing_in_swin() -> None:
    torch.manual_seed(0)
    net = SwinBackbone("swin_tiny_patch4_window7_224", 0.0).train()
    image = torch.randn(1, 3, 40, 52)
    gradients = []
    for checkpointed in (False, True):
        net.set_grad_checkpointing(checkpointed)
        net.zero_grad()
        sum(level.square().sum() for level in net(image)).backward()
        gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)
