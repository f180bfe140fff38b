"""ONNX Runtime on the CPU, and the session and the buffers that its GPU providers run in too."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from knet_runtime.bundle.manifest import InputSpec, Kind, OutputSpec
from knet_runtime.bundle.store import Bundle
from knet_runtime.engines.base import EngineSpec, Tensor, check_batch, check_graph, check_outputs
from knet_runtime.engines.hardware import cpu_budget, processor_name
from knet_runtime.errors import EngineError, EngineUnavailable, first_line
from knet_runtime.types import Closeable

_DTYPES = {"tensor(float)": "float32", "tensor(uint8)": "uint8"}
# y = Relu(x), float32 [1]: the least graph that makes a provider load and run.
TINY_GRAPH = (
    b'\x08\x08:3\n\x0c\n\x01x\x12\x01y"\x04Relu\x12\x01pZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12'
    b"\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)
# Distributions that all install the package "onnxruntime" and overwrite each other's files.
_DISTRIBUTIONS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-silicon",
)


class OnnxRuntimeEngine(Closeable):
    """A bundle's graph in an ONNX Runtime session, which ``buffers`` may feed."""

    def __init__(
        self,
        bundle: Bundle,
        name: str,
        kind: Kind,
        device: str,
        session: Any,
        buffers: BoundSession | None = None,
    ) -> None:
        self.name, self.kind, self.device = name, kind, device
        self._manifest = bundle.manifest
        self._names = [output.name for output in bundle.graph(kind).outputs]
        self._session, self._buffers = session, buffers
        inputs, outputs = (
            [Tensor(put.name, _DTYPES.get(put.type, put.type), tuple(put.shape)) for put in puts]
            for puts in (session.get_inputs(), session.get_outputs())
        )
        check_graph(bundle.file(bundle.graph(kind).path), self._manifest, kind, inputs, outputs)

    def infer(self, batch: NDArray[np.uint8]) -> Mapping[str, NDArray[Any]]:
        """See ``Engine.infer``."""
        session, spec = self._session, self._manifest.input
        if session is None:
            raise EngineError(f"{self.name} was closed: open it again")
        images = check_batch(self.name, spec, batch)
        try:
            if self._buffers is not None:
                arrays = self._buffers.run(images)
            else:
                arrays = session.run(self._names, {spec.name: images})
        except Exception as error:  # ONNX Runtime's own exceptions share no base but this one
            raise EngineError(f"{self.name} failed on a batch of {len(batch)}: {error}") from error
        outputs = dict(zip(self._names, arrays, strict=True))
        return check_outputs(self.name, self._manifest, self.kind, len(batch), outputs)

    def close(self) -> None:
        """Free the session; a second call does nothing."""
        self._session = self._buffers = None


class _Bound(NamedTuple):
    image: Any
    outputs: list[Any]
    binding: Any
    options: Any


class BoundSession:
    """Runs ``session`` with buffers per batch size that stay where they are, made at its first
    batch. With ``graphs`` each size is a CUDA graph of its own, which the provider captures at its
    first run. Calls from several threads take turns.

    Checked on the CPU's memory, and never run on a GPU by its authors.
    """

    def __init__(
        self,
        session: Any,
        spec: InputSpec,
        outputs: Sequence[OutputSpec],
        *,
        graphs: bool,
        device: str = "cuda",
    ) -> None:
        self._session, self._spec, self._outputs = session, spec, outputs
        self._graphs, self._device = graphs, device
        self._lock = threading.Lock()
        self._bound: dict[int, _Bound] = {}

    def run(self, images: NDArray[np.uint8]) -> list[NDArray[Any]]:
        """uint8 [B, H, W, 3] to new arrays [B, …], one per output; raises what ONNX Runtime
        does."""
        with self._lock:
            bound = self._bound.get(len(images))
            if bound is None:
                bound = self._bound[len(images)] = self._bind(images.shape)
            bound.image.update_inplace(np.ascontiguousarray(images))
            self._session.run_with_iobinding(bound.binding, bound.options)
            return [np.array(output.numpy()) for output in bound.outputs]

    def _bind(self, shape: tuple[int, ...]) -> _Bound:
        import onnxruntime as ort

        make = ort.OrtValue.ortvalue_from_shape_and_type
        binding, options = self._session.io_binding(), ort.RunOptions()
        image = make(list(shape), np.uint8, self._device, 0)
        binding.bind_ortvalue_input(self._spec.name, image)
        outputs = []
        for output in self._outputs:
            sides, element = output.shape(self._spec.size), np.dtype(output.dtype).type
            outputs.append(make([shape[0], *sides], element, self._device, 0))
            binding.bind_ortvalue_output(output.name, outputs[-1])
        if self._graphs:
            options.add_run_config_entry("gpu_graph_id", str(shape[0]))
        return _Bound(image, outputs, binding, options)


