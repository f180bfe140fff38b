"""Layers around the kernels in cheaper or plainer form: BatchNorm, and pyramid pooling.

BatchNorm is folded into the convolution before it: one operation, and one set of weights to round.
In evaluation it is y = (x - μ) γ / √(σ² + ε) + β per channel; after a convolution x = W * z + b
that is a convolution with W γ / √(σ² + ε) and bias (b - μ) γ / √(σ² + ε) + β.

Pyramid pooling becomes matrix products, exact for every size, and for sizes that are not known yet.
``adaptive_avg_pool2d`` to s×s cells averages rows ⌊iH/s⌋ … ⌈(i+1)H/s⌉ - 1 into row i, and columns
alike. The cells of 2, 3 and 6 overlap where they do not divide H, and no ONNX operation does that.
Row h is in cell i exactly if (h+1) s > i H and h s < (i+1) H, so the averages are a product with a
matrix [s, H] from the left and one [W, s] from the right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from knet_train.models.heads import POOLS, PyramidPooling, upsample_to


@torch.no_grad()
def fold_batch_norms(network: nn.Module, example: Any) -> int:
    """Fold every BatchNorm of ``network`` that reads a convolution's output; how many there were.

    ``network``, in evaluation mode, is changed in place. It is run once on ``example``, its one
    argument: which norm follows which convolution is seen there, whatever the modules are called.
    An activation that timm keeps inside the norm stays. A convolution that others read too would
    be changed for them as well; no network here has one, and the parity check would refuse it.
    """
    pairs = _pairs(network, example)
    for convolution, norm in pairs:
        _fold(convolution, norm)
    replaced = {norm: getattr(norm, "act", nn.Identity()) for _, norm in pairs}
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d) and child in replaced:
                setattr(module, name, replaced[child])
    return len(pairs)


def _pairs(network: nn.Module, example: Any) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions and the norms that read their output. A module that runs twice has two outputs
    of one set of weights, and is left alone."""
    made: list[tuple[Tensor, nn.Conv2d]] = []  # the tensors are held, so that none takes the
    read: list[tuple[Tensor, nn.BatchNorm2d]] = []  # place, and so the identity, of another
    handles = []

    def after_convolution(module: Any, _: Any, output: Tensor) -> None:
        made.append((output, module))

    def before_norm(module: Any, inputs: tuple[Tensor]) -> None:
        read.append((inputs[0], module))

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(after_convolution))
        elif isinstance(module, nn.BatchNorm2d):
            handles.append(module.register_forward_pre_hook(before_norm))
    try:
        network(example)
    finally:
        for handle in handles:
            handle.remove()
    once = [module for _, module in made]
    source = {id(tensor): module for tensor, module in made if once.count(module) == 1}
    norms = [module for _, module in read]
    return [
        (source[id(tensor)], norm)
        for tensor, norm in read
        if id(tensor) in source and norms.count(norm) == 1
    ]


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    dtype = convolution.weight.dtype
    factor = (variance.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    bias = -mean.double() if convolution.bias is None else convolution.bias.double() - mean.double()
    bias = bias * factor
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    weight = convolution.weight.double() * factor.reshape(-1, 1, 1, 1)
    convolution.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    convolution.bias = nn.Parameter(bias.to(dtype), requires_grad=False)


class PlainGroupNorm(nn.Module):
    """GroupNorm of maps [B, C, H, W] as x a + b, with a and b of each image and channel: engines
    run its two means and one product well, and not all have the operation, or in half precision.
    It computes in the precision of its weights, whatever it is given."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        self.weight = nn.Parameter(norm.weight.detach().reshape(1, norm.num_groups, -1, 1))
        self.bias = nn.Parameter(norm.bias.detach().reshape(1, norm.num_groups, -1, 1))

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        parts = x.to(self.weight.dtype).reshape(
            -1, self.groups, shape[1] // self.groups, shape[2] * shape[3]
        )
        mean = parts.mean((2, 3), keepdim=True)
        centred = parts - mean
        variance = (centred * centred).mean((2, 3), keepdim=True)
        factor = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * factor + self.bias).reshape(-1, *shape[1:]).to(x.dtype)


def plain_group_norms(network: nn.Module) -> nn.Module:
    """``network`` with every GroupNorm as a ``PlainGroupNorm``, changed in place."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, PlainGroupNorm(child))
    return network


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
