"""The trained model in PyTorch: eager, compiled, and in a loop of the kind that Ultralytics has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from knet_deploy.bench.target import Facts, stage_times
from knet_runtime.engines.hardware import cpu_budget
from knet_runtime.preprocess import resize
from knet_runtime.types import Size
from knet_train.checkpoint import read_checkpoint

Network = Callable[[Tensor], Tensor]


def class_maps(logits: Tensor, size: Size) -> Tensor:
    """Logits [B, N, h, w] to classes uint8 [B, *size], as PyTorch has it: bilinear interpolation of
    every logit, then the largest."""
    large = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    return large.argmax(1).to(torch.uint8)


class TorchBaseline:
    """Resize, network, bilinear interpolation to the frame's size and argmax, all in float32.

    The resize is ours: the same pixels make maps comparable. Weights are in the memory layout that
    a loaded model has, or with ``channels_last`` in the one that suits convolutions.
    """

    def __init__(self, checkpoint: Path, size: Size, *, channels_last: bool = False) -> None:
        torch.set_num_threads(cpu_budget())
        self._size = size
        model = read_checkpoint(checkpoint).model
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        self._network: Network = model
        self.facts = Facts("fp32", None, "a peer")

    @torch.inference_mode()
    def segment(self, frame: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], dict[str, float]]:
        """See ``BenchTarget``."""
        begun = perf_counter()
        image = torch.from_numpy(resize(frame, self._size))[None]
        fitted = perf_counter()
        logits = self._network(image)
        ran = perf_counter()
        classes = class_maps(logits, frame.shape[:2])[0].numpy()
        ended = perf_counter()
        return classes, stage_times(begun, fit=fitted, infer=ran, tail=ended)


class CompiledBaseline(TorchBaseline):
    """The same under ``torch.compile``, interpolation and argmax included, with channels last; for
    each size of frame its own. Raises what the compiler raises where it can not work."""

    def __init__(self, checkpoint: Path, size: Size) -> None:
        super().__init__(checkpoint, size, channels_last=True)
        network = self._network

        def whole(image: Tensor, rows: int, columns: int) -> Tensor:
            return class_maps(network(image), (rows, columns))

        self._whole = torch.compile(whole, dynamic=False)

    @torch.inference_mode()
    def segment(self, frame: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], dict[str, float]]:
        """See ``BenchTarget``."""
        begun = perf_counter()
        image = torch.from_numpy(resize(frame, self._size))[None]
        fitted = perf_counter()
        classes = self._whole(image, *frame.shape[:2])[0].numpy()
        ended = perf_counter()
        return classes, stage_times(begun, fit=fitted, infer=ended)


class LoopBaseline:
    """The loop that a runtime on PyTorch has: resize, to a float tensor, normalise, network,
    interpolate, argmax, back to NumPy; then colours by palette, blended over the frame."""

    def __init__(self, checkpoint: Path, size: Size) -> None:
        torch.set_num_threads(cpu_budget())
        found = read_checkpoint(checkpoint)
        self._model, self._size = found.model, size
        self._palette = np.array(found.labels.palette, np.uint8)
        self.facts = Facts("fp32", None, "a peer", "its draw is a palette and a weighted sum")

    @torch.inference_mode()
    def segment(self, frame: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], dict[str, float]]:
        """See ``BenchTarget``."""
        model = self._model
        begun = perf_counter()
        image = cv2.resize(frame, (self._size[1], self._size[0]))
        planes = np.ascontiguousarray(image.transpose(2, 0, 1)[None])
        tensor = torch.from_numpy(planes).float()
        normalised = (tensor - model.mean) / model.std
        fitted = perf_counter()
        logits = model.decode(model.backbone(normalised))[-1]
        ran = perf_counter()
        classes = class_maps(logits, frame.shape[:2])[0].numpy()
        ended = perf_counter()
        cv2.addWeighted(frame, 0.5, self._palette[classes], 0.5, 0)
        drawn = perf_counter()
        times = stage_times(begun, fit=fitted, infer=ran, tail=ended)
        return classes, {**times, "draw": 1000 * (drawn - ended)}
