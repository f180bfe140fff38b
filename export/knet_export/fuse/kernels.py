"""The algebra that makes K-Net's dynamic kernels cheap to deploy. Every rewrite is exact.

Notation: one image has P pixels, features X [C, P], N kernels K_s [N, C] after stage s, and masks
M_s [N, P]. As published, stage s computes

    X' = T X + t 1ᵀ          a 1×1 convolution of its own, without norm or activation
    A  = softmax over N of M_{s-1}
    G  = A X'ᵀ               the group features
    K_s = update(G, K_{s-1})
    M_s = Q X'               with Q = F q(K_s) + f, the last linear of the mask branch

1. **One batched product.** A 1×1 convolution by kernels of the image's own is Q X: a matrix
   product per image, so the batch stays free.
2. **The feature transform moves into the kernels.** Both products take X' linearly:
   G = A (T X + t 1ᵀ)ᵀ = (A Xᵀ) Tᵀ + (A 1) tᵀ and M = Q (T X + t 1ᵀ) = (Q T) X + (Q t) 1ᵀ.
   The C×C product over P pixels becomes one over N kernels, as in training
   (``knet_train.models.knet``). And on both sides a linear layer stands next to T, so here T
   disappears into that layer's weights and costs nothing at all.
3. **Constants.** The kernels that enter the first stage are weights, the same for every image.
   Whatever reads only them is computed once, here.
4. **Layout.** With X as [C, P] and once as [P, C], and masks as [P, N], the softmax runs along the
   last axis and the big products, [P, C]·[C, N], [C, P]·[P, N] and (last stage) [N, C]·[C, P], need
   no transposed operand; what is transposed has N×C elements.
5. **Rescaled sums.** A Xᵀ sums over P pixels and can pass 65,504, where fp16 ends. A / s is summed
   instead, and s goes into the weights of the next linear layer; s is a power of two, so nothing is
   rounded by it. s = P would push the small probabilities out of fp16 at the other end (A / P is
   subnormal from P = 16,384 on): the s that is taken lets a sum reach 64 times the features.

Where kernels are objects, A is a hard mask, M_{s-1} > 0, and nothing runs along N. Masks are then
[N, P], and both products, [N, C]·[C, P] and [N, P]·[P, C], need no transposed operand either.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from knet_train.models.knet import KernelUpdator

_SUM_ROOM = 64  # how often the largest feature a rescaled sum can hold: 65,504 / 64 > 1000


def apply_kernels(pixels: Tensor, kernels: Tensor, offset: Tensor) -> Tensor:
    """Masks of every pixel (rewrites 1 and 4): pixels [B, P, C], kernels [B, N, C] and what each
    adds to its mask [B, N] -> mask logits [B, P, N]."""
    return pixels @ kernels.transpose(1, 2) + offset.unsqueeze(1)


def gather(
    features: Tensor, masks: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The sums of step 1 of a stage, before any transform (rewrites 2, 4 and 5): features
    [B, C, P] and mask logits [B, P, N] -> (A Xᵀ) / s [B, N, C] and (A 1) / s [B, N], of ``dtype``.

    The softmax is computed in ``dtype`` too; the product in the features' own.
    """
    assignment = torch.softmax(masks.to(dtype), dim=-1)
    if scale != 1:
        assignment = assignment * (1 / scale)
    sums = features @ assignment.to(features.dtype)
    return sums.to(dtype).transpose(1, 2), assignment.sum(1)


def gather_hard(
    pixels: Tensor, masks: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The same with hard masks: features [B, P, C] and mask logits [B, N, P] -> (A Xᵀ) / s
    [B, N, C] and (A 1) / s [B, N], of ``dtype``. Pixels are counted in ``dtype``, too."""
    chosen = masks > 0
    assignment = chosen.to(pixels.dtype)
    if scale != 1:
        assignment = assignment * (1 / scale)
    return (assignment @ pixels).to(dtype), chosen.to(dtype).sum(-1) * (1 / scale)


def sum_scale(pixels: int) -> float:
    """The s of rewrite 5 for at most ``pixels`` pixels: a power of two, at least 1."""
    return float(2 ** max(0, math.ceil(math.log2(pixels / _SUM_ROOM))))


class FoldedGather(nn.Module):
    """``dynamic_layer`` of the group features, from sums of untransformed features (rewrite 2).

    The layer D works on parts of w channels (``KernelUpdator.width``): part j of G is
    S T_jᵀ s + n t_jᵀ s, for the sums S = A Xᵀ / s, n = A 1 / s and the rows T_j, t_j of T and t
    that make this part. So D's answer is S (s D T_j)ᵀ + n (s D t_j)ᵀ + d.
    """

    amount: Tensor

    def __init__(self, transform: nn.Conv2d, dynamic_layer: nn.Linear, scale: float) -> None:
        super().__init__()
        matrix, shift = _transform(transform)
        width = dynamic_layer.in_features
        parts = len(matrix) // width
        weight = dynamic_layer.weight.detach().double()
        folded = weight @ matrix.reshape(parts, width, -1)  # [parts, 2w, C]
        amount = shift.reshape(parts, width) @ weight.T  # [parts, 2w]
        self.linear = _linear(
            folded.flatten(0, 1) * scale,
            dynamic_layer.bias.detach().double().repeat(parts),
            dynamic_layer.weight.dtype,
        )
        self.register_buffer("amount", (amount.flatten() * scale).to(dynamic_layer.weight.dtype))
        self.width = 2 * width

    def forward(self, sums: Tensor, amounts: Tensor) -> Tensor:
        """S [B, N, C] and n [B, N] -> [B, N·parts, 2w]."""
        group: Tensor = self.linear(sums) + amounts.unsqueeze(-1) * self.amount
        return group.reshape(sums.shape[0], -1, self.width)


class FoldedMaskKernels(nn.Module):
    """The last linear of the mask branch, Q = F q + f, with the transform in it (rewrite 2):
    q -> Q T, by the weights Tᵀ F and Tᵀ f, and Q t, by Fᵀ t and fᵀ t."""

    def __init__(self, transform: nn.Conv2d, fc_mask: nn.Linear) -> None:
        super().__init__()
        matrix, shift = _transform(transform)
        weight, bias = fc_mask.weight.detach().double(), fc_mask.bias.detach().double()
        dtype = fc_mask.weight.dtype
        self.kernels = _linear(matrix.T @ weight, matrix.T @ bias, dtype)
        self.offset = _linear((shift @ weight).unsqueeze(0), (shift @ bias).unsqueeze(0), dtype)

    def forward(self, branch: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, C] -> kernels for the untransformed features [B, N, C], offsets [B, N]."""
        return self.kernels(branch), self.offset(branch).squeeze(-1)


@torch.no_grad()
def constant_inputs(updator: KernelUpdator, kernels: Tensor) -> tuple[Tensor, Tensor]:
    """What the adaptive update reads from kernels [N, C] alone (rewrite 3): the gate's factor and
    the normed candidate, both [1, N·parts, w]."""
    parts = kernels.detach().reshape(1, -1, updator.width)
    gate, candidate = updator.input_layer(parts).chunk(2, dim=-1)
    return gate.contiguous(), updator.input_norm_out(candidate)


def _transform(convolution: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """T [C, C] and t [C] of a 1×1 convolution, in float64."""
    assert convolution.bias is not None
    return convolution.weight.detach().double().flatten(1), convolution.bias.detach().double()


def _linear(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta", dtype=dtype)
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    linear.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return linear
