"""Where a class map is sure of itself: by how much the best class leads the second best."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray


def top_two_margin(logits: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """The lead of the best class, float32 [H, W] = ``size``, of logits float32 [N, h, w] resized as
    ``postprocess.upsampled_argmax`` resizes them; infinity for a single class."""
    to = (size[1], size[0])
    best, second = np.full(size, -np.inf, np.float32), np.full(size, -np.inf, np.float32)
    for plane in np.ascontiguousarray(logits):
        large = np.asarray(cv2.resize(plane, to, interpolation=cv2.INTER_LINEAR), np.float32)
        np.maximum(second, np.minimum(best, large), out=second)
        np.maximum(best, large, out=best)
    return best - second
