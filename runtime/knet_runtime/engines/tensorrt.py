"""TensorRT and TensorRT-RTX: an engine that ``knet-deploy build`` made for this GPU.

Written against NVIDIA's documented interface and never run on a GPU by its authors: trust it when
``knet-deploy verify`` passes. Builds nothing and loads nothing but what the engine store hands out.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_runtime.atomic import write_atomic
from knet_runtime.bundle.manifest import Kind
from knet_runtime.bundle.store import Bundle
from knet_runtime.engines.base import (
    Tensor,
    check_batch,
    check_graph,
    check_output,
    output_name,
    output_shape,
)
from knet_runtime.engines.cuda import Cuda
from knet_runtime.engines.hardware import Gpu, this_gpu
from knet_runtime.engines.plan_store import PlanEngine, find_plan
from knet_runtime.engines.tensorrt_library import explain, load_tensorrt, new_log
from knet_runtime.errors import EngineError, EngineUnavailable
from knet_runtime.types import Closeable

_log = logging.getLogger(__name__)

_DTYPES = {"FLOAT": "float32", "UINT8": "uint8"}


class TensorRTEngine(Closeable):
    """The engine in the bundle that fits this GPU, on a stream of its own.

    One execution context behind a lock: calls from several threads take turns. Two batches of one
    size in a row make a CUDA graph of upload, network and download, which the next ones of that
    size launch; TensorRT-RTX makes its own.
    """

    def __init__(self, bundle: Bundle, engine: str, kind: Kind) -> None:
        flavour = cast(PlanEngine, engine)
        self._module = load_tensorrt(flavour)
        gpu = _gpu(engine)
        stored = find_plan(bundle, flavour, kind, self._module.__version__, gpu)
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
            raise EngineUnavailable(f"{stored.path} can not be loaded: {explain(self._log.errors)}")
        inputs, outputs = self._tensors()
        check_graph(stored.path, self._manifest, kind, inputs, outputs)
        self._cache = _RuntimeCache(stored.path.with_suffix(".cache"))
        self._context: Any = self._cache.create_context(self._engine, self._module)
        if self._context is None:
            raise EngineError(f"{engine} has no room to run: {explain(self._log.errors)}")
        self._cuda = Cuda()
        self._size = 0  # of the last batch
        self._makes_graphs = flavour == "tensorrt"
        picture = (most, self._spec.height, self._spec.width, 3)
        result = (most, *output_shape(self._manifest, kind))
        element = np.dtype(np.float32 if kind == "logits" else np.uint8)
        try:
            self._in = self._cuda.allocate(picture, np.dtype(np.uint8))
            self._out = self._cuda.allocate(result, element)
        except EngineError:
            self.close()
            raise

    def infer(self, batch: NDArray[np.uint8]) -> NDArray[np.float32] | NDArray[np.uint8]:
        """uint8 [B, H, W, 3] RGB at the model's size, B within the engine's profile, to logits
        float32 [B, N, h, w] or classes uint8 [B, H, W]. Raises EngineError for another batch, or
        when the engine fails."""
        images = check_batch(self.name, self._spec, batch)
        size = len(images)
        if size < self._least:
            raise EngineError(
                f"the batch holds {size} pictures; this engine was built for at least "
                f"{self._least}: build it with a smaller --min"
            )
        with self._lock:
            if self._context is None:
                raise EngineError(f"{self.name} was closed: open it again")
            self._log.errors.clear()
            self._in.host[:size] = images
            self._run(size)
            output = self._out.host[:size].copy()  # the next call writes there again
        return check_output(self.name, self._manifest, self.kind, size, output)

    def _run(self, size: int) -> None:
        """From one pinned buffer to the other."""
        cuda = self._cuda
        if size == self._size and cuda.captured:
            cuda.launch()
            cuda.wait()
            return
        again, self._size = size == self._size, size
        cuda.forget()  # it is of the context as it was, which another shape changes
        self._set_shape(size)
        self._enqueue(size)
        cuda.wait()
        if again and self._makes_graphs:
            try:
                cuda.capture(lambda: self._enqueue(size))
            except EngineError as error:
                self._makes_graphs = False
                _log.info("%s runs without a CUDA graph: %s", self.name, error)

    def _set_shape(self, size: int) -> None:
        context, spec = self._context, self._spec
        if not (
            context.set_input_shape(spec.name, (size, spec.height, spec.width, 3))
            and not context.infer_shapes()
            and context.set_tensor_address(spec.name, self._in.device)
            and context.set_tensor_address(self._output, self._out.device)
        ):
            raise self._failure(size)

    def _enqueue(self, size: int) -> None:
        self._cuda.upload(self._in, size)
        if not self._context.execute_async_v3(self._cuda.stream):
            raise self._failure(size)
        self._cuda.download(self._out, size)

    def _failure(self, size: int) -> EngineError:
        return EngineError(f"{self.name} failed on a batch of {size}: {explain(self._log.errors)}")

    def close(self) -> None:
        """Free the engine and its memory; a second call does nothing."""
        with self._lock:
            if self._context is None:
                return
            self._cache.keep()
            self._cuda.forget()
            self._context = None  # before the engine, and that before the runtime
            self._engine = None
            self._runtime = None
            self._cuda.close()

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
    """Words for `doctor`; EngineUnavailable, with the mend, when engines can not run here."""
    module = load_tensorrt(cast(PlanEngine, engine))
    gpu = _gpu(engine)
    Cuda().close()
    return f"{engine} {module.__version__}, {gpu.name} ({gpu.sm}); knet-deploy build comes first"


def _gpu(engine: str) -> Gpu:
    gpu = this_gpu()
    if gpu is None:
        raise EngineUnavailable(
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

    def create_context(self, engine: Any, module: Any) -> Any:
        if not hasattr(engine, "create_runtime_config"):
            return engine.create_execution_context()
        config = engine.create_runtime_config()
        if not hasattr(config, "create_runtime_cache"):
            return engine.create_execution_context()
        # It compiles kernels while it runs, so only itself knows when a graph can be captured.
        if hasattr(config, "cuda_graph_strategy"):  # from 1.2 on
            config.cuda_graph_strategy = module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._cache = config.create_runtime_cache()
        with contextlib.suppress(OSError):  # there is none before the first run
            self._cache.deserialize(self._path.read_bytes())
        config.set_runtime_cache(self._cache)
        return engine.create_execution_context(config)

    def keep(self) -> None:
        if self._cache is not None:
            with contextlib.suppress(OSError):  # it saves time, no more
                write_atomic(self._path, bytes(self._cache.serialize()))
