"""Multiply-adds of a K-Net, as published and in its deploy form, and where they are.

Counted are convolutions and matrix products, which are nearly all of the work; the networks are
run without numbers (PyTorch's "meta" device), so a large one costs no more than a small one.
"""

from __future__ import annotations

import msgspec
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from knet_export.form.deploy import deploy_form
from knet_runtime.manifest import Size
from knet_train.build import build_model
from knet_train.config import Config
from knet_train.knet import KNet


class Operations(msgspec.Struct, frozen=True):
    """Multiply-adds for one picture of ``size``: as published and deployed, each in all and without
    backbone and head (``kernels``: initial masks and update stages)."""

    preset: str
    size: Size
    published: int
    published_kernels: int
    deployed: int
    deployed_kernels: int


def count_operations(config: Config, classes: int, size: Size) -> Operations:
    """Count for a K-Net of ``classes`` classes, on one picture of ``size`` (height, width)."""
    with torch.device("meta"):
        model = build_model(config.model, classes).eval().requires_grad_(False)
    image = torch.zeros(1, *size, 3, dtype=torch.uint8, device="meta")
    form = deploy_form(model, size)
    total, kernels = _count(model, image)
    moved = _transforms(model, size, config.model.stride)
    return Operations(config.preset, size, total + moved, kernels + moved, *_count(form, image))


def _transforms(model: KNet, size: Size, stride: int) -> int:
    """What a published network does more than ours: its feature transforms work on pixels, ours
    (``knet_train.kernels``) on the kernels, once for the sums and once for the masks."""
    kernels, channels = model.conv_seg.weight.shape[:2]
    pixels = size[0] * size[1] // stride**2
    return len(model.stages) * int(channels) ** 2 * (pixels - 2 * int(kernels))


@torch.no_grad()
def _count(network: nn.Module, image: torch.Tensor) -> tuple[int, int]:
    """All multiply-adds, and those outside of backbone and head."""
    with FlopCounterMode(display=False) as counter:
        network(image)
    parts = counter.get_flop_counts()
    name = type(network).__name__
    features = sum(sum(parts[f"{name}.{part}"].values()) for part in ("backbone", "head"))
    total = counter.get_total_flops()  # it counts an addition and a multiplication
    return total // 2, (total - features) // 2


def operations_row(counted: Operations) -> str:
    """A row of the table in this room's README: giga multiply-adds, before and after."""
    giga = [
        f"{count / 1e9:.1f}"
        for count in (
            counted.published,
            counted.deployed,
            counted.published_kernels,
            counted.deployed_kernels,
        )
    ]
    height, width = counted.size
    saved = 1 - counted.deployed / counted.published
    return (
        f"| {counted.preset} | {height}×{width} | {giga[0]} | {giga[1]} | −{100 * saved:.1f} % | "
        f"{giga[2]} | {giga[3]} |"
    )
