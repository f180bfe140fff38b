"""Multiply-adds of every preset, as published and fused: a table of docs/results/models.md.

    python benchmarks/operations.py

Counted, not timed, so it says the same on every machine; a test holds the page to it. Counted are
convolutions and matrix products, which are nearly all of the work; the networks are run without
numbers (PyTorch's "meta" device), so a large one costs no more than a small one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from knet_export.fuse.model import fuse
from knet_runtime.types import Size
from knet_train.config import Config, load_config, presets
from knet_train.models.build import build_model
from knet_train.models.knet import KNet

CLASSES = {"knet-edge": 11}  # CamVid; the others are ADE20K's 150


class Operations(NamedTuple):
    """Multiply-adds for one image of ``size``: as published and fused, each in all and without
    backbone and head (``kernels``: initial masks and update stages)."""

    preset: str
    size: Size
    published: int
    published_kernels: int
    fused: int
    fused_kernels: int

    def row(self) -> str:
        """A row of the page's table: giga multiply-adds, before and after."""
        counts = (self.published, self.fused, self.published_kernels, self.fused_kernels)
        giga = [f"{count / 1e9:.1f}" for count in counts]
        height, width = self.size
        saved = 1 - self.fused / self.published
        return (
            f"| {self.preset} | {height}×{width} | {giga[0]} | {giga[1]} | −{100 * saved:.1f} % | "
            f"{giga[2]} | {giga[3]} |"
        )


def count_operations(config: Config, classes: int, size: Size) -> Operations:
    """Count for a K-Net of ``classes`` classes, on one image of ``size`` (height, width)."""
    with torch.device("meta"):
        model = build_model(config.model, classes).eval().requires_grad_(False)
    image = torch.zeros(1, *size, 3, dtype=torch.uint8, device="meta")
    total, kernels = _count(model, image)
    moved = _transforms(model, size, config.model.stride)
    fused = _count(fuse(model, size), image)
    return Operations(config.preset, size, total + moved, kernels + moved, *fused)


def _transforms(model: KNet, size: Size, stride: int) -> int:
    """What a published network does more than ours: its feature transforms work on pixels, ours
    (``knet_train.models.knet``) on the kernels, once for the sums and once for the masks."""
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


if __name__ == "__main__":
    for preset in presets():
        config = load_config(preset)
        counted = count_operations(config, CLASSES.get(preset, 150), config.data.eval_size)
        print(counted.row(), flush=True)  # noqa: T201
