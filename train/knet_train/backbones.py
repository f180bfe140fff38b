"""Backbones as K-Net wants them: a list of levels, finest first, at strides 4, 8, 16 and 32.

Any timm model with features at these strides will do. Swin has its own adapter, ``swin.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from knet_runtime.errors import CheckpointError, ConfigError
from knet_train.config import ModelConfig
from knet_train.swin import SwinBackbone

# What a model needs besides its name. The symmetric-padding twin of the TensorFlow network takes
# the same weights (its BatchNorms want 1e-3) and has no Pad nodes in ONNX.
_OPTIONS: dict[str, dict[str, Any]] = {"efficientnet_lite0": {"bn_eps": 1e-3}}
# Where ImageNet weights stand under another name than the model's own.
_HUB: dict[str, str] = {
    "efficientnet_lite0": "timm/tf_efficientnet_lite0.in1k",
    "resnet50c": "timm/resnet50c.mm_in1k",
}
_STRIDES = (4, 8, 16, 32)


def build_backbone(config: ModelConfig) -> nn.Module:
    """An untrained feature extractor; its levels run from ``config.stride`` to 32 for head "fpn",
    else from 4 to 32 (the last ones are finer where ``config.output_stride`` is below 32).

    Raises ConfigError when timm has no such model, or it has no such levels.
    """
    name = config.backbone
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5]) or "see timm's models"
        raise ConfigError(f"model.backbone: timm has no {name!r}; near it: {close}")
    strides = [s for s in _STRIDES if config.head != "fpn" or s >= config.stride]
    if name.startswith("swin_"):
        if config.output_stride != 32 or len(strides) < 4:
            raise ConfigError(f"model.backbone: {name} needs output_stride 32 and stride 4")
        return SwinBackbone(name, config.drop_path)
    options = dict(_OPTIONS.get(name, {}))
    if config.output_stride != 32:
        options["output_stride"] = config.output_stride
    if config.drop_path > 0:
        options["drop_path_rate"] = config.drop_path
    try:
        with torch.device("meta"):
            probe: Any = timm.create_model(name, features_only=True)
        reductions = probe.feature_info.reduction()
        levels = tuple(reductions.index(stride) for stride in strides)
        module: nn.Module = timm.create_model(
            name, features_only=True, out_indices=levels, **options
        )
    except (ValueError, RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        raise ConfigError(
            f"model.backbone: {name} can not give features at strides {strides} with "
            f"output_stride {config.output_stride} and drop_path {config.drop_path} ({error}): "
            "take a convolutional network such as resnet50c or convnext_tiny, or a swin_*"
        ) from error
    if getattr(module, "output_fmt", "NCHW") not in ("NCHW", None):
        raise ConfigError(f"model.backbone: {name} gives channels last, which is not supported")
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
    source = hub_name(config.backbone)
    if weights is not None:
        try:
            state = load_file(weights)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{weights} is not a readable safetensors file ({error}): "
                f"pass {source}'s model.safetensors"
            ) from error
    else:
        state = _from_hub(config.backbone)
    needed = backbone.state_dict()
    if isinstance(backbone, SwinBackbone):  # its norms of the levels are K-Net's, not ImageNet's
        needed = {key: value for key, value in needed.items() if not key.startswith("norms.")}
    # timm's feature wrappers write "stages_0" where its files have "stages.0".
    plain = {key.replace(".", "_"): value for key, value in state.items()}
    state = {key: plain[k] for key in needed if (k := key.replace(".", "_")) in plain}
    missing = [key for key in needed if key not in state]
    wrong = [key for key in needed if key in state and state[key].shape != needed[key].shape]
    if missing or wrong:
        raise CheckpointError(
            f"{weights or 'the hub'} does not hold {config.backbone}: "
            f"{len(missing)} weights missing, {len(wrong)} of another shape "
            f"(first: {(missing + wrong)[0]}); it wants {source}'s model.safetensors"
        )
    backbone.load_state_dict({key: state[key] for key in needed}, strict=False)


def hub_name(backbone: str) -> str:
    """Where timm's hub keeps ImageNet weights of a backbone."""
    default = timm.get_pretrained_cfg(backbone)
    return _HUB.get(backbone) or (default and default.hf_hub_id) or f"timm/{backbone}"


def _from_hub(name: str) -> dict[str, Tensor]:
    try:
        source = timm.create_model(f"hf_hub:{hub_name(name)}", pretrained=True)
    except Exception as error:  # the hub client raises many unrelated types
        raise CheckpointError(
            f"ImageNet weights of {name} could not be fetched from the hub "
            f"({type(error).__name__}): connect to the network, or pass "
            f"--backbone-weights FILE.safetensors ({hub_name(name)}'s model.safetensors)"
        ) from error
    state: dict[str, Tensor] = source.state_dict()
    return state
