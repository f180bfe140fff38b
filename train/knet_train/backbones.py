"""timm backbones as K-Net wants them: a list of levels, finest first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from knet_runtime.errors import CheckpointError
from knet_train.config import ModelConfig

# The symmetric-padding twin of the TensorFlow network takes the same weights (its BatchNorms
# want 1e-3) and has no Pad nodes in ONNX.
_TIMM: dict[str, dict[str, Any]] = {"efficientnet_lite0": {"bn_eps": 1e-3}}
_HUB: dict[str, str] = {"efficientnet_lite0": "timm/tf_efficientnet_lite0.in1k"}


def build_backbone(config: ModelConfig) -> nn.Module:
    """An untrained feature extractor; its levels run from ``config.stride`` to 32."""
    levels = (1, 2, 3, 4) if config.stride == 4 else (2, 3, 4)
    module: nn.Module = timm.create_model(
        config.backbone, features_only=True, out_indices=levels, **_TIMM[config.backbone]
    )
    return module


def level_channels(backbone: nn.Module) -> list[int]:
    """Channels of each level that the backbone returns, finest first."""
    channels: list[int] = backbone.feature_info.channels()  # type: ignore[union-attr,operator]
    return channels


def load_pretrained(backbone: nn.Module, config: ModelConfig, weights: Path | None) -> None:
    """ImageNet weights into ``backbone``: from a safetensors file, else from timm's hub.

    A file may hold the whole classifier; what the features don't need is left out. Raises
    CheckpointError when the file is broken or lacks a weight, or the hub can not be reached.
    """
    if weights is not None:
        try:
            state = load_file(weights)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{weights} is not a readable safetensors file ({error}): "
                f"pass {_HUB[config.backbone]}'s model.safetensors"
            ) from error
    else:
        state = _from_hub(config.backbone)
    needed = backbone.state_dict()
    missing = [key for key in needed if key not in state]
    wrong = [key for key in needed if key in state and state[key].shape != needed[key].shape]
    if missing or wrong:
        raise CheckpointError(
            f"{weights or 'the hub'} does not hold {config.backbone}: "
            f"{len(missing)} weights missing, {len(wrong)} of another shape "
            f"(first: {(missing + wrong)[0]}); it wants {_HUB[config.backbone]}'s model.safetensors"
        )
    backbone.load_state_dict({key: state[key] for key in needed})


def _from_hub(name: str) -> dict[str, Tensor]:
    try:
        source = timm.create_model(f"hf_hub:{_HUB[name]}", pretrained=True)
    except Exception as error:  # the hub client raises many unrelated types
        raise CheckpointError(
            f"ImageNet weights of {name} could not be fetched from the hub "
            f"({type(error).__name__}): connect to the network, or pass "
            f"--backbone-weights FILE.safetensors ({_HUB[name]}'s model.safetensors)"
        ) from error
    state: dict[str, Tensor] = source.state_dict()
    return state
