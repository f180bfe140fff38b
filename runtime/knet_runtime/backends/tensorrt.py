"""TensorRT and TensorRT-RTX: an engine that ``knet-deploy build`` made for this GPU.

Written against NVIDIA's documented interface and never run on a GPU by its authors: trust it when
``knet-deploy verify`` passes. Builds nothing and loads nothing but what the engine store hands out.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import math
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_runtime.backends.contract import (
    Tensor,
    check_batch,
    check_graph,
    check_output,
    output_name,
    output_shape,
)
from knet_runtime.backends.tensorrt_library import explain, load_tensorrt, new_log
from knet_runtime.bundle import Bundle
from knet_runtime.engine_store import TensorRTEngine, find_engine
from knet_runtime.errors import BackendError, BackendUnavailable
from knet_runtime.gpu import Gpu, this_gpu
from knet_runtime.manifest import Kind
from knet_runtime.pending import write_whole

_DTYPES = {"FLOAT": "float32", "UINT8": "uint8"}


class TensorRTBackend:
    """The engine in the bundle that fits this GPU, on a stream of its own.

    One execution context behind a lock: calls from several threads take turns.
    """

    def __init__(self, bundle: Bundle, engine: str, kind: Kind) -> None:
        flavour = cast(TensorRTEngine, engine)
        self._module = load_tensorrt(flavour)
        gpu = _gpu(engine)
        stored = find_engine(bundle, flavour, kind, self._module.__version__, gpu)
        self.name, self.kind, self.device = engine, kind, gpu.name
        self._manifest = bundle.manifest
        self._least = stored.record.options.profile.least.batch
        most = stored.record.options.profile.most.batch
        self._spec = msgspec.structs.replace(bundle.manifest.input, max_batch=most)
        self._output = output_name(bundle.manifest, kind)
        self._lock = threading.Lock()
        self._log = new_log(self._module)
        self._runtime: Any = self._module.Runtime(self._log)
        self._engine: Any = self._runtime.deserialize_cuda_engine(stored.read())
        if self._engine is None:
            raise BackendUnavailable(
                f"{stored.path} can not be loaded: {explain(self._log.errors)}"
            )
        inputs, outputs = self._tensors()
        check_graph(stored.path, self._manifest, kind, inputs, outputs)
        self._cache = _RuntimeCache(stored.path.with_suffix(".cache"))
        self._context: Any = self._cache.create_context(self._engine)
        if self._context is None:
            raise BackendError(f"{engine} has no room to run: {explain(self._log.errors)}")
        self._cuda = _Cuda()
        picture = (most, self._spec.height, self._spec.width, 3)
        result = (most, *output_shape(self._manifest, kind))
        element = np.dtype(np.float32 if kind == "logits" else np.uint8)
        try:
            self._in = self._cuda.allocate(picture, np.dtype(np.uint8))
            self._out = self._cuda.allocate(result, element)
        except BackendError:
            self.close()
            raise

    def infer(self, batch: NDArray[np.uint8]) -> NDArray[np.float32] | NDArray[np.uint8]:
        """uint8 [B, H, W, 3] RGB at the model's size, B within the engine's profile, to logits
        float32 [B, N, h, w] or classes uint8 [B, H, W]. Raises BackendError for another batch, or
        when the engine fails."""
        images = check_batch(self.name, self._spec, batch)
        size = len(images)
        if size < self._least:
            raise BackendError(
                f"the batch holds {size} pictures; this engine was built for at least "
                f"{self._least}: build it with a smaller --min"
            )
        with self._lock:
            if self._context is None:
                raise BackendError(f"{self.name} was closed: open it again")
            self._log.errors.clear()
            self._in.host[:size] = images
            self._cuda.upload(self._in, size)
            context, cuda = self._context, self._cuda
            done = (
                context.set_input_shape(self._spec.name, images.shape)
                and not context.infer_shapes()
                and context.set_tensor_address(self._spec.name, self._in.device)
                and context.set_tensor_address(self._output, self._out.device)
                and context.execute_async_v3(cuda.stream)
            )
            if not done:
                raise BackendError(
                    f"{self.name} failed on a batch of {size}: {explain(self._log.errors)}"
                )
            cuda.download(self._out, size)
            output = self._out.host[:size].copy()  # the next call writes there again
        return check_output(self.name, self._manifest, self.kind, size, output)

    def close(self) -> None:
        """Free the engine and its memory; a second call does nothing."""
        with self._lock:
            if self._context is None:
                return
            self._cache.keep()
            self._context = None  # before the engine, and that before the runtime
            self._engine = None
            self._runtime = None
            self._cuda.close()

    def __enter__(self) -> TensorRTBackend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        engine, modes = self._engine, self._module.TensorIOMode
        tensors: dict[Any, list[Tensor]] = {modes.INPUT: [], modes.OUTPUT: []}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            dtype = engine.get_tensor_dtype(name).name
            shape = tuple(None if side < 0 else side for side in engine.get_tensor_shape(name))
            tensors[engine.get_tensor_mode(name)].append(
                Tensor(name, _DTYPES.get(dtype, dtype.lower()), shape)
            )
        return tensors[modes.INPUT], tensors[modes.OUTPUT]


def try_tensorrt(engine: str) -> str:
    """Words for `doctor`; BackendUnavailable, with the mend, when engines can not run here."""
    module = load_tensorrt(cast(TensorRTEngine, engine))
    gpu = _gpu(engine)
    _Cuda().close()
    return f"{engine} {module.__version__}, {gpu.name} ({gpu.sm}); knet-deploy build comes first"


def _gpu(engine: str) -> Gpu:
    gpu = this_gpu()
    if gpu is None:
        raise BackendUnavailable(
            f"{engine} finds no NVIDIA GPU here, or no driver: install the driver, or use "
            "--engine onnxruntime-cpu"
        )
    return gpu


class _RuntimeCache:
    """What TensorRT-RTX compiled for this GPU when it first ran, beside the engine; TensorRT
    proper compiles nothing then."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cache: Any = None

    def create_context(self, engine: Any) -> Any:
        if not hasattr(engine, "create_runtime_config"):
            return engine.create_execution_context()
        config = engine.create_runtime_config()
        if not hasattr(config, "create_runtime_cache"):
            return engine.create_execution_context()
        self._cache = config.create_runtime_cache()
        with contextlib.suppress(OSError):  # there is none before the first run
            self._cache.deserialize(self._path.read_bytes())
        config.set_runtime_cache(self._cache)
        return engine.create_execution_context(config)

    def keep(self) -> None:
        if self._cache is not None:
            with contextlib.suppress(OSError):  # it saves time, no more
                write_whole(self._path, bytes(self._cache.serialize()))


