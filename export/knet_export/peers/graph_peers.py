"""The plain graph in ONNX Runtime and in OpenVINO, each as it comes, with no option set."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from knet_runtime.bench.contestant import Facts, stage_times
from knet_runtime.manifest import Size
from knet_runtime.preprocess import resize

Run = Callable[[NDArray[np.float32]], NDArray[np.int64]]
Opened = tuple[Run, str]  # and the precision that the engine chose to compute in


class GraphPeer:
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
        """See ``Contestant``."""
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
