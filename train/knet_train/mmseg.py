"""Published mmsegmentation K-Net checkpoints -> our checkpoints; nothing in a file is executed.

Names of weights are those of mmsegmentation 0.x and 1.x, which agree: ``mmseg/models/decode_heads/
{knet,fcn,psp,aspp,uper}_head.py`` and ``mmseg/models/backbones/{resnet,swin}.py``. Every name here
has one there; the few that exist there alone have a reason to be dropped.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
from torch import Tensor

from knet_runtime.errors import CheckpointError, OutputError
from knet_runtime.labels import LabelMap
from knet_train.checkpoint import save_checkpoint
from knet_train.config import Config, load_config
from knet_train.data.layouts import ADE20K
from knet_train.foreign import STAGE, backbone_name, map_state, read_state, renamed
from knet_train.models.build import build_model
from knet_train.models.knet import KNet

_log = logging.getLogger(__name__)

# By backbone and head; the two Swin-L rows have the same keys.
_PRESETS: dict[tuple[str | None, str | None], str] = {
    ("resnet50c", "fcn"): "r50-fcn",
    ("resnet50c", "psp"): "r50-pspnet",
    ("resnet50c", "aspp"): "r50-deeplabv3",
    ("resnet50c", "uper"): "r50-upernet",
    ("swin_tiny", "uper"): "swin-t-upernet",
    ("swin_large", "uper"): "swin-l-upernet-512",
}

_GENERATE = "decode_head.kernel_generate_head"
_UPDATE = "decode_head.kernel_update_head"
AUXILIARY = "auxiliary_head."

# Our name -> mmsegmentation's, first match; the last convolution of a feature head stands in _FUSE.
_BLOCK = (
    (r"(.+)\.0\.weight", r"\1.conv.weight"),
    (r"(.+)\.1\.(weight|bias|running_mean|running_var|num_batches_tracked)", r"\1.bn.\2"),
)
_HEAD = (
    (r"pyramid\.branches\.(\d)", r"psp_modules.\1.1"),
    (r"pyramid\.fuse", "bottleneck"),
    (r"image_pool", "image_pool.1"),
    (r"branches\.(\d)", r"aspp_modules.\1"),
    (r"laterals\.(\d)", r"lateral_convs.\1"),
    (r"smooth\.(\d)", r"fpn_convs.\1"),
    (r"convs\.(\d)", r"convs.\1"),
)
_FUSE = {"fcn": "conv_cat", "aspp": "bottleneck", "uper": "fpn_bottleneck"}


@dataclass(frozen=True)
class Imported:
    """A network with published weights, in evaluation mode, and an account of the file's keys."""

    model: KNet
    config: Config
    labels: LabelMap
    mapped: tuple[str, ...]  # the file's names of the weights that are in the model
    dropped: Mapping[str, str]  # the file's other names, and why each is not needed
    absent: tuple[str, ...]  # counters of BatchNorm that the file lacks; they begin at 0
    guessed: bool  # whether the preset was read from the keys
    auxiliary: bool  # whether the file holds the auxiliary classifier that training continues with


def import_mmseg(
    source: Path,
    output: Path,
    *,
    preset: str | None = None,
    labels: LabelMap | None = None,
    replace_output: bool = False,
) -> Imported:
    """Read ``source`` (see ``read_mmseg``) and write it to ``output`` as a checkpoint of ours.

    Raises CheckpointError, ConfigError, and OutputError when ``output`` exists and
    ``replace_output`` is not set, or cannot be written.
    """
    if output.exists() and not replace_output:
        raise OutputError(f"{output} is there already: pass --force to replace it")
    imported = read_mmseg(source, preset=preset, labels=labels)
    save_checkpoint(output, imported.model, imported.config, imported.labels)
    return imported


