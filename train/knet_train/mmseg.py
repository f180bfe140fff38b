"""Published mmsegmentation K-Net checkpoints -> our checkpoints; nothing in a file is executed.

Names of weights are those of mmsegmentation 0.x and 1.x, which agree: ``mmseg/models/decode_heads/
{knet,fcn,psp,aspp,uper}_head.py`` and ``mmseg/models/backbones/{resnet,swin}.py``. Every name here
has one there; the few that exist there alone have a reason to be dropped.
"""

from __future__ import annotations

import logging
import pickle
import re
import shlex
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from knet_runtime.errors import CheckpointError, OutputError
from knet_runtime.labels import LabelMap
from knet_train.checkpoint import read_tensors, save_checkpoint
from knet_train.config import Config, load_config
from knet_train.data.layouts import ADE20K
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

# How files of torch.save before 1.6 begin: with a number, pickled. Plain pickles do not.
_LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)

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
_STAGE = (
    (r"feat_transform\.(.+)", r"feat_transform.conv.\1"),
    (r"updator\.(.+)", r"kernel_update_conv.\1"),
    (r"attention\.in_proj\.(.+)", r"attention.attn.in_proj_\1"),
    (r"attention\.out_proj\.(.+)", r"attention.attn.out_proj.\1"),
    (r"ffn\.0\.(.+)", r"ffn.layers.0.0.\1"),
    (r"ffn\.2\.(.+)", r"ffn.layers.1.\1"),
    (r"mask_fc\.(\d\..+)", r"mask_fcs.\1"),
)
_BACKBONE = (
    (r"conv1\.(\d\..+)", r"stem.\1"),  # ResNetV1c: three 3×3 convolutions for one 7×7
    (r"bn1\.(.+)", r"stem.7.\1"),
    (r"patch_embed\.proj\.(.+)", r"patch_embed.projection.\1"),
    (r"layers\.(\d\.blocks\.\d+)\.attn\.(.+)", r"stages.\1.attn.w_msa.\2"),
    (r"layers\.(\d\.blocks\.\d+)\.mlp\.fc1\.(.+)", r"stages.\1.ffn.layers.0.0.\2"),
    (r"layers\.(\d\.blocks\.\d+)\.mlp\.fc2\.(.+)", r"stages.\1.ffn.layers.1.\2"),
    (r"layers\.(\d\.blocks\.\d+\..+)", r"stages.\1"),
    (r"norms\.(\d\..+)", r"norm\1"),
)


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
        weights, dropped, absent = map_state(state, model.state_dict(), config.model.head)
    except CheckpointError as error:
        raise CheckpointError(f"{source} does not hold {config.preset}: {error}") from error
    model.load_state_dict(weights)
    for name, reason in dropped.items():
        _log.info("dropped %s: %s", name, reason)
    mapped = tuple(name for name in state if name not in dropped)
    return Imported(model, config, labels, mapped, dropped, absent, preset is None, auxiliary)


def map_state(
    state: Mapping[str, Tensor], needed: Mapping[str, Tensor], head: str
) -> tuple[dict[str, Tensor], dict[str, str], tuple[str, ...]]:
    """A state dict of mmsegmentation -> one with the keys, shapes and types of ``needed``.

    Also gives the names that were dropped, with the reason, and the BatchNorm counters that the
    file lacks. Raises CheckpointError naming a missing, misshapen or unknown key, or one with a
    value that is not finite.
    """
    names = {key: mmseg_name(key, head) for key in needed}
    absent = tuple(n for n in names.values() if n not in state and n.endswith("batches_tracked"))
    missing = [n for n in names.values() if n not in state and n not in absent]
    if missing:
        raise CheckpointError(f"it lacks {_listed(missing)}")
    wanted = set(names.values())
    dropped = {n: reason for n in state if n not in wanted and (reason := drop_reason(n))}
    unknown = [n for n in state if n not in wanted and n not in dropped]
    if unknown:
        raise CheckpointError(f"it has {_listed(unknown)}, which nothing here is called")
    weights = {}
    for key, like in needed.items():
        name = names[key]
        value = torch.zeros_like(like) if name in absent else state[name]
        if value.shape != like.shape or value.is_floating_point() != like.is_floating_point():
            raise CheckpointError(
                f"{name} is {value.dtype} {list(value.shape)} and should be "
                f"{like.dtype} {list(like.shape)}"
            )
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"{name} has values that are NaN or infinite: the file is damaged, or its training "
                "diverged"
            )
        weights[key] = (merging_order(value) if is_patch_merging(key) else value).to(like.dtype)
    return weights, dropped, absent


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a ``.safetensors`` file, or in a ``.pth`` (bare, or under "state_dict").

    Raises CheckpointError; nothing in the file is executed.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is no file: pass a checkpoint of mmsegmentation, FILE.pth")
    if path.suffix == ".safetensors":
        return read_tensors(path, "download or copy it again")[1]
    loaded = _unpickled(path)
    state = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else loaded
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f'{path} holds no state dict, neither bare nor under "state_dict"')
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: {key!r} in its state dict is {type(value).__name__}, not a tensor"
            )
        if value.layout != torch.strided or value.is_quantized:
            raise CheckpointError(f"{path}: {key} is a sparse or quantised tensor: save it dense")
    # Training on several GPUs may have wrapped the model once more.
    prefix = "module." if all(key.startswith("module.") for key in state) else ""
    return {key[len(prefix) :]: value for key, value in state.items()}


