"""Pyramid pooling as matrix products: exact for every size, and for sizes that are not known yet.

``adaptive_avg_pool2d`` to s×s cells averages rows ⌊iH/s⌋ … ⌈(i+1)H/s⌉ - 1 into row i, and columns
alike. The cells of 2, 3 and 6 overlap where they do not divide H, and no ONNX operation does that.
Row h is in cell i exactly if (h+1) s > i H and h s < (i+1) H, so the averages are a product with a
matrix [s, H] from the left and one [W, s] from the right.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from knet_train.context_heads import POOLS, PyramidPooling
from knet_train.heads import upsample_to


def pooling_matrix(length: int, cells: int, like: Tensor) -> Tensor:
    """Averages of ``length`` pixels over ``cells`` cells: [cells, length], dtype and device of
    ``like``. ``length`` may be symbolic: then the graph computes the matrix from the size."""
    pixel = torch.arange(length, device=like.device) * cells
    edge = torch.arange(cells, device=like.device).unsqueeze(1) * length
    inside = (pixel + cells > edge) & (pixel < edge + length)
    inside = inside.to(torch.promote_types(like.dtype, torch.float32))  # 1 / n is rounded once
    return (inside / inside.sum(1, keepdim=True)).to(like.dtype)


def pooled(x: Tensor, cells: int) -> Tensor:
    """[B, C, H, W] -> averages [B, C, cells, cells], as ``adaptive_avg_pool2d``."""
    rows = pooling_matrix(x.shape[2], cells, x)
    columns = pooling_matrix(x.shape[3], cells, x)
    return rows @ (x @ columns.T)


class MatrixPyramid(nn.Module):
    """``PyramidPooling`` with the same branches, averaged by ``pooled``."""

    def __init__(self, pyramid: PyramidPooling) -> None:
        super().__init__()
        self.branches, self.fuse = pyramid.branches, pyramid.fuse

    def forward(self, x: Tensor) -> Tensor:
        parts = [
            upsample_to(branch(pooled(x, cells)), x)
            for branch, cells in zip(self.branches, POOLS, strict=True)
        ]
        out: Tensor = self.fuse(torch.cat([x, *parts], 1))
        return out
