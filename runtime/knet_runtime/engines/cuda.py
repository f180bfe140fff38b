"""A CUDA stream with buffers and graphs, by way of cuda-python, and what NVIDIA's errors mean.

Every call of cuda-python returns an error and raises nothing; here they raise EngineError. Written
against NVIDIA's documented interface and never run on a GPU by its authors.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import re
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_runtime.errors import EngineError, EngineUnavailable

_ADVICE = (
    (
        r"out ?of ?memory|cudaErrorMemoryAllocation|insufficient memory|Cuda failure: 2\b",
        "the GPU's memory is full: close what else uses it, give --workspace fewer MiB, or build "
        "with a smaller --max",
    ),
    (
        r"Turing|SM ?\d+ is not supported|unsupported SM|UNSUPPORTED_CC|no longer supported",
        "this GPU, or --target, is too old for this release and graph: name a newer one, or use "
        "an older TensorRT or --engine onnxruntime-cuda",
    ),
    (
        r"kEXPECTED_MAGIC_TAG|expecting library version|VERSION_MISMATCH",
        "it was built by another release: build it again",
    ),
    (r"incompatible device|expecting compute", "it was built on another GPU: build it again"),
    (
        r"cudaError 35|driver version is insufficient|OLD_CUDA_DRIVER",
        "there is no NVIDIA driver, or it is too old: update it",
    ),
)


class Buffer(msgspec.Struct):
    """Pinned memory of this machine, seen as an array, and memory of the GPU of the same size."""

    host: NDArray[Any]
    device: int


class Cuda:
    """A stream of its own, what was allocated for it, and the graph that was captured on it."""

    def __init__(self) -> None:
        try:
            self._runtime: Any = importlib.import_module("cuda.bindings.runtime")
        except ImportError as error:
            raise EngineUnavailable(
                f'cuda-python is not installed ({error}): pip install "cuda-bindings>=12.6"'
            ) from error
        self._host: list[int] = []
        self._device: list[int] = []
        self._graph: Any = None
        self.stream: Any = self._call("cudaStreamCreate")

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Buffer:
        """Room for an array of this shape on both sides."""
        count = math.prod(shape) * dtype.itemsize
        host = self._call("cudaHostAlloc", count, self._runtime.cudaHostAllocDefault)
        self._host.append(host)
        device = self._call("cudaMalloc", count)
        self._device.append(device)
        memory = (ctypes.c_uint8 * count).from_address(int(host))
        array = np.ctypeslib.as_array(memory).view(dtype).reshape(shape)
        return Buffer(array, int(device))

    def upload(self, buffer: Buffer, size: int) -> None:
        """Send the first ``size`` entries to the GPU, in the stream's order."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        address, count = buffer.host.ctypes.data, buffer.host[:size].nbytes
        self._call("cudaMemcpyAsync", buffer.device, address, count, kind, self.stream)

    def download(self, buffer: Buffer, size: int) -> None:
        """Bring back the first ``size`` entries, in the stream's order."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        address, count = buffer.host.ctypes.data, buffer.host[:size].nbytes
        self._call("cudaMemcpyAsync", address, buffer.device, count, kind, self.stream)

    def wait(self) -> None:
        """Until all that the stream has to do is done."""
        self._call("cudaStreamSynchronize", self.stream)

    def capture(self, work: Callable[[], None]) -> None:
        """Keep what ``work`` puts on the stream as the graph, in place of the last one; nothing of
        it is run. Raises EngineError, with no graph kept, when it cannot be captured."""
        self.forget()
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.stream, mode)
        try:
            work()
        except EngineError:
            # What was begun must be ended, and leaves an error behind for whoever asks next.
            _, graph = self._runtime.cudaStreamEndCapture(self.stream)
            if graph is not None and int(graph):
                self._runtime.cudaGraphDestroy(graph)
            self._runtime.cudaGetLastError()
            raise
        try:
            graph = self._call("cudaStreamEndCapture", self.stream)
            try:
                self._graph = self._call("cudaGraphInstantiate", graph, 0)
            finally:
                self._runtime.cudaGraphDestroy(graph)
        except EngineError:
            self._runtime.cudaGetLastError()
            raise

    @property
    def captured(self) -> bool:
        """Whether there is a graph to launch."""
        return self._graph is not None

    def launch(self) -> None:
        """Put the graph on the stream."""
        self._call("cudaGraphLaunch", self._graph, self.stream)

    def forget(self) -> None:
        """Free the graph; nothing of it may be running."""
        if self._graph is not None:
            self._runtime.cudaGraphExecDestroy(self._graph)
            self._graph = None

    def close(self) -> None:
        """Free everything, once what runs has ended."""
        self._runtime.cudaStreamSynchronize(self.stream)
        self.forget()
        for address in self._device:
            self._runtime.cudaFree(address)
        for address in self._host:
            self._runtime.cudaFreeHost(address)
        self._host, self._device = [], []
        self._runtime.cudaStreamDestroy(self.stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        code, *results = getattr(self._runtime, name)(*arguments)
        if code != self._runtime.cudaError_t.cudaSuccess:
            _, text = self._runtime.cudaGetErrorString(code)
            why = text.decode() if isinstance(text, bytes) else str(text)
            raise EngineError(f"CUDA: {name} failed: {explain([why])}")
        return results[0] if results else None


def explain(errors: list[str]) -> str:
    """The reason of CUDA or TensorRT in one line, and what to do where that is known.

    Without a GPU each failure is followed by complaints of CUDA, which are left out if there is
    anything else.
    """
    if not errors:
        return "it gave no reason"
    telling = [text for text in errors if "cudaError 35" not in text] or errors
    reason = plain(telling[0])
    for pattern, advice in _ADVICE:
        if re.search(pattern, " ".join(telling), re.IGNORECASE):
            return f"{reason}; {advice}"
    return reason


def plain(message: str) -> str:
    """A message without the places in TensorRT's source that raised it."""
    text = re.sub(r"\s*\bIn \w+ at \S+:\d+", "", message.strip())
    text = re.sub(r"\[\w+\.cpp(::?\w+)*:?:?\d*(: \w+)?\]\s*", "", text)
    text = re.sub(r"^I?\w+::\w+: Error Code \d+: ", "", text)
    return re.sub(r"\s+", " ", text)
