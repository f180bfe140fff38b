"""Baselines in PyTorch: the trained model eager, compiled, and in a loop as Ultralytics has it; and
K-Net as published, of which a plain ``torch.onnx.export`` makes the graph of ``GraphBaseline``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import cast

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from knet_deploy.bench.target import Facts, stage_times
from knet_export.graph.to_onnx import ignored_warnings
from knet_runtime.engines.hardware import cpu_budget
from knet_runtime.preprocess import resize
from knet_runtime.types import Rgb, Size
from knet_train.checkpoint import read_checkpoint
from knet_train.models.knet import KernelUpdateStage, KNet

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
        self.facts = Facts("fp32", None, "a baseline")

    @torch.inference_mode()
    def segment(self, frame: Rgb) -> tuple[NDArray[np.uint8], dict[str, float]]:
        began = perf_counter()
        image = torch.from_numpy(resize(frame, self._size))[None]
        fitted = perf_counter()
        logits = self._network(image)
        ran = perf_counter()
        classes = class_maps(logits, frame.shape[:2])[0].numpy()
        ended = perf_counter()
        return classes, stage_times(began, preprocess=fitted, infer=ran, postprocess=ended)


class CompiledBaseline(TorchBaseline):
    """The same under ``torch.compile``, interpolation and argmax included, with channels last; for
    each size of frame its own. Raises what the compiler raises where it cannot work."""

    def __init__(self, checkpoint: Path, size: Size) -> None:
        super().__init__(checkpoint, size, channels_last=True)
        network = self._network

        def whole(image: Tensor, rows: int, columns: int) -> Tensor:
            return class_maps(network(image), (rows, columns))

        self._whole = torch.compile(whole, dynamic=False)

    @torch.inference_mode()
    def segment(self, frame: Rgb) -> tuple[NDArray[np.uint8], dict[str, float]]:
        began = perf_counter()
        image = torch.from_numpy(resize(frame, self._size))[None]
        fitted = perf_counter()
        classes = self._whole(image, *frame.shape[:2])[0].numpy()
        ended = perf_counter()
        return classes, stage_times(began, preprocess=fitted, infer=ended)


class LoopBaseline:
    """The loop that a runtime on PyTorch has: resize, to a float tensor, normalise, network,
    interpolate, argmax, back to NumPy; then colours by palette, blended over the frame."""

    def __init__(self, checkpoint: Path, size: Size) -> None:
        torch.set_num_threads(cpu_budget())
        found = read_checkpoint(checkpoint)
        self._model, self._size = found.model, size
        self._palette = np.array(found.labels.palette, np.uint8)
        self.facts = Facts("fp32", None, "a baseline", "its draw is a palette and a weighted sum")

    @torch.inference_mode()
    def segment(self, frame: Rgb) -> tuple[NDArray[np.uint8], dict[str, float]]:
        model = self._model
        began = perf_counter()
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
        times = stage_times(began, preprocess=fitted, infer=ran, postprocess=ended)
        return classes, {**times, "draw": 1000 * (drawn - ended)}


class NaiveKNet(nn.Module):
    """Normalised images [B, 3, H, W] -> classes int64 [B, *size], as in mmsegmentation's
    ``knet_head.py``, with the weights of a ``KNet``, which this equals in real numbers.

    Every stage transforms its features by a 1×1 convolution over all pixels, gathers by einsum,
    and applies the kernels as one convolution for each image in a Python loop. Resizing to the
    frame's size and argmax are in the graph, since whoever exports the whole model has them there.
    """

    def __init__(self, model: KNet, size: Size) -> None:
        super().__init__()
        self.model, self.size = model, size

    def forward(self, images: Tensor) -> Tensor:
        logits = F.interpolate(
            self.logits(images), size=self.size, mode="bilinear", align_corners=False
        )
        return logits.argmax(1)

    def logits(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] -> the last stage's logits [B, N, h, w]."""
        model = self.model
        features = model.head(model.backbone(images))
        masks = model.conv_seg(features)
        kernels = model.conv_seg.weight.flatten(1).expand(features.shape[0], -1, -1)
        for stage in model.stages:
            kernels, masks = _update(cast(KernelUpdateStage, stage), features, kernels, masks)
        return cast(Tensor, masks)


def _update(
    stage: KernelUpdateStage, features: Tensor, kernels: Tensor, masks: Tensor
) -> tuple[Tensor, Tensor]:
    transformed = stage.feat_transform(features)
    gathered = torch.einsum("bnhw,bchw->bnc", masks.softmax(1), transformed)
    kernels = stage.updator(gathered, kernels)
    kernels = stage.attention_norm(kernels + stage.attention(kernels))
    kernels = stage.ffn_norm(kernels + stage.ffn(kernels))
    mask_kernels = stage.fc_mask(stage.mask_fc(kernels))
    predicted = [
        F.conv2d(transformed[image : image + 1], mask_kernels[image, :, :, None, None])
        for image in range(features.shape[0])
    ]
    return kernels, torch.cat(predicted)


def export_naive(model: KNet, size: Size, frame: Size, path: Path) -> None:
    """Write the graph for one image of ``size`` and frames of ``frame`` (height, width), with no
    option but the names."""
    with ignored_warnings(), torch.no_grad():
        torch.onnx.export(
            NaiveKNet(model, frame).eval(),
            (torch.zeros(1, 3, *size),),
            path,
            input_names=["input"],
            output_names=["classes"],
            verbose=False,
        )
