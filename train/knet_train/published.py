"""The published K-Nets for instances and panoptic segmentation -> our checkpoints; nothing in a
file is executed.

Names of weights are those of the authors' own code (github ZwwWayne/K-Net, ``knet/det/``), which
builds on mmdetection 2: ``backbone``, ``neck`` (FPN), ``rpn_head`` (``ConvKernelHead``) and
``roi_head.mask_head`` (three ``KernelUpdateHead``). Every name here has one there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
from torch import Tensor

from knet_runtime.errors import CheckpointError, OutputError
from knet_runtime.labels import LabelMap
from knet_train.checkpoint import save_checkpoint
from knet_train.config import Config, load_config
from knet_train.data.layouts import COCO, COCO_THINGS
from knet_train.foreign import STAGE, backbone_name, map_state, read_state, renamed
from knet_train.models.build import build_segment_model
from knet_train.models.segments import SegmentKNet

_HEAD, _STAGES = "rpn_head", "roi_head.mask_head"
_FPN = f"{_HEAD}.localization_fpn"
_LEAF = r"\.(weight|bias)"
# Our name of a weight of the head -> theirs; the first match counts.
_RULES = (
    (rf"laterals\.(\d){_LEAF}", r"neck.lateral_convs.\1.conv.\2"),
    (rf"smooth\.(\d){_LEAF}", r"neck.fpn_convs.\1.conv.\2"),
    (rf"towers\.(\d)\.(\d)\.0{_LEAF}", rf"{_FPN}.convs_all_levels.\1.conv\2.conv.\3"),
    (rf"towers\.(\d)\.(\d)\.1{_LEAF}", rf"{_FPN}.convs_all_levels.\1.conv\2.gn.\3"),
    (rf"location\.0\.0{_LEAF}", rf"{_FPN}.conv_pred.conv.\1"),
    (rf"location\.0\.1{_LEAF}", rf"{_FPN}.conv_pred.gn.\1"),
    (rf"semantic\.0\.0{_LEAF}", rf"{_FPN}.aux_convs.0.conv.\1"),
    (rf"semantic\.0\.1{_LEAF}", rf"{_FPN}.aux_convs.0.gn.\1"),
    (rf"location\.1\.0{_LEAF}", rf"{_HEAD}.loc_convs.0.conv.\1"),
    (rf"location\.1\.1{_LEAF}", rf"{_HEAD}.loc_convs.0.gn.\1"),
    (rf"semantic\.1\.0{_LEAF}", rf"{_HEAD}.seg_convs.0.conv.\1"),
    (rf"semantic\.1\.1{_LEAF}", rf"{_HEAD}.seg_convs.0.gn.\1"),
)
_DEFORMED = ".conv2.conv_offset."  # of a ResNet with deformable convolutions


@dataclass(frozen=True)
class PublishedKNet:
    """A network with published weights, in evaluation mode, and an account of the file's keys."""

    model: SegmentKNet
    config: Config
    labels: LabelMap
    mapped: tuple[str, ...]  # the file's names of the weights that are in the model
    dropped: Mapping[str, str]  # the file's other names, and why each is not needed


def import_published(
    source: Path,
    output: Path,
    *,
    preset: str | None = None,
    labels: LabelMap | None = None,
    replace_output: bool = False,
) -> PublishedKNet:
    """Read ``source`` (see ``read_published``) and write it to ``output`` as a checkpoint of ours.

    Raises CheckpointError, ConfigError, and OutputError when ``output`` exists and
    ``replace_output`` is not set, or cannot be written.
    """
    if output.exists() and not replace_output:
        raise OutputError(f"{output} is there already: pass --force to replace it")
    imported = read_published(source, preset=preset, labels=labels)
    save_checkpoint(output, imported.model, imported.config, imported.labels)
    return imported