def read_mmseg(
    source: Path, *, preset: str | None = None, labels: LabelMap | None = None
) -> Imported:
    """The K-Net in a checkpoint of mmsegmentation 0.x or 1.x: ``.pth``, or ``.safetensors`` with
    the same keys.

    ``preset`` is a preset's name or a TOML file, checked against the keys; without it, it is
    guessed from them (the Swin-L rows at 512 and 640 cannot be told apart: 512). ``labels`` names
    the classes; without it, 150 classes are ADE20K's. Raises CheckpointError when the file is
    damaged, would have to be executed, or does not hold just this network; ConfigError for a
    preset that does not exist.
    """
    state = read_state(source)
    if not any(name.startswith(f"{_UPDATE}.") for name in state):
        raise CheckpointError(
            f"{source} holds no K-Net of mmsegmentation: it has no "
            "decode_head.kernel_update_head.* among its keys"
        )
    config = _config_for(source, state, preset)
    seg = state.get(mmseg_name("conv_seg.weight", config.model.head))
    if seg is None or seg.dim() != 4:
        raise CheckpointError(
            f"{source}: decode_head.kernel_generate_head.conv_seg.weight is missing or misshapen; "
            "its first axis counts the classes"
        )
    labels = _labels_for(source, seg.shape[0], labels)
    auxiliary = any(name.startswith(AUXILIARY) for name in state)
    if not auxiliary:
        config = msgspec.structs.replace(
            config,
            model=msgspec.structs.replace(config.model, auxiliary_channels=0),
            loss=msgspec.structs.replace(config.loss, auxiliary_weight=0.0),
        )
    model = build_model(config.model, labels.num_classes).eval()
    try:
        weights, dropped, absent = map_state(
            state, model.state_dict(), partial(mmseg_name, head=config.model.head)
        )
    except CheckpointError as error:
        raise CheckpointError(f"{source} does not hold {config.preset}: {error}") from error
    model.load_state_dict(weights)
    for name, reason in dropped.items():
        _log.info("dropped %s: %s", name, reason)
    mapped = tuple(name for name in state if name not in dropped)
    return Imported(model, config, labels, mapped, dropped, absent, preset is None, auxiliary)


def _config_for(source: Path, state: Mapping[str, Tensor], preset: str | None) -> Config:
    guess = guess_preset(state)
    if preset is None:
        if guess is None:
            raise CheckpointError(
                f"{source} is a K-Net with another backbone or head than the published ones: "
                "describe it in a TOML file and pass --preset FILE.toml"
            )
        return load_config(guess)
    config = load_config(preset)
    if guess is not None:
        found = load_config(guess).model
        if (found.backbone, found.head) != (config.model.backbone, config.model.head):
            raise CheckpointError(
                f"{source} holds {guess} by its keys, not {preset}: pass --preset {guess}, or "
                "leave --preset out"
            )
    return config


def _labels_for(source: Path, classes: int, labels: LabelMap | None) -> LabelMap:
    wanted = labels or ADE20K
    if classes == wanted.num_classes:
        return wanted
    if labels is None:
        raise CheckpointError(
            f"{source} has {classes} classes, which are not ADE20K's {ADE20K.num_classes}: "
            "name them with --labels labels.json"
        )
    raise CheckpointError(
        f"{source} has {classes} classes, and the label map {labels.num_classes}: "
        f"pass a labels.json with {classes} class_names"
    )


def mmseg_name(key: str, head: str) -> str:
    """mmsegmentation's name of our weight ``key``; ``head`` is ``ModelConfig.head``."""
    module, _, rest = key.partition(".")
    match module:
        case "backbone":
            return f"backbone.{_backbone(rest)}"
        case "head":
            stem, kind, leaf = renamed(rest, _BLOCK).rsplit(".", 2)
            name = _FUSE.get(head, stem) if stem == "fuse" else renamed(stem, _HEAD)
            return f"{_GENERATE}.{name}.{kind}.{leaf}"
        case "conv_seg":
            return f"{_GENERATE}.{key}"
        case "stages":
            number, _, part = rest.partition(".")
            return f"{_UPDATE}.{number}.{renamed(part, STAGE)}"
        case "auxiliary":
            block = renamed(rest, _BLOCK)
            return AUXILIARY + re.sub(r"^conv\.", "convs.0.", block)
    return key


def _backbone(key: str) -> str:
    # ResNetV1c has three 3×3 convolutions for one 7×7, and its norm stands among them.
    return re.sub(r"^bn1\.", "stem.7.", backbone_name(key))


def guess_preset(state: Mapping[str, Tensor]) -> str | None:
    """The published row that a K-Net's keys belong to; None when it is none of them.

    The two Swin-L rows have the same keys: this gives the one at 512.
    """
    return _PRESETS.get((_backbone_of(state), _head_of(state)))


def _head_of(state: Mapping[str, Tensor]) -> str | None:
    parts = {name.split(".")[2] for name in state if name.startswith(f"{_GENERATE}.")}
    heads = {"fpn_convs": "uper", "psp_modules": "psp", "aspp_modules": "aspp", "conv_cat": "fcn"}
    return next((head for part, head in heads.items() if part in parts), None)


def _backbone_of(state: Mapping[str, Tensor]) -> str | None:
    def depth(stage: str) -> int:
        prefix = f"backbone.{stage}."
        return len({n[len(prefix) :].partition(".")[0] for n in state if n.startswith(prefix)})

    if "backbone.stem.0.weight" in state:
        return "resnet50c" if depth("layer3") == 6 else None
    patches = state.get("backbone.patch_embed.projection.weight")
    if patches is None or patches.dim() == 0:
        return None
    return {(96, 6): "swin_tiny", (192, 18): "swin_large"}.get(
        (patches.shape[0], depth("stages.2.blocks"))
    )
