"""The configuration of a model and its training: frozen, complete, and strict about its keys.

A preset is one TOML file; ``--set optim.lr=1e-4`` overrides are merged before decoding, so a
misspelt key or a wrong type is refused with its name. The resolved configuration is stored in
every checkpoint.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import msgspec
import msgspec.inspect

from knet_runtime.errors import ConfigError
from knet_runtime.types import Task

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# The bounds of every number: no value within them is absurd, and none beyond them is meant.
Whole = Annotated[int, msgspec.Meta(ge=0, le=10**9)]
Count = Annotated[int, msgspec.Meta(ge=1, le=10**9)]
Seed = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
Side = Annotated[int, msgspec.Meta(ge=32, le=8192)]  # pixels
Width = Annotated[int, msgspec.Meta(ge=1, le=8192)]  # channels
Hidden = Annotated[int, msgspec.Meta(ge=1, le=65536)]
Auxiliary = Annotated[int, msgspec.Meta(ge=0, le=8192)]
Stages = Annotated[int, msgspec.Meta(ge=0, le=32)]
Few = Annotated[int, msgspec.Meta(ge=1, le=32)]
Kernels = Annotated[int, msgspec.Meta(ge=0, le=1000)]
Batch = Annotated[int, msgspec.Meta(ge=1, le=65536)]
Processes = Annotated[int, msgspec.Meta(ge=0, le=1024)]
Colour = Annotated[float, msgspec.Meta(ge=-1000, le=1000)]
Spread = Annotated[float, msgspec.Meta(ge=1e-3, le=1000)]
Scale = Annotated[float, msgspec.Meta(gt=0, le=8)]
Factor = Annotated[float, msgspec.Meta(ge=1, le=8)]
Temperature = Annotated[float, msgspec.Meta(ge=0.1, le=100)]
Exponent = Annotated[float, msgspec.Meta(ge=0, le=10)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e9)]
NotNegative = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Half = Annotated[float, msgspec.Meta(ge=0, le=0.5)]
Overlap = Annotated[float, msgspec.Meta(gt=0, le=1)]
Rate = Annotated[float, msgspec.Meta(ge=0, lt=1)]


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class ModelConfig(_Section, frozen=True):
    """The network; everything that decides the shape or the meaning of a weight."""

    backbone: str  # a timm model that gives features at strides 4 to 32, such as resnet50c
    output_stride: Literal[8, 16, 32]  # of the backbone's last level; below 32 by dilation
    head: Literal["fpn", "fcn", "psp", "aspp", "uper", "localisation"]  # levels -> feature map
    stride: Literal[4, 8]  # of the feature map that the kernels see; semantic: and of the logits
    channels: Width  # C: width of the feature map and of every kernel
    stages: Stages  # S: kernel update stages after the initial kernels; 0: a plain classifier
    heads: Width  # of the attention among kernels
    update_channels: Width  # width of the adaptive update: C, or a divisor (a kernel in parts)
    ffn_channels: Hidden  # hidden width of the kernels' feed-forward network
    dropout: Rate  # Dropout2d before the classifiers, in training
    drop_path: Rate  # largest rate of stochastic depth in the backbone, in training
    auxiliary_channels: (
        Auxiliary  # of a training-only classifier on the last level but one; 0: none
    )
    mean: tuple[Colour, Colour, Colour]  # RGB mean, on 0 … 255
    std: tuple[Spread, Spread, Spread]  # RGB standard deviation, on 0 … 255
    task: Task = "semantic"  # what it finds: classes, single objects, or both
    kernels: Kernels = 0  # N: objects that it can find at once; 0 in semantic segmentation
    nms: Overlap = 1.0  # IoU from which the surer of two objects' masks is kept; 1: both are

    def __post_init__(self) -> None:
        if self.channels % self.heads:
            raise ValueError(f"channels {self.channels} must be a multiple of heads {self.heads}")
        if self.channels % self.update_channels:
            raise ValueError(
                f"channels {self.channels} must be a multiple of update_channels "
                f"{self.update_channels}"
            )
        if (self.task == "semantic") != (self.kernels == 0):
            raise ValueError(
                f"kernels {self.kernels}: they are objects, which task instance or panoptic has; 0 "
                "for task semantic"
            )
        match self.head:
            case "localisation" if self.task == "semantic" or self.stride != 8:
                raise ValueError("head localisation is for task instance or panoptic, at stride 8")
            case "localisation" if self.channels % 32 or self.output_stride != 32:
                raise ValueError(
                    f"head localisation takes channels in multiples of 32, not {self.channels}, "
                    f"and output_stride 32, not {self.output_stride}"
                )
            case head if head != "localisation" and self.task != "semantic":
                raise ValueError(f"task {self.task} wants head localisation, not {head}")
            case "fcn" | "psp" | "aspp" if self.stride != self.output_stride:
                raise ValueError(
                    f"head {self.head} works on the backbone's last level: stride {self.stride} "
                    f"must be output_stride {self.output_stride}"
                )
            case "uper" if self.stride != 4:
                raise ValueError(f"head uper works at stride 4, not {self.stride}")


class DataConfig(_Section, frozen=True):
    """What a training sample is made of, and how an image is evaluated."""

    train_split: str  # name of a split of the data folder
    val_split: str  # the split that selects the best checkpoint
    eval_mode: Literal["fixed", "keep_ratio"]  # the size of an image in evaluation, see the next
    eval_scale: tuple[Side, Side]  # keep_ratio: scaled to fit inside (longest, shortest side)
    eval_size: tuple[Side, Side]  # height, width of the exported network's input; fixed: also there
    eval_resize: Literal["stretch", "letterbox"]  # how other sizes are fitted to eval_size
    crop: tuple[Side, Side]  # height, width of a training sample
    scale: tuple[Scale, Scale]  # random scale, relative to the size of evaluation
    aspect: Factor  # random stretch of width against height, up to this factor
    max_class_share: Share  # a crop with more of one class is drawn again (ten tries)
    flip: Share  # probability of a mirror image
    photometric: Share  # probability of a change of colour, each kind of which then has 1/2
    jitter: tuple[Share, Share, Share, Half]  # brightness, contrast, saturation (±), hue (turns)
    synthetic_share: Share  # share of samples that are synthetic street scenes
    copy_paste: Share = 0.0  # probability of another image's objects on top, where there are any
    leave_out: tuple[str, ...] = ()  # drives of train_split that choose the best, instead of val
    unlabelled_share: Share = 0.25  # of the other samples, of train --unlabelled's images

    def __post_init__(self) -> None:
        if self.eval_scale[0] < self.eval_scale[1]:
            raise ValueError("eval_scale is (longest, shortest side)")
        if self.scale[0] > self.scale[1]:
            raise ValueError("scale is (smallest, largest)")


class LossConfig(_Section, frozen=True):
    """Cross-entropy on the logits of every stage, and what they learn from soft labels."""

    stage_weights: tuple[NotNegative, ...]  # initial kernels first, then every update stage
    auxiliary_weight: NotNegative  # of the auxiliary classifier's cross-entropy
    class_balance: Exponent  # exponent b of the weights (median frequency / frequency)^b; 0 is off
    mean_over: Literal["labelled", "all"]  # "all": ignored pixels count too, as in mmseg
    early_label_stride: Few  # all stages but the last compare every n-th pixel
    void: Literal["ignored", "background"] = "ignored"  # unlabelled pixels, where there are objects
    class_weight: NotNegative = 2.0  # of the loss of kernels' classes, where there are objects
    rank_weight: NotNegative = 0.1  # of which kernel is the highest at a pixel, if panoptic
    negative_iou: Share = 1.0  # a kernel without an object is told so up to this IoU with any
    distill_weight: NotNegative = 1.0  # of the divergence from soft labels, where there are any
    distill_temperature: Temperature = 1.0  # that softens both sides of it
    distill_stages: Literal["all", "last"] = "all"  # which stages' logits learn from soft labels

    def __post_init__(self) -> None:
        if self.stage_weights and not any(self.stage_weights):
            raise ValueError("stage_weights are all 0: nothing would be learnt")


class LayerRule(_Section, frozen=True):
    """A learning rate of its own for the parameters whose name matches ``pattern``."""

    pattern: str  # with * and ?, of a parameter's name, such as backbone.layer1.*
    lr_scale: NotNegative  # times optim.lr; 0 freezes (no step, no decay)


class OptimConfig(_Section, frozen=True):
    """AdamW, linear warm-up, a decay, and an average of the weights."""

    steps: Count  # optimizer steps in all
    batch_size: Batch  # images per step, over all devices and accumulated parts
    accumulate: Batch  # parts that a step's images are computed in, one after the other
    lr: Positive  # peak learning rate
    layers: tuple[LayerRule, ...]  # the first rule that matches a parameter counts
    weight_decay: NotNegative  # decoupled, as AdamW's is
    no_decay: tuple[str, ...]  # patterns of parameters without weight decay
    decay_vectors: bool  # whether norms, biases and other one-dimensional weights decay too
    warmup_steps: Whole  # in which the learning rate rises to lr, linearly
    warmup_start: Share  # factor of lr at the first step
    schedule: Literal["poly", "step"]  # how lr falls after that: see power, or milestones
    power: Exponent  # of the polynomial decay to 0
    milestones: tuple[Count, ...]  # steps after which schedule "step" divides lr by ten
    clip_norm: Positive  # largest gradient norm
    ema_decay: Rate  # of the averaged weights, which are the ones that are kept; 0: no average
    held_norms: tuple[str, ...] = ()  # patterns of BatchNorms' parameters: statistics stay

    def __post_init__(self) -> None:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}"
            )
        if any(a >= b for a, b in itertools.pairwise(self.milestones)):
            raise ValueError("milestones must rise")


class TrainerConfig(_Section, frozen=True):
    """How the machines are used; nothing here changes what is learnt, but for rounding."""

    seed: Seed  # of new weights, samples and dropout
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"]  # auto: bf16 if it can
    devices: Processes  # processes on each machine, a device each; 0: all its GPUs, or 1 on the CPU
    nodes: Batch  # machines; torchrun or SLURM starts the processes of more than one
    sync_batchnorm: bool  # BatchNorm statistics over the whole batch of all devices
    gradient_checkpointing: bool  # compute the backbone twice instead of keeping its activations
    deterministic: bool  # only operations that give the same bits every time, also on a GPU
    val_every: Count  # steps between evaluations
    save_every: Count  # steps between states that --resume can continue from
    workers: Processes  # processes per device that read and augment


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

    Raises ConfigError naming the unknown preset or key, or the key and what it takes.
    """
    if preset in presets():
        text = (resources.files("knet_train") / "presets" / f"{preset}.toml").read_text("utf-8")
    elif preset.endswith(".toml"):
        try:
            text = Path(preset).read_text("utf-8-sig")  # as Windows writes it
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {preset}: {error}") from error
    else:
        raise ConfigError(
            f"no preset named {preset!r}: use one of {', '.join(presets())}, or a .toml file"
        )
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{preset}: {error}") from error
    return _overridden(decode_config(raw, preset), overrides, preset)


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """``config`` with ``key.sub=value`` overrides in it; raises as ``load_config`` does."""
    return _overridden(config, overrides, config.preset)


