"""Published mmsegmentation K-Net checkpoints -> our checkpoints; nothing in a file is executed."""

from __future__ import annotations

import logging
import shlex
import zipfile
from collections.abc import Mapping
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
from knet_train.data.label_maps import ADE20K
from knet_train.mmseg_keys import (
    AUXILIARY,
    drop_reason,
    guess_preset,
    is_knet,
    is_patch_merging,
    merging_order,
    mmseg_name,
)
from knet_train.models.build import build_model
from knet_train.models.knet import KNet

_log = logging.getLogger(__name__)


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
    if not is_knet(state):
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
    return Imported(
        model,
        config,
        labels,
        mapped=tuple(name for name in state if name not in dropped),
        dropped=dropped,
        absent=absent,
        guessed=preset is None,
        auxiliary=auxiliary,
    )


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
    try:
        # Tensors stay in the file until they are copied; the format before torch 1.6 has no such.
        mapped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged pickle raises nearly anything
        text = str(error)
        if any(words in text for words in ("GLOBAL ", "nstantiate", "Can only", "call reduce")):
            raise CheckpointError(_refusal(path, text)) from error
        first = text.strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{path} is not a readable torch file, or only a part of one ({first}): "
            "download or copy it again"
        ) from error


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
    if labels is None and classes != ADE20K.num_classes:
        raise CheckpointError(
            f"{source} has {classes} classes, which are not ADE20K's {ADE20K.num_classes}: "
            "name them with --labels labels.json"
        )
    labels = labels or ADE20K
    if classes != labels.num_classes:
        raise CheckpointError(
            f"{source} has {classes} classes, and the label map {labels.num_classes}: "
            f"pass a labels.json with {classes} class_names"
        )
    return labels


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"