def _unpickled(path: Path) -> Any:
    # Tensors stay in the file until they are copied; the format before torch 1.6 has no such.
    mapped = zipfile.is_zipfile(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the errors below say
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged pickle raises nearly anything
        text = str(error)
        refused = any(t in text for t in ("GLOBAL ", "nstantiate", "Can only", "call reduce"))
        if refused and (mapped or _starts_with(path, _LEGACY)):
            raise CheckpointError(_refusal(path, text)) from error
        if "TorchScript" in text:
            raise CheckpointError(
                f"{path} is a TorchScript program: pass the checkpoint that it was made from"
            ) from error
        # Not torch's own text: it advises to load the file unsafely.
        raise CheckpointError(
            f"{path} is not a readable torch file, or only a part of one, or a plain pickle: "
            "download or copy it again, or get one that torch.save wrote"
        ) from error


def _starts_with(path: Path, data: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(data)) == data


def _refusal(path: Path, text: str) -> str:
    found = text.partition("GLOBAL ")[2].split(" ")[0]
    what = f"a pickled {found}" if found else "pickled objects"
    if "is blocked" in text:  # torch's own list: os, sys, subprocess and their like
        return (
            f"{path} holds {what}, which runs code and is no part of any checkpoint, so it was not "
            "read: get the file from its authors"
        )
    small = str(path.with_name(f"{path.stem}-weights.pth"))
    code = (
        f'import torch; file = torch.load({str(path)!r}, map_location="cpu", weights_only=False); '
        f'torch.save({{"state_dict": file["state_dict"]}}, {small!r})'
    )
    return (
        f"{path} holds {what} besides its weights; reading that would run code from the file, so "
        f"it was not read. Where its origin is trusted, save the weights alone and import those: "
        f"python -c {shlex.quote(code)}"
    )


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


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"


def mmseg_name(key: str, head: str) -> str:
    """mmsegmentation's name of our weight ``key``; ``head`` is ``ModelConfig.head``."""
    module, _, rest = key.partition(".")
    match module:
        case "backbone":
            return f"backbone.{_backbone_name(rest)}"
        case "head":
            stem, kind, leaf = _renamed(rest, _BLOCK).rsplit(".", 2)
            name = _FUSE.get(head, stem) if stem == "fuse" else _renamed(stem, _HEAD)
            return f"{_GENERATE}.{name}.{kind}.{leaf}"
        case "conv_seg":
            return f"{_GENERATE}.{key}"
        case "stages":
            number, _, part = rest.partition(".")
            return f"{_UPDATE}.{number}.{_renamed(part, _STAGE)}"
        case "auxiliary":
            block = _renamed(rest, _BLOCK)
            return AUXILIARY + re.sub(r"^conv\.", "convs.0.", block)
    return key


def _backbone_name(key: str) -> str:
    # Patch merging ends a stage there, and begins the next one in timm.
    merging = re.fullmatch(r"layers\.(\d)\.downsample\.(.+)", key)
    if merging:
        return f"stages.{int(merging[1]) - 1}.downsample.{merging[2]}"
    return _renamed(key, _BACKBONE)


def _renamed(key: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, name in rules:
        match = re.fullmatch(pattern, key)
        if match:
            return match.expand(name)
    return key


def drop_reason(name: str) -> str | None:
    """Why mmsegmentation's weight ``name`` is not needed here; None when it is, or is unknown."""
    if name.endswith(".attn.w_msa.relative_position_index"):
        return "follows from the window's size"
    return None


def is_patch_merging(key: str) -> bool:
    """Whether the last axis of our weight ``key`` runs over the four patches that Swin merges."""
    pattern = r"backbone\.layers\.\d\.downsample\.(norm\..+|reduction\.weight)"
    return re.fullmatch(pattern, key) is not None


def merging_order(value: Tensor) -> Tensor:
    """Columns of a patch merging, [..., 4C]: from mmsegmentation's order (channel, row, column;
    ``nn.Unfold``) to timm's (column, row, channel)."""
    split = value.reshape(*value.shape[:-1], value.shape[-1] // 4, 2, 2)
    axes = (*range(value.dim() - 1), *(value.dim() + i for i in (1, 0, -1)))
    return split.permute(axes).reshape(value.shape)


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
