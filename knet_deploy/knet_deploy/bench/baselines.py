"""Peers by name, ready to be made each in a process of its own.

The plain graph in ONNX Runtime and in OpenVINO, each as it comes, with no option set.

K-Net as published, and the graph that a plain ``torch.onnx.export`` makes of it.

As in mmsegmentation's ``knet_head.py``: every stage transforms its features by a 1×1 convolution
over all pixels, gathers by einsum, and applies the kernels as one convolution for each image in a
Python loop. Resizing to the frame's size and argmax are in the graph, since whoever exports the
model whole has them there. The weights are those of a ``KNet``, which this equals in real numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from knet_deploy.bench.target import BenchTarget, Facts, stage_times
from knet_deploy.bench.torch_baselines import CompiledBaseline, LoopBaseline, TorchBaseline
from knet_export.graph.to_onnx import ignored_warnings
from knet_runtime.bundle.store import Bundle
from knet_runtime.errors import EngineError
from knet_runtime.preprocess import resize
from knet_runtime.types import Size
from knet_train.checkpoint import read_checkpoint
from knet_train.models.knet import KernelUpdateStage, KNet

Run = Callable[[NDArray[np.float32]], NDArray[np.int64]]
Opened = tuple[Run, str]  # and the precision that the engine chose to compute in


class GraphBaseline:
    """One graph for each size of frame (``graphs``), run by what ``open_graph`` makes of it."""

    def __init__(
        self,
        graphs: dict[Size, Path],
        open_graph: Callable[[Path], Opened],
        size: Size,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        note: str,
    ) -> None:
        self._size = size
        self._mean = np.array([mean], np.float64)
        self._scale = 1 / np.array([std], np.float64)
        opened = {frame: open_graph(path) for frame, path in graphs.items()}
        self._runs = {frame: run for frame, (run, _) in opened.items()}
        first = next(iter(graphs))
        digest = hashlib.sha256(graphs[first].read_bytes()).hexdigest()
        self.facts = Facts(opened[first][1], digest, "a peer", note)

    def segment(self, frame: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], dict[str, float]]:
        """See ``BenchTarget``."""
        begun = perf_counter()
        image = resize(frame, self._size)  # as ours: the same pixels make maps comparable
        # As mmcv.imnormalize does it: in place, by OpenCV.
        planes = image.astype(np.float32)
        cv2.subtract(planes, self._mean, planes)
        cv2.multiply(planes, self._scale, planes)
        batch = np.ascontiguousarray(planes.transpose(2, 0, 1))[None]
        fitted = perf_counter()
        classes = self._runs[frame.shape[0], frame.shape[1]](batch)
        ran = perf_counter()
        found = classes[0].astype(np.uint8)
        ended = perf_counter()
        return found, stage_times(begun, fit=fitted, infer=ran, tail=ended)


def open_onnxruntime(path: Path) -> Opened:
    """The graph in ONNX Runtime."""
    import onnxruntime as ort

    session: Any = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(batch: NDArray[np.float32]) -> NDArray[np.int64]:
        return np.asarray(session.run(None, {name: batch})[0])

    return run, "fp32"


def open_openvino(path: Path) -> Opened:
    """The graph in OpenVINO, which computes in bf16 of its own accord where the processor can."""
    import openvino

    compiled: Any = openvino.compile_model(path, "CPU")
    request = compiled.create_infer_request()

    def run(batch: NDArray[np.float32]) -> NDArray[np.int64]:
        return np.asarray(request.infer({0: batch})[0])

    hint = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    return run, {"f32": "fp32", "f16": "fp16"}.get(hint, hint)


INPUT_NAME, OUTPUT_NAME = "input", "classes"


class NaiveKNet(nn.Module):
    """Normalised images [B, 3, H, W] -> classes int64 [B, *size]."""

    def __init__(self, model: KNet, size: Size) -> None:
        super().__init__()
        self.model, self.size = model, size

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
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
    example = torch.zeros(1, 3, *size)
    with ignored_warnings(), torch.no_grad():
        torch.onnx.export(
            NaiveKNet(model, frame).eval(),
            (example,),
            path,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            verbose=False,
        )


_PLAIN = "the graph of a plain torch.onnx.export, default options"


def make_baselines(
    names: Sequence[str], bundle: Bundle, checkpoint: Path, frames: Sequence[Size], folder: Path
) -> dict[str, Callable[[], BenchTarget]]:
    """What makes each of ``names``, and can be pickled: "torch", "torch-channels-last",
    "torch-compile", "torch-loop", "ort-naive" or "openvino".

    They see pictures of the bundle's size, and give maps at those of ``frames`` (height, width);
    the plain graphs are written into ``folder``. Where PyTorch can not export the network, what
    makes their peers says so when it is called. Raises CheckpointError.
    """
    spec = bundle.manifest.input
    size = (spec.height, spec.width)
    found: dict[str, Callable[[], BenchTarget]] = {}
    plain: Callable[..., BenchTarget] | None = None
    for name in names:
        match name:
            case "torch":
                found[name] = partial(TorchBaseline, checkpoint, size)
            case "torch-channels-last":
                found[name] = partial(TorchBaseline, checkpoint, size, channels_last=True)
            case "torch-compile":
                found[name] = partial(CompiledBaseline, checkpoint, size)
            case "torch-loop":
                found[name] = partial(LoopBaseline, checkpoint, size)
            case "ort-naive" | "openvino":
                plain = plain or _plain(read_checkpoint(checkpoint).model, size, frames, folder)
                opener = open_onnxruntime if name == "ort-naive" else open_openvino
                found[name] = partial(plain, open_graph=opener)
            case _:
                raise ValueError(f"there is no peer {name!r}")
    return found


def _plain(
    model: KNet, size: Size, frames: Sequence[Size], folder: Path
) -> Callable[..., BenchTarget]:
    graphs = {}
    for frame in frames:
        graphs[frame] = folder / f"plain-{frame[0]}x{frame[1]}.onnx"
        try:
            export_naive(model, size, frame, graphs[frame])
        except Exception as error:  # whatever the exporter raises: the others can run
            first = (str(error).strip().splitlines() or [""])[0]
            return partial(_refuse, f"torch.onnx.export: {type(error).__name__}: {first}")
    mean, std = (tuple(value.flatten().tolist()) for value in (model.mean, model.std))
    return partial(GraphBaseline, graphs, size=size, mean=mean, std=std, note=_PLAIN)


def _refuse(reason: str, open_graph: object) -> BenchTarget:
    raise EngineError(reason)
