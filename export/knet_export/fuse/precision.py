"""Precision by size: what has the image's size in half precision, what has the kernels' in full.

fp16 ends at 65,504 and keeps 11 bits, bf16 keeps 8. So the backbone, the head, the features, the
masks and the products over pixels are half; the gates, attention and feed-forward of the N kernels
stay float32 (they are tiny, and hold sums of squares up to 1e7), and so does every normalisation
(LayerNorm, GroupNorm, softmax), wherever it stands. The types are in the modules' weights, and from
there in the graph: a float32 operation has float32 weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from knet_export.fuse.layers import PlainGroupNorm
from knet_export.fuse.model import AnyFused
from knet_export.fuse.swin import WindowSoftmax
from knet_runtime.bundle.manifest import Precision
from knet_runtime.errors import CheckpointError

_DTYPES: dict[Precision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
_NORMS = (nn.LayerNorm, nn.BatchNorm2d)  # what ``layers`` left of the last


class ExactNorm(nn.Module):
    """A normalisation that computes in the precision of its weights, whatever it is given."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        exact: Tensor = self.norm(x.float())
        return exact.to(x.dtype)


def check_finite(module: nn.Module, what: str) -> None:
    """Raise CheckpointError that names the first weight of ``module`` with NaN or infinity."""
    for name, weight in module.state_dict().items():
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            raise CheckpointError(
                f"{what}: {name} holds NaN or infinity, so the model gives nothing useful: "
                "export a checkpoint from before the training broke"
            )


def to_precision(fused: AnyFused, precision: Precision) -> AnyFused:
    """``fused`` with everything of the image's size in half precision, if that is fp16 or bf16; it
    is changed in place.

    Raises CheckpointError that names a weight which fp16 cannot hold.
    """
    if dtype := _DTYPES.get(precision):
        for name in fused.PIXELS:
            setattr(fused, name, _halved(getattr(fused, name), dtype, name))
    return fused


def _halved(module: nn.Module, dtype: torch.dtype, path: str) -> nn.Module:
    if isinstance(module, WindowSoftmax | PlainGroupNorm):  # decide by their own weights
        return module
    if isinstance(module, _NORMS):
        return ExactNorm(module)
    for name, child in module.named_children():
        setattr(module, name, _halved(child, dtype, f"{path}.{name}"))
    largest = torch.finfo(dtype).max
    for name, weight in module.named_parameters(recurse=False):
        if weight.abs().max() > largest:
            raise CheckpointError(
                f"{path}.{name} (with the norm after it folded in) reaches "
                f"{float(weight.abs().max()):.3g}, and fp16 ends at {largest:.0f}: "
                "export with --precision bf16 or fp32"
            )
        setattr(module, name, nn.Parameter(weight.to(dtype), requires_grad=False))
    for name, value in module.named_buffers(recurse=False):
        if value.is_floating_point():
            setattr(module, name, value.to(dtype))
    return module
