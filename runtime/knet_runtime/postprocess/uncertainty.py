"""How unsure a network is of a whole image, 0 (sure) … 1: to find the images worth labelling."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from knet_runtime.postprocess.semantic import cut_window
from knet_runtime.preprocess import Geometry
from knet_runtime.segmentation import Segmentation


def pixel_uncertainty(logits: NDArray[np.float32], geometry: Geometry) -> float:
    """Of a semantic network's logits float32 [N, h, w]: 1 less the lead of the best class's
    probability (softmax) over the second's, in the mean of the pixels that the image fills. Raises
    ValueError as ``cut_window``, and for NaN."""
    own = cut_window(logits, geometry)
    if len(own) < 2:
        return 0.0
    best = np.partition(own, len(own) - 2, axis=0)[-2:]
    total = np.exp(own - best[1]).sum(0)
    found = float(1 - ((1 - np.exp(best[0] - best[1])) / total).mean(dtype=np.float64))
    if np.isnan(found):
        raise ValueError("logits hold NaN: the model or its engine is broken")
    return found


def segment_uncertainty(found: Segmentation) -> float:
    """Of a panoptic result: 1 less the score of its segment, in the mean of all pixels, where a
    pixel without a segment has the score 0. Of an instance result: 1 less the score, in the mean of
    the objects; 0 without objects."""
    scores = np.array([one.score or 0.0 for one in found.segments])
    if found.task == "instance":
        return float((1 - scores).mean()) if len(scores) else 0.0
    areas = np.array([one.area for one in found.segments])
    return float(1 - (scores * areas).sum() / max(1, found.class_map.size))
