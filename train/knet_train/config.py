"""The configuration of a model and its training: frozen, complete, and strict about its keys.

A preset is one TOML file; ``--set optim.lr=1e-4`` overrides are merged before decoding, so a
misspelt key or a wrong type is refused with its name. The resolved configuration is stored in
every checkpoint.
"""

from __future__ import annotations

import itertools
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

    backbone: str  # a timm model that gives features at strides 4 to 32, such as resnet50c
    output_stride: Literal[8, 16, 32]  # of the backbone's last level; below 32 by dilation
    head: Literal["fpn", "fcn", "psp", "aspp", "uper"]  # backbone levels -> the feature map
    stride: Literal[4, 8]  # of the feature map that the kernels see, and so of the logits
    channels: int  # C: width of the feature map and of every kernel
    stages: int  # S: kernel update stages after the initial kernels; 0: a plain classifier
    heads: int  # of the attention among kernels
    update_channels: int  # width of the adaptive update: C, or a divisor (a kernel in parts)
    ffn_channels: int  # hidden width of the kernels' feed-forward network
    dropout: float  # Dropout2d before the classifiers, in training
    drop_path: float  # largest rate of stochastic depth in the backbone, in training
    auxiliary_channels: int  # of a training-only classifier on the last level but one; 0: none
    mean: Triple  # RGB mean, on 0 … 255
    std: Triple  # RGB standard deviation, on 0 … 255

    def __post_init__(self) -> None:
        if self.heads < 1 or self.channels < 1 or self.channels % self.heads:
            raise ValueError(f"channels {self.channels} must be a multiple of heads {self.heads}")
        if self.update_channels < 1 or self.channels % self.update_channels:
            raise ValueError(
                f"channels {self.channels} must be a multiple of update_channels "
                f"{self.update_channels}"
            )
        if self.stages < 0 or self.ffn_channels < 1:
            raise ValueError("stages must be at least 0 (a plain head), ffn_channels at least 1")
        if self.auxiliary_channels < 0:
            raise ValueError("auxiliary_channels must be at least 0 (0 leaves it out)")
        if not 0 <= self.dropout < 1 or not 0 <= self.drop_path < 1:
            raise ValueError("dropout and drop_path must be within 0 … 1, and below 1")
        if min(self.std) <= 0:
            raise ValueError("std must be above 0")
        match self.head:
            case "fcn" | "psp" | "aspp" if self.stride != self.output_stride:
                raise ValueError(
                    f"head {self.head} works on the backbone's last level: stride {self.stride} "
                    f"must be output_stride {self.output_stride}"
                )
            case "uper" if self.stride != 4:
                raise ValueError(f"head uper works at stride 4, not {self.stride}")


class DataConfig(_Section, frozen=True):
    """What a training sample is made of, and how a picture is evaluated."""

    train_split: str  # name of a split of the data folder
    val_split: str  # the split that selects the best checkpoint
    eval_mode: Literal["fixed", "keep_ratio"]  # the size of a picture in evaluation, see the next
    eval_scale: tuple[int, int]  # keep_ratio: scaled to fit inside (longest, shortest side)
    eval_size: tuple[int, int]  # height, width of the exported network's input; fixed: also there
    eval_resize: Literal["stretch", "letterbox"]  # how other sizes are fitted to eval_size
    crop: tuple[int, int]  # height, width of a training sample
    scale: tuple[float, float]  # random scale, relative to the size of evaluation
    aspect: float  # random stretch of width against height, up to this factor
    max_class_share: float  # a crop with more of one class is drawn again (ten tries)
    flip: float  # probability of a mirror image
    photometric: float  # probability of a change of colour, each kind of which then has 1/2
    jitter: tuple[float, float, float, float]  # brightness, contrast, saturation (±), hue (turns)
    synthetic_share: float  # share of samples that are synthetic street scenes

    def __post_init__(self) -> None:
        if min(*self.eval_size, *self.crop, *self.eval_scale) < 32:
            raise ValueError("eval_size, eval_scale and crop must be at least 32 pixels a side")
        if self.eval_scale[0] < self.eval_scale[1]:
            raise ValueError("eval_scale is (longest, shortest side)")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError("scale is (smallest, largest), both above 0")
        if self.aspect < 1:
            raise ValueError("aspect must be at least 1 (1 keeps the ratio)")
        if not all(0 <= strength <= 1 for strength in self.jitter) or self.jitter[3] > 0.5:
            raise ValueError("jitter must be within 0 … 1, and its hue at most 0.5")
        for name in ("max_class_share", "flip", "photometric", "synthetic_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be within 0 … 1")