def read_published(
    source: Path, *, preset: str | None = None, labels: LabelMap | None = None
) -> PublishedKNet:
    """The K-Net in a checkpoint of the authors' code: ``.pth``, or ``.safetensors`` with the same
    keys.

    Both tasks have the same keys; 80 classes are COCO's instances and 133 its panoptic ones, and
    for others ``labels`` says which classes are things: all of them is instance segmentation.
    ``preset`` is a preset's name or a TOML file; without it, it is read from the keys. Raises
    CheckpointError when the file is damaged, would have to be executed, or does not hold just this
    network; ConfigError for a preset that does not exist.
    """
    state = read_state(source)
    if f"{_HEAD}.init_kernels.weight" not in state:
        raise CheckpointError(
            f"{source} holds no K-Net for instances or panoptic segmentation: it has no "
            "rpn_head.init_kernels.weight among its keys (semantic ones go to import-mmseg)"
        )
    if any(_DEFORMED in name for name in state):
        raise CheckpointError(
            f"{source} has deformable convolutions (R101-FPN-DCN), for which ONNX has no operator "
            "before opset 19 and TensorRT none: take the row without them"
        )
    classified = state.get(f"{_HEAD}.conv_seg.bias")
    if classified is None or classified.dim() != 1:
        raise CheckpointError(f"{source}: rpn_head.conv_seg.bias is missing or misshapen")
    labels = _labels_for(source, len(classified), labels)
    config = _config_for(source, state, labels, preset)
    model = build_segment_model(config.model, labels).eval()
    try:
        weights, dropped, _ = map_state(state, model.state_dict(), published_name)
    except CheckpointError as error:
        raise CheckpointError(f"{source} does not hold {config.preset}: {error}") from error
    model.load_state_dict(weights)
    mapped = tuple(name for name in state if name not in dropped)
    return PublishedKNet(model, config, labels, mapped, dropped)


def published_name(key: str) -> str:
    """The authors' name of our weight ``key``."""
    module, _, rest = key.partition(".")
    match module:
        case "backbone":
            return f"backbone.{backbone_name(rest)}"
        case "head":
            return renamed(rest, _RULES)
        case "stages":
            number, _, part = rest.partition(".")
            return f"{_STAGES}.{number}.{renamed(part, STAGE)}"
        case _:
            return f"{_HEAD}.{key}"


def _labels_for(source: Path, classes: int, labels: LabelMap | None) -> LabelMap:
    if labels is None:
        known = {each.num_classes: each for each in (COCO_THINGS, COCO)}
        if classes in known:
            return known[classes]
        raise CheckpointError(
            f"{source} has {classes} classes, which are not COCO's 80 or 133, and does not say "
            "which of them are things: name them with --labels labels.json"
        )
    if labels.num_classes != classes:
        raise CheckpointError(
            f"{source} has {classes} classes, and the label map {labels.num_classes}: "
            f"pass a labels.json with {classes} class_names"
        )
    if not labels.things or labels.things != tuple(range(len(labels.things))):
        raise CheckpointError(
            "the label map must name its things, and have them first, as these networks do"
        )
    return labels


def _config_for(
    source: Path, state: Mapping[str, Tensor], labels: LabelMap, preset: str | None
) -> Config:
    task = "instance" if len(labels.things) == labels.num_classes else "panoptic"
    name = preset or _guess(state, task)
    if name is None:
        raise CheckpointError(
            f"{source} has another backbone than the published ones: describe it in a TOML file "
            "and pass --preset FILE.toml"
        )
    config = load_config(name)
    if config.model.task != task:
        raise CheckpointError(
            f"{source} is for {task} segmentation by its classes, and {name} for "
            f"{config.model.task}: pass another --preset, or leave it out"
        )
    kernels = len(state[f"{_HEAD}.init_kernels.weight"])
    model = msgspec.structs.replace(config.model, kernels=kernels)
    return msgspec.structs.replace(config, model=model)


def _guess(state: Mapping[str, Tensor], task: str) -> str | None:
    blocks = {name.split(".")[2] for name in state if name.startswith("backbone.layer3.")}
    if "backbone.patch_embed.projection.weight" in state:
        return "knet-swin-l-panoptic" if task == "panoptic" else None
    backbone = {6: "r50", 23: "r101"}.get(len(blocks))
    return backbone and f"knet-{backbone}-fpn-{task}"
