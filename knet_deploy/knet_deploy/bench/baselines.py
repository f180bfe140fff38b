"""What our engines are compared with: baselines by name, each made in a process of its own.

``GraphBaseline`` runs the graph of a plain export in ONNX Runtime or OpenVINO with default
settings. Its process never imports torch: start-up and memory are the engine's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from knet_deploy.bench.target import BenchTarget, Facts, stage_times
from knet_runtime.bundle.manifest import Manifest
from knet_runtime.errors import ConfigError, EngineError
from knet_runtime.preprocess import resize
from knet_runtime.types import Rgb, Size

Run = Callable[[NDArray[np.float32]], NDArray[np.int64]]
Opened = tuple[Run, str]  # and the precision that the engine chose to compute in


def make_baselines(
    names: Sequence[str], checkpoint: Path, manifest: Manifest, frames: Sequence[Size], folder: Path
) -> dict[str, Callable[[], BenchTarget]]:
    """What makes each of ``names``, and can be pickled: "torch", "torch-channels-last",
    "torch-compile", "torch-loop", "ort-naive" or "openvino".

    Their network sees images of the manifest's size, and their maps are at those of ``frames``
    (height, width); the plain graphs are written into ``folder``. Where PyTorch cannot export the
    network, what makes their baselines says so when it is called. Raises CheckpointError, and
    ConfigError for a name that there is for semantic networks only.
    """
    size = manifest.input.size
    if manifest.task != "semantic":
        return _for_segments(names, checkpoint, manifest)
    from knet_deploy.bench.torch_baselines import CompiledBaseline, LoopBaseline, TorchBaseline

    makers: dict[str, Callable[[], BenchTarget]] = {
        "torch": partial(TorchBaseline, checkpoint, size),
        "torch-channels-last": partial(TorchBaseline, checkpoint, size, channels_last=True),
        "torch-compile": partial(CompiledBaseline, checkpoint, size),
        "torch-loop": partial(LoopBaseline, checkpoint, size),
    }
    openers = {"ort-naive": open_onnxruntime, "openvino": open_openvino}
    if not openers.keys().isdisjoint(names):
        plain = _plain(checkpoint, size, frames, folder)
        makers |= {name: partial(plain, open_graph=opener) for name, opener in openers.items()}
    return {name: makers[name] for name in names}


def _for_segments(
    names: Sequence[str], checkpoint: Path, manifest: Manifest
) -> dict[str, Callable[[], BenchTarget]]:
    from knet_deploy.bench.torch_segments import SegmentsBaseline

    make = partial(SegmentsBaseline, checkpoint, manifest.input.size, manifest.segment_rules)
    makers = {"torch": make, "torch-channels-last": partial(make, channels_last=True)}
    for name in names:
        if name not in makers:
            raise ConfigError(
                f"--compare {name} is for semantic bundles: for {manifest.task} segmentation there "
                f"are {' and '.join(makers)}"
            )
    return {name: makers[name] for name in names}


def _plain(
    checkpoint: Path, size: Size, frames: Sequence[Size], folder: Path
) -> Callable[..., BenchTarget]:
    from knet_deploy.bench import torch_baselines
    from knet_train.checkpoint import read_checkpoint

    model = read_checkpoint(checkpoint).model
    graphs = {frame: folder / f"plain-{frame[0]}x{frame[1]}.onnx" for frame in frames}
    try:
        for frame, path in graphs.items():
            torch_baselines.export_naive(model, size, frame, path)
    except Exception as error:  # whatever the exporter raises: the others can run
        first = (str(error).strip().splitlines() or [""])[0]
        return partial(_refuse, f"torch.onnx.export: {type(error).__name__}: {first}")
    mean, std = (tuple(value.flatten().tolist()) for value in (model.mean, model.std))
    return partial(GraphBaseline, graphs, size=size, mean=mean, std=std)


def _refuse(reason: str, open_graph: object) -> BenchTarget:
    raise EngineError(reason)


class GraphBaseline:
    """One graph for each size of frame (``graphs``), run by what ``open_graph`` makes of it."""

    def __init__(
        self,
        graphs: dict[Size, Path],
        open_graph: Callable[[Path], Opened],
        size: Size,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        self._size = size
        self._mean = np.array([mean], np.float64)
        self._scale = 1 / np.array([std], np.float64)
        opened = {frame: open_graph(path) for frame, path in graphs.items()}
        self._runs = {frame: run for frame, (run, _) in opened.items()}
        first = next(iter(graphs))
        digest = hashlib.sha256(graphs[first].read_bytes()).hexdigest()
        note = "the graph of a plain torch.onnx.export, default options"
        self.facts = Facts(opened[first][1], digest, "a baseline", note)

    def segment(self, frame: Rgb) -> tuple[NDArray[np.uint8], dict[str, float]]:
        began = perf_counter()
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
        return found, stage_times(began, preprocess=fitted, infer=ran, postprocess=ended)


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
    from knet_runtime.engines.openvino import load_openvino

    compiled: Any = load_openvino().compile_model(path, "CPU")
    request = compiled.create_infer_request()

    def run(batch: NDArray[np.float32]) -> NDArray[np.int64]:
        return np.asarray(request.infer({0: batch})[0])

    hint = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    return run, {"f32": "fp32", "f16": "fp16"}.get(hint, hint)
