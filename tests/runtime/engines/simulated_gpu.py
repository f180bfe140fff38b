"""CUDA and TensorRT as the engine calls them, carried out on this machine's memory.

What is put on the stream runs at once, or is recorded while a graph is being captured and runs at
each launch, on what the buffers hold then. Calls that NVIDIA forbids fail the test.
"""

# ruff: noqa: N802, N815  (the names are NVIDIA's)
from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

Work = Callable[[], object]


class SimulatedCuda:
    """``cuda.bindings.runtime``; ``failing`` names the calls that are to return an error."""

    cudaError_t = SimpleNamespace(cudaSuccess=0)
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaHostAllocDefault = 0

    def __init__(self) -> None:
        self.failing: set[str] = set()
        self.calls: list[str] = []
        self.held: dict[int, Any] = {}
        self._recorded: list[Work] | None = None
        self._next = 1

    def put(self, work: Work) -> None:
        if self._recorded is None:
            work()
        else:
            self._recorded.append(work)

    def _answer(self, name: str, *results: Any) -> tuple[Any, ...]:
        self.calls.append(name)
        return (1, *(None for _ in results)) if name in self.failing else (0, *results)

    def _hold(self, thing: Any) -> int:
        self._next += 1
        self.held[self._next] = thing
        return self._next

    def _memory(self, name: str, count: int) -> tuple[Any, ...]:
        memory = (ctypes.c_uint8 * count)()
        address = ctypes.addressof(memory)
        self.held[address] = memory
        return self._answer(name, address)

    def cudaStreamCreate(self) -> tuple[Any, ...]:
        return self._answer("cudaStreamCreate", self._hold("stream"))

    def cudaHostAlloc(self, count: int, flags: int) -> tuple[Any, ...]:
        return self._memory("cudaHostAlloc", count)

    def cudaMalloc(self, count: int) -> tuple[Any, ...]:
        return self._memory("cudaMalloc", count)

    def cudaMemcpyAsync(self, to: int, source: int, count: int, kind: int, stream: int) -> Any:
        assert self.held[stream] == "stream"
        self.put(lambda: ctypes.memmove(to, source, count))
        return self._answer("cudaMemcpyAsync")

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        assert self._recorded is None, "waiting breaks a capture"
        return self._answer("cudaStreamSynchronize")

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Any, ...]:
        assert self._recorded is None
        self._recorded = []
        return self._answer("cudaStreamBeginCapture")

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        assert self._recorded is not None
        work, self._recorded = self._recorded, None
        if "cudaStreamEndCapture" in self.failing:
            return self._answer("cudaStreamEndCapture", None)
        return self._answer("cudaStreamEndCapture", self._hold(work))

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:
        if "cudaGraphInstantiate" in self.failing:
            return self._answer("cudaGraphInstantiate", None)
        return self._answer("cudaGraphInstantiate", self._hold(self.held[graph]))

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Any, ...]:
        for work in self.held[graph]:
            work()
        return self._answer("cudaGraphLaunch")

    def cudaGetLastError(self) -> tuple[Any, ...]:
        return self._answer("cudaGetLastError")

    def cudaGetErrorString(self, code: int) -> tuple[Any, ...]:
        return 0, b"operation not permitted"

    def _free(self, name: str, handle: int) -> tuple[Any, ...]:
        del self.held[handle]  # a second time is a KeyError
        return self._answer(name)

    def cudaGraphDestroy(self, graph: int) -> tuple[Any, ...]:
        return self._free("cudaGraphDestroy", graph)

    def cudaGraphExecDestroy(self, graph: int) -> tuple[Any, ...]:
        return self._free("cudaGraphExecDestroy", graph)

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        return self._free("cudaFree", address)

    def cudaFreeHost(self, address: int) -> tuple[Any, ...]:
        return self._free("cudaFreeHost", address)

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        return self._free("cudaStreamDestroy", stream)


class SimulatedContext:
    """An execution context whose network is ``network``: uint8 [B, H, W, 3] to float32 logits."""

    def __init__(self, cuda: SimulatedCuda, network: Callable[[Any], Any]) -> None:
        self._cuda = cuda
        self._network = network
        self._shape: tuple[int, ...] = ()
        self._addresses: dict[str, int] = {}
        self.refuses = False

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert not any(isinstance(thing, list) for thing in self._cuda.held.values()), (
            "a graph of another state of this context is still there"
        )
        self._shape = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        return []

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self.refuses:
            return False
        source, to = self._addresses["image"], self._addresses["logits"]
        shape = self._shape

        def compute() -> None:
            memory = (ctypes.c_uint8 * int(np.prod(shape))).from_address(source)
            logits = np.ascontiguousarray(
                self._network(np.frombuffer(memory, np.uint8).reshape(shape)), np.float32
            )
            ctypes.memmove(to, logits.ctypes.data, logits.nbytes)

        self._cuda.put(compute)
        self._cuda.calls.append("execute_async_v3")
        return True


class SimulatedTensorRT:
    """The module; ``strategy`` is what an RTX runtime's configuration was told of CUDA graphs."""

    __version__ = "10.3.0"
    TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")

    class ILogger:
        ERROR, INTERNAL_ERROR = 1, 0

        def __init__(self) -> None:
            pass

    def __init__(self, context: SimulatedContext, shapes: dict[str, tuple[int, ...]]) -> None:
        self.context = context
        self.config = SimpleNamespace(
            cuda_graph_strategy="none",
            create_runtime_cache=lambda: SimpleNamespace(
                deserialize=lambda data: None, serialize=lambda: b"kernels"
            ),
            set_runtime_cache=lambda cache: None,
        )
        names = list(shapes)
        dtypes = {"image": "UINT8", "logits": "FLOAT"}
        self.engine = SimpleNamespace(
            num_io_tensors=len(names),
            get_tensor_name=names.__getitem__,
            get_tensor_dtype=lambda name: SimpleNamespace(name=dtypes[name]),
            get_tensor_shape=shapes.__getitem__,
            get_tensor_mode=lambda name: "in" if name == "image" else "out",
            create_execution_context=lambda config=None: context,
        )

    def rtx(self) -> SimulatedTensorRT:
        """With what only TensorRT-RTX has."""
        self.engine.create_runtime_config = lambda: self.config
        return self

    def Runtime(self, log: object) -> SimpleNamespace:
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: self.engine)
