"""The configuration of a model and its training: frozen, complete, and strict about its keys.

A preset is one TOML file; ``--set optim.lr=1e-4`` overrides are merged before decoding, so a
misspelt key or a wrong type is refused with its name. The resolved configuration is stored in
every checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import msgspec

from knet_runtime.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Triple = tuple[float, float, float]


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class ModelConfig(_Section, frozen=True):
    """The network; everything that decides the shape or the meaning of a weight."""

    backbone: Literal["efficientnet_lite0"]  # the timm model whose features are used
    stride: Literal[4, 8]  # of the feature map that the kernels see
    channels: int  # C: width of the feature map and of every kernel
    stages: int  # S: kernel update stages after the initial kernels
    heads: int  # of the attention among kernels
    ffn_channels: int  # hidden width of the kernels' feed-forward network
    dropout: float  # Dropout2d before the initial kernels, in training only
    mean: Triple  # RGB mean, on 0 … 255
    std: Triple  # RGB standard deviation, on 0 … 255

    def __post_init__(self) -> None:
        if self.heads < 1 or self.channels < 1 or self.channels % self.heads:
            raise ValueError(f"channels {self.channels} must be a multiple of heads {self.heads}")
        if self.stages < 1:
            raise ValueError("stages must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError("dropout must be within 0 … 1, and below 1")


class DataConfig(_Section, frozen=True):
    """What a training sample is made of."""

    train_split: str  # name of a split of the data folder
    val_split: str  # the split that selects the best checkpoint
    eval_size: tuple[int, int]  # height, width of the network's input in evaluation and export
    eval_resize: Literal["stretch", "letterbox"]  # how other sizes are fitted to it
    crop: tuple[int, int]  # height, width of a training sample
    scale: tuple[float, float]  # random scale, relative to eval_size
    aspect: float  # random stretch of width against height, up to this factor
    max_class_share: float  # a crop with more of one class is drawn again (ten tries)
    flip: float  # probability of a mirror image
    photometric: float  # probability of brightness, contrast, saturation and hue jitter
    synthetic_share: float  # share of samples that are synthetic street scenes

    def __post_init__(self) -> None:
        if min(*self.eval_size, *self.crop) < 32:
            raise ValueError("eval_size and crop must be at least 32 pixels a side")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError("scale is (smallest, largest), both above 0")
        if self.aspect < 1:
            raise ValueError("aspect must be at least 1 (1 keeps the ratio)")
        for name in ("max_class_share", "flip", "photometric", "synthetic_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be within 0 … 1")


class LossConfig(_Section, frozen=True):
    """Cross-entropy on the logits of every stage."""

    stage_weights: tuple[float, ...]  # initial kernels first, then every update stage
    class_balance: float  # exponent b of the weights (median frequency / frequency)^b; 0 is off
    early_label_stride: int  # all stages but the last compare every n-th pixel

    def __post_init__(self) -> None:
        if self.early_label_stride < 1:
            raise ValueError("early_label_stride must be at least 1 (1 compares every pixel)")
        if min(self.stage_weights, default=0.0) < 0:
            raise ValueError("stage_weights must not be negative")


class OptimConfig(_Section, frozen=True):
    """AdamW, linear warm-up, polynomial decay, and an average of the weights."""

    steps: int  # optimizer steps in all
    batch_size: int  # images per step
    lr: float  # peak learning rate
    backbone_lr_scale: float  # the backbone learns this much slower
    weight_decay: float  # on matrices and convolutions; never on norms and biases
    warmup_steps: int
    power: float  # of the polynomial decay
    clip_norm: float  # largest gradient norm
    ema_decay: float  # of the averaged weights, which are the ones that are kept

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError("steps and batch_size must be at least 1")
        if not self.lr > 0:
            raise ValueError("lr must be above 0")
        if not 0 <= self.ema_decay < 1:
            raise ValueError("ema_decay must be within 0 … 1, and below 1")


class TrainerConfig(_Section, frozen=True):
    """How the machine is used; nothing here changes what is learnt, but for rounding."""

    seed: int
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"]
    val_every: int  # steps between evaluations, which also save
    workers: int  # processes that read and augment

    def __post_init__(self) -> None:
        if self.seed < 0 or self.workers < 0 or self.val_every < 1:
            raise ValueError("seed and workers must be at least 0, val_every at least 1")


class Config(_Section, frozen=True):
    preset: str
    model: ModelConfig
    data: DataConfig
    loss: LossConfig
    optim: OptimConfig
    trainer: TrainerConfig

    def __post_init__(self) -> None:
        if len(self.loss.stage_weights) != self.model.stages + 1:
            raise ValueError(
                f"loss.stage_weights has {len(self.loss.stage_weights)} entries; "
                f"model.stages = {self.model.stages} needs {self.model.stages + 1}"
            )


def presets() -> list[str]:
    """Names that ``load_config`` knows without a file."""
    folder = resources.files("knet_train") / "presets"
    return sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".toml"))


def load_config(preset: str, overrides: Sequence[str] = ()) -> Config:
    """A preset's name or a TOML file's path, with ``key.sub=value`` overrides in TOML syntax.

    Raises ConfigError naming the unknown preset, key or type.
    """
    if preset in presets():
        text = (resources.files("knet_train") / "presets" / f"{preset}.toml").read_text("utf-8")
    elif preset.endswith(".toml"):
        try:
            text = Path(preset).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"can not read {preset}: {error}") from error
    else:
        raise ConfigError(
            f"no preset named {preset!r}: use one of {', '.join(presets())}, or a .toml file"
        )
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{preset}: {error}") from error
    for override in overrides:
        _merge(raw, override)
    return decode_config(raw, preset)


def decode_config(raw: Any, origin: str = "configuration") -> Config:
    """Plain dicts and lists -> Config; ConfigError names ``origin`` and what does not fit."""
    try:
        return msgspec.convert(raw, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{origin}: {error}") from error


def _merge(raw: dict[str, Any], override: str) -> None:
    dotted, separator, value = override.partition("=")
    keys = [key.strip() for key in dotted.split(".")]
    if not separator or not all(keys):
        raise ConfigError(f"--set {override}: write it as section.key=value")
    node = raw
    for key in keys[:-1]:
        child = node.get(key)
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: there is no section {key!r}")
        node = child
    if keys[-1] not in node:
        known = ", ".join(sorted(node))
        raise ConfigError(f"--set {override}: unknown key {keys[-1]!r}; known here: {known}")
    try:
        node[keys[-1]] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        node[keys[-1]] = value.strip()  # a bare word is a string
