"""What mmsegmentation calls the weights of a K-Net.

The names are those of mmsegmentation 0.x and 1.x, which agree: ``mmseg/models/decode_heads/
{knet,fcn,psp,aspp,uper}_head.py`` and ``mmseg/models/backbones/{resnet,swin}.py``. Every name here
has one there; the few that exist there alone have a reason to be dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

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


def is_knet(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is a K-Net's of mmsegmentation."""
    return any(name.startswith(f"{_UPDATE}.") for name in state)


def guess_preset(state: Mapping[str, Tensor]) -> str | None:
    """The published row that a K-Net's keys belong to; None when it is none of them.

    The two Swin-L rows have the same keys: this gives the one at 512.
    """
    return _PRESETS.get((_backbone_of(state), _head_of(state)))


_PRESETS: dict[tuple[str | None, str | None], str] = {
    ("resnet50c", "fcn"): "r50-fcn",
    ("resnet50c", "psp"): "r50-pspnet",
    ("resnet50c", "aspp"): "r50-deeplabv3",
    ("resnet50c", "uper"): "r50-upernet",
    ("swin_tiny", "uper"): "swin-t-upernet",
    ("swin_large", "uper"): "swin-l-upernet-512",
}


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
