"""ONNX Runtime: on the CPU, and on NVIDIA GPUs through its CUDA and TensorRT providers.

ONNX Runtime on a GPU through buffers that stay where they are, so that a CUDA graph can be used.

Checked on the CPU's memory, and never run on a GPU by its authors.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from knet_runtime.bundle.manifest import InputSpec, Kind, Precision
from knet_runtime.bundle.store import Bundle
from knet_runtime.engines.base import (
    Tensor,
    check_batch,
    check_graph,
    check_output,
    output_name,
    output_shape,
)
from knet_runtime.engines.hardware import cpu_budget, gpu_name, processor_name
from knet_runtime.engines.onnxruntime_gpu import first_line, makes_cuda_graphs, open_gpu_session
from knet_runtime.errors import EngineError, EngineUnavailable
from knet_runtime.types import Closeable


class _Bound(NamedTuple):
    image: Any
    output: Any
    binding: Any
    options: Any


class BoundSession:
    """Runs ``session`` with an input and an output buffer per batch size, made at its first batch.

    ``input_name`` is uint8, ``output_name`` has ``element`` and, for one picture, ``output_shape``.
    With ``graphs`` each size is a CUDA graph of its own, which the provider captures at its first
    run. Calls from several threads take turns.
    """

    def __init__(
        self,
        session: Any,
        input_name: str,
        output_name: str,
        output_shape: tuple[int, ...],
        element: type[np.float32] | type[np.uint8],
        *,
        graphs: bool,
        device: str = "cuda",
    ) -> None:
        self._session = session
        self._names = input_name, output_name
        self._shape, self._element = output_shape, element
        self._graphs = graphs
        self._device = device
        self._lock = threading.Lock()
        self._bound: dict[int, _Bound] = {}

    def run(self, images: NDArray[np.uint8]) -> NDArray[Any]:
        """uint8 [B, H, W, 3] to a new array [B, …] of the output; raises what ONNX Runtime does."""
        with self._lock:
            bound = self._bound.get(len(images))
            if bound is None:
                bound = self._bound[len(images)] = self._bind(images.shape)
            bound.image.update_inplace(np.ascontiguousarray(images))
            self._session.run_with_iobinding(bound.binding, bound.options)
            return np.array(bound.output.numpy())

    def _bind(self, shape: tuple[int, ...]) -> _Bound:
        make = ort.OrtValue.ortvalue_from_shape_and_type
        image = make(list(shape), np.uint8, self._device, 0)
        output = make([shape[0], *self._shape], self._element, self._device, 0)
        binding, options = self._session.io_binding(), ort.RunOptions()
        binding.bind_ortvalue_input(self._names[0], image)
        binding.bind_ortvalue_output(self._names[1], output)
        if self._graphs:
            options.add_run_config_entry("gpu_graph_id", str(shape[0]))
        return _Bound(image, output, binding, options)


CPU_ENGINE = "onnxruntime-cpu"
# TensorRT-RTX's plugin brings no allocator that onnxruntime could bind.
_BOUND_ENGINES = ("onnxruntime-cuda", "onnxruntime-tensorrt")
_DTYPES = {"tensor(float)": "float32", "tensor(uint8)": "uint8"}
# y = Relu(x), float32 [1]: the least graph that makes a provider load and run.
_TINY_GRAPH = (
    b'\x08\x08:3\n\x0c\n\x01x\x12\x01y"\x04Relu\x12\x01pZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12'
    b"\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)


class OnnxRuntimeEngine(Closeable):
    """The bundle's graph in an ONNX Runtime session, on exactly the engine that was asked for."""

    def __init__(self, bundle: Bundle, engine: str, kind: Kind) -> None:
        self.name, self.kind = engine, kind
        self.device = processor_name() if engine == CPU_ENGINE else gpu_name() or "unknown GPU"
        self._manifest = manifest = bundle.manifest
        artefact = bundle.graph(kind)
        path = bundle.file(artefact.path)
        self._output = output_name(manifest, kind)
        self._session: Any = _open_session(path, engine, manifest.input, artefact.precision)
        inputs, outputs = (
            [Tensor(put.name, _DTYPES.get(put.type, put.type), tuple(put.shape)) for put in puts]
            for puts in (self._session.get_inputs(), self._session.get_outputs())
        )
        check_graph(path, manifest, kind, inputs, outputs)
        self._bound: BoundSession | None = None
        if engine in _BOUND_ENGINES:
            self._bound = BoundSession(
                self._session,
                manifest.input.name,
                self._output,
                output_shape(manifest, kind),
                np.float32 if kind == "logits" else np.uint8,
                graphs=makes_cuda_graphs(self._session),
            )

    def infer(self, batch: NDArray[np.uint8]) -> NDArray[np.float32] | NDArray[np.uint8]:
        """uint8 [B, H, W, 3] RGB at the model's size, 1 <= B <= max_batch, to logits float32
        [B, N, h, w] or classes uint8 [B, H, W]. Raises EngineError for another batch, or when the
        engine fails."""
        session, spec = self._session, self._manifest.input
        if session is None:
            raise EngineError(f"{self.name} was closed: open it again")
        images = check_batch(self.name, spec, batch)
        try:
            if self._bound is not None:
                output = self._bound.run(images)
            else:
                (output,) = session.run([self._output], {spec.name: images})
        except Exception as error:  # ONNX Runtime's own exceptions share no base but this one
            raise EngineError(f"{self.name} failed on a batch of {len(batch)}: {error}") from error
        return check_output(self.name, self._manifest, self.kind, len(batch), output)

    def close(self) -> None:
        """Free the session; a second call does nothing."""
        self._session = self._bound = None


def try_provider(engine: str) -> str:
    """Run a tiny graph on ``engine``; words for `doctor`, or EngineUnavailable with the mend."""
    session = _open_session(_TINY_GRAPH, engine, None, "fp32")
    try:
        session.run(None, {"x": np.ones(1, np.float32)})
    except Exception as error:
        raise EngineUnavailable(f"{engine} fails on a tiny graph: {first_line(error)}") from error
    where = f"{cpu_budget()} threads" if engine == CPU_ENGINE else gpu_name() or "unknown GPU"
    return f"onnxruntime {ort.__version__}, {where}"


def session_options() -> Any:
    """ONNX Runtime's SessionOptions for every session of ours."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # fatal only: what matters is raised, and stderr is the user's
    options.intra_op_num_threads = cpu_budget()
    # Threads that spin while they wait take the cores from the decoder and the class map's tail.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _open_session(
    model: Path | bytes, engine: str, spec: InputSpec | None, precision: Precision
) -> Any:
    options = session_options()
    graph = str(model) if isinstance(model, Path) else model
    if engine != CPU_ENGINE:
        return open_gpu_session(graph, options, engine, spec, precision)
    try:
        return ort.InferenceSession(
            graph, options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime's own exceptions share no base but this one
        what = model if isinstance(model, Path) else "a tiny test graph"
        raise EngineError(
            f"{engine} can not load {what}: {first_line(error)}; "
            "export it again, or upgrade onnxruntime"
        ) from error