class LossConfig(_Section, frozen=True):
    """Cross-entropy on the logits of every stage."""

    stage_weights: tuple[float, ...]  # initial kernels first, then every update stage
    auxiliary_weight: float  # of the auxiliary classifier's cross-entropy
    class_balance: float  # exponent b of the weights (median frequency / frequency)^b; 0 is off
    mean_over: Literal["labelled", "all"]  # "all": ignored pixels count too, as in mmseg
    early_label_stride: int  # all stages but the last compare every n-th pixel

    def __post_init__(self) -> None:
        if self.early_label_stride < 1:
            raise ValueError("early_label_stride must be at least 1 (1 compares every pixel)")
        if min(self.stage_weights, default=0.0) < 0 or self.auxiliary_weight < 0:
            raise ValueError("stage_weights and auxiliary_weight must not be negative")


class LayerRule(_Section, frozen=True):
    """A learning rate of its own for the parameters whose name matches ``pattern``."""

    pattern: str  # with * and ?, of a parameter's name, such as backbone.layer1.*
    lr_scale: float  # times optim.lr; 0 freezes (no step, no decay)

    def __post_init__(self) -> None:
        if self.lr_scale < 0:
            raise ValueError("lr_scale must be at least 0 (0 freezes)")


class OptimConfig(_Section, frozen=True):
    """AdamW, linear warm-up, a decay, and an average of the weights."""

    steps: int  # optimizer steps in all
    batch_size: int  # images per step, over all devices and accumulated parts
    accumulate: int  # parts that a step's images are computed in, one after the other
    lr: float  # peak learning rate
    layers: tuple[LayerRule, ...]  # the first rule that matches a parameter counts
    weight_decay: float
    no_decay: tuple[str, ...]  # patterns of parameters without weight decay
    decay_vectors: bool  # whether norms, biases and other one-dimensional weights decay too
    warmup_steps: int
    warmup_start: float  # factor of lr at the first step
    schedule: Literal["poly", "step"]
    power: float  # of the polynomial decay to 0
    milestones: tuple[int, ...]  # steps after which schedule "step" divides lr by ten
    clip_norm: float  # largest gradient norm
    ema_decay: float  # of the averaged weights, which are the ones that are kept; 0: no average

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.accumulate) < 1:
            raise ValueError("steps, batch_size and accumulate must be at least 1")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}"
            )
        if not self.lr > 0 or not self.clip_norm > 0:
            raise ValueError("lr and clip_norm must be above 0")
        if self.weight_decay < 0 or self.warmup_steps < 0 or not 0 <= self.warmup_start <= 1:
            raise ValueError(
                "weight_decay and warmup_steps must be at least 0, warmup_start within 0 … 1"
            )
        if any(a >= b for a, b in itertools.pairwise(self.milestones)):
            raise ValueError("milestones must rise")
        if not 0 <= self.ema_decay < 1:
            raise ValueError("ema_decay must be within 0 … 1, and below 1")


class TrainerConfig(_Section, frozen=True):
    """How the machines are used; nothing here changes what is learnt, but for rounding."""

    seed: int
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"]
    devices: int  # processes on each machine, a device each; 0: all its GPUs, or one on the CPU
    nodes: int  # machines; torchrun or SLURM starts the processes of more than one
    sync_batchnorm: bool  # BatchNorm statistics over the whole batch of all devices
    gradient_checkpointing: bool  # compute the backbone twice instead of keeping its activations
    deterministic: bool  # only operations that give the same bits every time, also on a GPU
    val_every: int  # steps between evaluations
    save_every: int  # steps between states that --resume can go on from
    workers: int  # processes per device that read and augment

    def __post_init__(self) -> None:
        if min(self.seed, self.workers, self.devices) < 0:
            raise ValueError("seed, workers and devices must be at least 0")
        if min(self.val_every, self.save_every, self.nodes) < 1:
            raise ValueError("val_every, save_every and nodes must be at least 1")


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
        if self.loss.auxiliary_weight > 0 and not self.model.auxiliary_channels:
            raise ValueError("loss.auxiliary_weight needs model.auxiliary_channels above 0")


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


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """``config`` with ``key.sub=value`` overrides in it; raises as ``load_config`` does."""
    raw = msgspec.to_builtins(config)
    for override in overrides:
        _merge(raw, override)
    return decode_config(raw, config.preset)


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