class _Buffer(msgspec.Struct):
    """Pinned memory of this machine, seen as an array, and memory of the GPU of the same size."""

    host: NDArray[Any]
    device: int


class _Cuda:
    """A stream and buffers; every call of cuda-python returns an error and raises nothing."""

    def __init__(self) -> None:
        try:
            self._runtime: Any = importlib.import_module("cuda.bindings.runtime")
        except ImportError as error:
            raise BackendUnavailable(
                f'cuda-python is not installed ({error}): pip install "cuda-bindings>=12.6"'
            ) from error
        self._host: list[int] = []
        self._device: list[int] = []
        self.stream: Any = self._call("cudaStreamCreate")

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> _Buffer:
        """Room for an array of this shape on both sides."""
        count = math.prod(shape) * dtype.itemsize
        host = self._call("cudaHostAlloc", count, self._runtime.cudaHostAllocDefault)
        self._host.append(host)
        device = self._call("cudaMalloc", count)
        self._device.append(device)
        memory = (ctypes.c_uint8 * count).from_address(int(host))
        array = np.ctypeslib.as_array(memory).view(dtype).reshape(shape)
        return _Buffer(array, int(device))

    def upload(self, buffer: _Buffer, size: int) -> None:
        """Send the first ``size`` entries to the GPU, in the stream's order."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        part = buffer.host[:size]
        address = buffer.host.ctypes.data
        self._call("cudaMemcpyAsync", buffer.device, address, part.nbytes, kind, self.stream)

    def download(self, buffer: _Buffer, size: int) -> None:
        """Bring back the first ``size`` entries, and wait for all that the stream has to do."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        part = buffer.host[:size]
        address = buffer.host.ctypes.data
        self._call("cudaMemcpyAsync", address, buffer.device, part.nbytes, kind, self.stream)
        self._call("cudaStreamSynchronize", self.stream)

    def close(self) -> None:
        """Free everything; nothing of it may be in use."""
        self._runtime.cudaStreamSynchronize(self.stream)
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
            raise BackendError(f"CUDA: {name} failed: {explain([why])}")
        return results[0] if results else None