def _overridden(config: Config, overrides: Sequence[str], origin: str) -> Config:
    raw = msgspec.to_builtins(config)
    for override in overrides:
        _merge(raw, override)
    return decode_config(raw, origin)


def decode_config(raw: Any, origin: str = "configuration") -> Config:
    """Plain dicts and lists -> Config; ConfigError names the key that does not fit, and what it
    takes, or ``origin``."""
    try:
        return msgspec.convert(raw, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(_in_words(str(error), raw, origin)) from error


def _in_words(error: str, raw: Any, origin: str) -> str:
    """msgspec's error by the section or key that it names; the value and what the key takes."""
    reason, _, path = error.partition(" - at `$.")
    section, key, *_ = [*re.findall(r"\w+", path), "", ""]
    if not section:
        return f"{origin}: {error}"
    file = f"{origin}: " if origin.endswith(".toml") else ""  # a preset of ours has no fault
    if not key:
        return f"{file}{section}: {reason}"
    return f"{file}{section}.{key} is {raw[section][key]!r}; it takes {accepted(section, key)}"


def accepted(section: str, key: str) -> str:
    """What values a setting takes, in words.

    >>> accepted("model", "head")
    'one of fcn, fpn, psp, aspp, uper'
    """
    found = msgspec.inspect.type_info(get_type_hints(Config)[section])
    assert isinstance(found, msgspec.inspect.StructType)
    return _taken({field.name: field.type for field in found.fields}[key])


def _taken(kind: msgspec.inspect.Type) -> str:
    """What values a type has, in words."""
    match kind:
        case msgspec.inspect.LiteralType(values=values):
            return "one of " + ", ".join(
                sorted(map(str, values), key=lambda value: (len(value), value))
            )
        case msgspec.inspect.IntType():
            return f"a whole number {_bounds(kind)}"
        case msgspec.inspect.FloatType():
            return f"a number {_bounds(kind)}"
        case msgspec.inspect.BoolType():
            return "true or false"
        case msgspec.inspect.TupleType(item_types=kinds):
            each = [_taken(inner) for inner in kinds]
            return f"a list of {len(each)}: " + (
                f"each {each[0]}" if len(set(each)) == 1 else "; ".join(each)
            )
        case msgspec.inspect.VarTupleType(item_type=inner):
            return f"a list, each {_taken(inner)}"
        case msgspec.inspect.StructType(fields=fields):
            parts = (f"{field.name} = {_taken(field.type)}" for field in fields)
            return f"a table {{{', '.join(parts)}}}"
    return "a text"


def _bounds(kind: msgspec.inspect.IntType | msgspec.inspect.FloatType) -> str:
    low = f"from {_number(kind.ge)}" if kind.ge is not None else f"above {_number(kind.gt)}"
    return low + (f" to {_number(kind.le)}" if kind.le is not None else f" to below {kind.lt}")


def _number(value: float | None) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


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
