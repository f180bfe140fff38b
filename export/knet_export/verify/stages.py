"""The update stages of a graph for segments, each held to PyTorch's, with PyTorch's own masks.

Masks inside these networks are hard: a pixel whose logit rounding moves across 0 changes all that
comes after it, so even a right graph may differ much at its end. Where both sides gather from the
same pixels it may not ("teacher forcing"): what is left then is a sum of roundings, or a fault.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from knet_export.graph.onnx_graph import Feed, OnnxGraph
from knet_export.verify.measure import tensor_difference
from knet_runtime.errors import BundleError


def hard_masks(graph: OnnxGraph) -> list[tuple[str, str]]:
    """Of each stage, the mask logits that it gathers by and whether they are above 0: names of
    tensors, as ``knet_export.fuse.kernels.gather_hard`` writes them."""
    zeros = {
        name for name, constant in graph.constants().items() if not np.any(graph.value(constant))
    }
    return [
        (node.input[0], node.output[0])
        for node in graph.nodes
        if node.op_type == "Greater" and node.input[1] in zeros
    ]


def stage_differences(
    graph: OnnxGraph, feed: Feed, masks: Sequence[NDArray[np.float32]], last: NDArray[np.float32]
) -> tuple[float, ...]:
    """How far the masks of each stage of ``graph`` on ``feed`` are from the reference's, when each
    stage gathers by the reference's ``masks``, mask logits [N, h, w] of the first kernels and of
    every stage: the largest difference as a share of the largest logit, infinity for NaN. The last
    stage's are compared as the graph gives them, with ``last``.

    Raises BundleError where the graph has not as many stages as the reference.
    """
    hard = hard_masks(graph)
    if len(hard) != len(masks) - 1:
        raise BundleError(
            f"the graph gathers by masks {len(hard)} times, its checkpoint {len(masks) - 1} times: "
            "export it again"
        )
    flat = [one.reshape(1, len(one), -1) for one in masks[:-1]]
    given = {above: one > 0 for (_, above), one in zip(hard, flat, strict=True)}
    names = [*(logits for logits, _ in hard), graph.model.graph.output[-1].name]
    found = graph.run_given(given, feed, names)
    return tuple(map(tensor_difference, [*flat, last[None]], found))