def session_options() -> Any:
    """ONNX Runtime's SessionOptions for every session of ours."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # fatal only: what matters is raised, and stderr is the user's
    options.intra_op_num_threads = cpu_budget()
    # Threads that spin while they wait take the cores from the decoder and the postprocessing.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def open_session(model: Path | bytes, options: Any = None) -> Any:
    """An InferenceSession of a graph (its path or bytes) on the CPU, with ``options`` or
    ``session_options``. Raises what ONNX Runtime does, which shares no base but Exception."""
    import onnxruntime as ort

    return ort.InferenceSession(
        str(model) if isinstance(model, Path) else model,
        options or session_options(),
        providers=["CPUExecutionProvider"],
        enable_fallback=0,
    )


def _open(bundle: Bundle, name: str, kind: Kind) -> OnnxRuntimeEngine:
    session = _load(name, bundle.file(bundle.graph(kind).path))
    return OnnxRuntimeEngine(bundle, name, kind, processor_name(), session)


def _probe(name: str) -> str:
    return try_session(name, _load(name, TINY_GRAPH), f"{cpu_budget()} threads")


def _load(name: str, model: Path | bytes) -> Any:
    try:
        return open_session(model)
    except ImportError:  # there is no onnxruntime
        raise
    except Exception as error:  # ONNX Runtime's own exceptions share no base but this one
        what = model if isinstance(model, Path) else "a tiny graph"
        raise EngineError(
            f"{name} cannot load {what}: {first_line(error)}; "
            "export it again, or upgrade onnxruntime"
        ) from error


def try_session(name: str, session: Any, where: str) -> str:
    """Run ``TINY_GRAPH`` in its session; words for ``doctor``, or EngineUnavailable."""
    import onnxruntime as ort

    try:
        session.run(None, {"x": np.ones(1, np.float32)})
    except Exception as error:  # as above
        raise EngineUnavailable(f"{name} fails on a tiny graph: {first_line(error)}") from error
    return f"onnxruntime {ort.__version__}, {where}"


def onnxruntime_clash() -> str | None:
    """What is wrong, and the fix, when several onnxruntime distributions are installed at once."""
    installed = [name for name in _DISTRIBUTIONS if _is_installed(name)]
    if len(installed) < 2:
        return None
    kept = "onnxruntime-gpu" if "onnxruntime-gpu" in installed else installed[0]
    return (
        f"{' and '.join(installed)} are both installed and overwrite each other's files: "
        f"pip uninstall -y {' '.join(installed)} && pip install {kept}"
    )


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


SPECS = (
    EngineSpec(
        name="onnxruntime-cpu",
        device="cpu",
        open=_open,
        probe=_probe,
        libraries=("onnxruntime",),
        install="pip install --force-reinstall onnxruntime",
        conflict=onnxruntime_clash,
        refuses={"bf16": "it has no bf16 operations: use openvino-bf16 or a GPU engine"},
        rank=100,  # it runs everywhere, and so ends the list
        verified_by_export=True,
    ),
)
