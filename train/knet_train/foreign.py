"""Checkpoints that others wrote: how they are read without executing anything, and how their
weights become ours, every key accounted for.

Both of the authors' code bases name the parts that they share alike: ``KernelUpdateHead`` and the
backbones of mmcv, mmsegmentation and mmdetection.
"""

from __future__ import annotations

import pickle
import re
import shlex
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knet_runtime.errors import CheckpointError
from knet_train.checkpoint import read_tensors

# How files of torch.save before 1.6 begin: with a number, pickled. Plain pickles do not.
_LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)

# Our names -> theirs; the first match counts.
STAGE = (
    (r"feat_transform\.(.+)", r"feat_transform.conv.\1"),
    (r"updator\.(.+)", r"kernel_update_conv.\1"),
    (r"attention\.in_proj\.(.+)", r"attention.attn.in_proj_\1"),
    (r"attention\.out_proj\.(.+)", r"attention.attn.out_proj.\1"),
    (r"ffn\.0\.(.+)", r"ffn.layers.0.0.\1"),
    (r"ffn\.2\.(.+)", r"ffn.layers.1.\1"),
    (r"mask_fc\.(\d\..+)", r"mask_fcs.\1"),
    (r"class_fc\.(\d\..+)", r"cls_fcs.\1"),
    (r"fc_class\.(.+)", r"fc_cls.\1"),
)
"""Of a kernel update stage, without its number."""
_BACKBONE = (
    (r"conv1\.(\d\..+)", r"stem.\1"),  # ResNetV1c: three 3×3 convolutions for one 7×7
    (r"patch_embed\.proj\.(.+)", r"patch_embed.projection.\1"),
    (r"layers\.(\d\.blocks\.\d+)\.attn\.(.+)", r"stages.\1.attn.w_msa.\2"),
    (r"layers\.(\d\.blocks\.\d+)\.mlp\.fc1\.(.+)", r"stages.\1.ffn.layers.0.0.\2"),
    (r"layers\.(\d\.blocks\.\d+)\.mlp\.fc2\.(.+)", r"stages.\1.ffn.layers.1.\2"),
    (r"layers\.(\d\.blocks\.\d+\..+)", r"stages.\1"),
    (r"norms\.(\d\..+)", r"norm\1"),
)


def map_state(
    state: Mapping[str, Tensor], needed: Mapping[str, Tensor], name_of: Callable[[str], str]
) -> tuple[dict[str, Tensor], dict[str, str], tuple[str, ...]]:
    """A foreign state dict -> one with the keys, shapes and types of ``needed``;
    ``name_of`` gives the foreign name of one of those keys.

    Also gives the names that were dropped, with the reason, and the BatchNorm counters that the
    file lacks. Raises CheckpointError naming a missing, misshapen or unknown key, or one with a
    value that is not finite.
    """
    names = {key: name_of(key) for key in needed}
    absent = tuple(n for n in names.values() if n not in state and n.endswith("batches_tracked"))
    missing = [n for n in names.values() if n not in state and n not in absent]
    if missing:
        raise CheckpointError(f"it lacks {listed(missing)}")
    wanted = set(names.values())
    dropped = {n: reason for n in state if n not in wanted and (reason := drop_reason(n))}
    unknown = [n for n in state if n not in wanted and n not in dropped]
    if unknown:
        raise CheckpointError(f"it has {listed(unknown)}, which nothing here is called")
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
        raise CheckpointError(f"{path} is no file: pass a published checkpoint, FILE.pth")
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
        if refused and (mapped or (_starts_with(path, _LEGACY) and not _ends_in_a_name(path))):
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


def _ends_in_a_name(path: Path) -> bool:
    """Whether a pickle was cut where it names a class or function: "c", its module and it, each on
    a line of its own. What is left of the name is none that can be trusted or not."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 200))
        return re.search(rb"c[\w.]*(\n\w*)?\Z", file.read()) is not None


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


def listed(names: list[str]) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"


def backbone_name(key: str) -> str:
    """The foreign name of a backbone's weight."""
    # Patch merging ends a stage there, and begins the next one in timm.
    merging = re.fullmatch(r"layers\.(\d)\.downsample\.(.+)", key)
    if merging:
        return f"stages.{int(merging[1]) - 1}.downsample.{merging[2]}"
    return renamed(key, _BACKBONE)


def renamed(key: str, rules: Iterable[tuple[str, str]]) -> str:
    """What the first rule (a regular expression, and the name) makes of a key; else the key."""
    for pattern, name in rules:
        match = re.fullmatch(pattern, key)
        if match:
            return match.expand(name)
    return key


def drop_reason(name: str) -> str | None:
    """Why the weight ``name`` is not needed here; None when it is, or is unknown."""
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
