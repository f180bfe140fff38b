"""An instance or panoptic network's class and mask logits to segments at the frame's own size.

The rules are those of the published K-Nets (github ZwwWayne/K-Net, ``knet/det/kernel_iter_head.py``
and ``kernel_update_head.py``): masks become probabilities first, then go to the model's input size,
are cut to the image and go to its own size, and thresholds come last. Two things differ: segments
are numbered from 1, as the reference's 0 is the evaluator's void, and an object without a pixel is
left out. One is added, and off unless a bundle turns it on: ``SegmentRules.nms``, without which the
kernels that have found one and the same object share its pixels out, until none has enough of them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from knet_runtime.bundle.manifest import SegmentRules
from knet_runtime.labels import LabelMap
from knet_runtime.postprocess.upsample import upsampled_argmax, upsampled_masks
from knet_runtime.preprocess import Geometry
from knet_runtime.segmentation import Instance, Segmentation
from knet_runtime.types import Task


def find_segments(
    task: Task,
    class_logits: NDArray[np.float32],
    mask_logits: NDArray[np.float32],
    geometry: Geometry,
    labels: LabelMap,
    rules: SegmentRules,
) -> Segmentation:
    """``panoptic`` or ``instances``, by the task, of the ``distinct_kernels``."""
    if rules.nms < 1:
        kernels = distinct_kernels(class_logits, mask_logits, labels, rules)
        class_logits, mask_logits = class_logits[kernels], mask_logits[kernels]
    find = panoptic if task == "panoptic" else instances
    return find(class_logits, mask_logits, geometry, labels, rules)


def distinct_kernels(
    class_logits: NDArray[np.float32],
    mask_logits: NDArray[np.float32],
    labels: LabelMap,
    rules: SegmentRules,
) -> list[int]:
    """Of kernels with float32 [N, K] and [N, h, w] those without a twin: non-maximum suppression of
    things by the IoU of masks, the highest score first, whatever the class. Those of stuff stay.
    Raises ValueError for NaN."""
    count = len(class_logits) - labels.num_classes + len(labels.things)
    scores = _probabilities(class_logits[:count, list(labels.things)]).max(1, initial=0)
    level = np.log(rules.mask / (1 - rules.mask)) if rules.mask else -np.inf
    masks = (mask_logits[:count] > np.float32(level)).reshape(count, -1).astype(np.float32)
    both = masks @ masks.T
    areas = both.diagonal()
    twins = both > rules.nms * (areas[:, None] + areas - both)
    kept: list[int] = []
    for kernel in np.argsort(-scores, kind="stable").tolist():
        if not twins[kernel, kept].any():
            kept.append(kernel)
    return [*sorted(kept), *range(count, len(class_logits))]


def panoptic(
    class_logits: NDArray[np.float32],
    mask_logits: NDArray[np.float32],
    geometry: Geometry,
    labels: LabelMap,
    rules: SegmentRules,
) -> Segmentation:
    """The panoptic result for float32 [N, K] and [N, h, w].

    A kernel's score is its best class's, or that of its own class of stuff: those are the last
    kernels. Each pixel is won by the kernel of the largest score times probability. By falling
    score a kernel becomes a segment of what it won, unless it is a thing below ``rules.score``, or
    won less than ``rules.overlap`` of the pixels where its own mask is above ``rules.mask``; pixels
    of kernels that became none stay void. Raises ValueError for NaN.
    """
    stuff = [index for index in range(labels.num_classes) if index not in labels.things]
    things = list(labels.things)
    count = len(class_logits) - len(stuff)
    probabilities = _probabilities(class_logits)
    scores, classes = np.zeros(len(class_logits), np.float32), np.zeros(len(class_logits), np.intp)
    if count and things:
        among = probabilities[:count, things]
        scores[:count], classes[:count] = among.max(1), np.take(things, among.argmax(1))
    scores[count:], classes[count:] = probabilities[range(count, len(scores)), stuff], stuff
    planes = sigmoid(mask_logits, scores)
    size, via, window = geometry.source_hw, geometry.model_hw, geometry.window
    winner = upsampled_argmax(planes, size, via, window)
    areas = np.bincount(winner.ravel(), minlength=len(scores))
    table = np.zeros(len(scores), np.uint16)
    kept: list[int] = []
    for kernel in np.argsort(-scores, kind="stable").tolist():
        if not areas[kernel] or (kernel < count and scores[kernel] < rules.score):
            continue
        level = rules.mask * float(scores[kernel])
        (own,) = upsampled_masks(planes[kernel : kernel + 1], level, size, via, window)
        pixels = 0 if own is None else int(np.count_nonzero(own.mask))
        if pixels and areas[kernel] / pixels >= rules.overlap:
            kept.append(kernel)
            table[kernel] = len(kept)
    return Segmentation.from_panoptic(
        table[winner], classes[kept].tolist(), scores[kept].tolist(), labels
    )


def instances(
    class_logits: NDArray[np.float32],
    mask_logits: NDArray[np.float32],
    geometry: Geometry,
    labels: LabelMap,
    rules: SegmentRules,
) -> Segmentation:
    """The instance result for float32 [N, K] and [N, h, w]: of the ``rules.top_k`` best pairs of a
    kernel and a class those with a score above ``rules.score``, each with its kernel's mask above
    ``rules.mask``. Masks of other kernels are not made. Raises ValueError for NaN."""
    found = best_pairs(class_logits, rules)
    kernels = sorted({kernel for kernel, _, _ in found})
    planes = sigmoid(mask_logits[kernels])
    made = upsampled_masks(
        planes, rules.mask, geometry.source_hw, geometry.model_hw, geometry.window
    )
    masks = dict(zip(kernels, made, strict=True))
    objects = [
        Instance(class_id, score, mask.left, mask.top, mask.mask)
        for kernel, class_id, score in found
        if (mask := masks[kernel]) is not None and mask.mask.any()
    ]
    return Segmentation.from_instances(objects, geometry.source_hw, labels)


def best_pairs(
    class_logits: NDArray[np.float32], rules: SegmentRules
) -> list[tuple[int, int, float]]:
    """(kernel, class, score) of at most ``rules.top_k`` pairs, by falling score. Raises ValueError
    for NaN."""
    scores = _probabilities(class_logits).ravel()
    order = np.argsort(-scores, kind="stable")[: rules.top_k]
    order = order[scores[order] > rules.score]
    rows, columns = np.divmod(order, class_logits.shape[1])
    return list(zip(rows.tolist(), columns.tolist(), scores[order].tolist(), strict=True))


def _probabilities(class_logits: NDArray[np.float32]) -> NDArray[np.float32]:
    if np.isnan(class_logits).any():
        raise ValueError("class logits hold NaN: the model or its engine is broken")
    return sigmoid(class_logits)


def sigmoid(
    logits: NDArray[np.float32], scale: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """1 / (1 + e^-x) of float32 [N, ...], times ``scale`` [N]."""
    result = np.empty(logits.shape, np.float32)
    with np.errstate(over="ignore"):
        for index, plane in enumerate(logits):  # one stays in the cache
            part = result[index]
            np.negative(plane, out=part)
            np.exp(part, out=part)
            part += 1
            np.divide(1 if scale is None else scale[index], part, out=part)
    return result
