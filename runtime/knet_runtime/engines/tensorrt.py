"""TensorRT and TensorRT-RTX: a plan that ``knet-deploy build`` made for this GPU.

Their modules ``tensorrt`` (10.3 or newer) and ``tensorrt_rtx`` have one API, and are imported when
a plan is built or opened, never before.

Written against NVIDIA's documented interface and never run on a GPU by its authors: trust it when
``knet-deploy verify`` passes. Builds nothing and loads nothing but what the plan store hands out.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_runtime.atomic import write_atomic
from knet_runtime.bundle.manifest import Kind
from knet_runtime.bundle.store import Bundle
from knet_runtime.engines.base import EngineSpec, Tensor, check_batch, check_graph, check_outputs
from knet_runtime.engines.cuda import Cuda, explain
from knet_runtime.engines.hardware import Gpu, this_gpu
from knet_runtime.engines.plan_store import find_plan
from knet_runtime.errors import EngineError, EngineUnavailable
from knet_runtime.types import Closeable

_log = logging.getLogger(__name__)

_DTYPES = {"FLOAT": "float32", "UINT8": "uint8"}
_OLDEST = (10, 3)
_INSTALL = {
    "tensorrt": (
        'pip install "knet-deploy[tensorrt]" (on a Jetson: apt install python3-libnvinfer, and a '
        "virtual environment with --system-site-packages)"
    ),
    "tensorrt-rtx": (
        "pip install --no-deps onnxruntime-ep-nv-tensorrt-rtx-cu13 "
        "tensorrt-rtx-cu13-bindings==1.7.1.116"
    ),
}
# The package for ONNX Runtime carries the libraries that the bindings' package lacks.
_CARRIER = "onnxruntime_ep_nv_tensorrt_rtx"
_LIBRARIES = ("libcudart.so.*", "libtensorrt_rtx.so.1*", "libtensorrt_onnxparser_rtx.so.1*")


class TensorRTEngine(Closeable):
    """The plan in the bundle that fits this GPU, on a stream of its own.

    One execution context behind a lock: calls from several threads take turns. Two batches of one
    size in a row make a CUDA graph of upload, network and download, which the next ones of that
    size launch; TensorRT-RTX makes its own.
    """

    def __init__(self, bundle: Bundle, engine: str, kind: Kind) -> None:
        self._module = load_tensorrt(engine)
        gpu = _gpu(engine)
        stored = find_plan(bundle, engine, kind, self._module.__version__, gpu)
        self.name, self.kind, self.device = engine, kind, gpu.name
        self._manifest = bundle.manifest
        profile = stored.record.options.profile
        self._min_batch, most = profile.min.batch, profile.max.batch
        self._spec = msgspec.structs.replace(bundle.manifest.input, max_batch=most)
        self._lock = threading.Lock()
        self._log = new_log(self._module)
        self._runtime: Any = self._module.Runtime(self._log)
        self._engine: Any = self._runtime.deserialize_cuda_engine(stored.read())
        if self._engine is None:
            raise EngineUnavailable(f"{stored.path} cannot be loaded: {explain(self._log.errors)}")
        inputs, outputs = self._tensors()
        check_graph(stored.path, self._manifest, kind, inputs, outputs)
        self._cache = _RuntimeCache(stored.runtime_cache)
        self._context: Any = self._cache.create_context(self._engine, self._module)
        if self._context is None:
            raise EngineError(f"{engine} has too little memory to run: {explain(self._log.errors)}")
        self._cuda = Cuda()
        self._size = 0  # of the last batch
        self._makes_graphs = engine == "tensorrt"
        size = self._spec.size
        try:
            self._in = self._cuda.allocate((most, *size, 3), np.dtype(np.uint8))
            self._out = {
                output.name: self._cuda.allocate(
                    (most, *output.shape(size)), np.dtype(output.dtype)
                )
                for output in bundle.graph(kind).outputs
            }
        except EngineError:
            self.close()
            raise

    def infer(self, batch: NDArray[np.uint8]) -> Mapping[str, NDArray[Any]]:
        """See ``Engine.infer``; B must be within the plan's profile."""
        images = check_batch(self.name, self._spec, batch)
        size = len(images)
        if size < self._min_batch:
            raise EngineError(
                f"the batch holds {size} images; this plan was built for at least "
                f"{self._min_batch}: build it with a smaller --min"
            )
        with self._lock:
            if self._context is None:
                raise EngineError(f"{self.name} was closed: open it again")
            self._log.errors.clear()
            self._in.host[:size] = images
            self._run(size)
            # The next call writes there again.
            outputs = {name: buffer.host[:size].copy() for name, buffer in self._out.items()}
        return check_outputs(self.name, self._manifest, self.kind, size, outputs)

    def _run(self, size: int) -> None:
        """From the pinned buffer of the input to those of the outputs."""
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
        buffers = {spec.name: self._in, **self._out}
        if not (
            context.set_input_shape(spec.name, (size, *spec.size, 3))
            and not context.infer_shapes()
            and all(context.set_tensor_address(name, at.device) for name, at in buffers.items())
        ):
            raise self._failure(size)

    def _enqueue(self, size: int) -> None:
        self._cuda.upload(self._in, size)
        if not self._context.execute_async_v3(self._cuda.stream):
            raise self._failure(size)
        for buffer in self._out.values():
            self._cuda.download(buffer, size)

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


def load_tensorrt(engine: str) -> Any:
    """The module for ``engine``, "tensorrt" or "tensorrt-rtx". Raises EngineUnavailable with what
    to install."""
    try:
        module = importlib.import_module("tensorrt") if engine == "tensorrt" else _load_rtx()
    except (ImportError, OSError) as error:
        raise EngineUnavailable(
            f"{engine} is not installed ({error}): {_INSTALL[engine]}"
        ) from error
    version = tuple(int(part) for part in module.__version__.split(".")[:2])
    if engine == "tensorrt" and version < _OLDEST:
        raise EngineUnavailable(
            f"tensorrt {module.__version__} is too old, 10.3 is the oldest: {_INSTALL[engine]}"
        )
    return module


def _load_rtx() -> Any:
    if importlib.util.find_spec("tensorrt_rtx"):
        return importlib.import_module("tensorrt_rtx")
    carrier = importlib.util.find_spec(_CARRIER)
    if carrier is not None and carrier.origin is not None:
        folder = Path(carrier.origin).parent
        for pattern in _LIBRARIES:
            for library in sorted(folder.glob(pattern))[:1]:
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return importlib.import_module("tensorrt_rtx_bindings")


def new_log(module: Any) -> Any:
    """An ``ILogger`` of ``module`` that keeps errors in ``errors``; it must outlive all else."""

    class Log(module.ILogger):  # type: ignore[misc]  # its base is known at run time only
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (module.ILogger.ERROR, module.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return Log()


def _probe(engine: str) -> str:
    module = load_tensorrt(engine)
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
    """What TensorRT-RTX compiled for this GPU when it first ran, beside the plan; TensorRT proper
    compiles nothing then."""

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


SPECS = tuple(
    EngineSpec(
        name=name,
        device="gpu",
        open=TensorRTEngine,
        probe=_probe,
        libraries=libraries,
        install=_INSTALL[name],
        graph="classmap",
        rank=rank,
        runs_plans=True,
    )
    for rank, name, libraries in (
        (10, "tensorrt", ("tensorrt",)),
        (20, "tensorrt-rtx", ("tensorrt_rtx", "tensorrt_rtx_bindings")),
    )
)
