"""ONNX Runtime: on the CPU, and its providers for NVIDIA GPUs.

ONNX Runtime drops a provider that fails to start without an error, and gives what a provider does
not take to the CPU. So after a session is open it is asked which provider got which nodes: a GPU
engine that got none is refused, and what others got is logged.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from knet_runtime.bundle.manifest import InputSpec, Kind, OutputSpec, Precision
from knet_runtime.bundle.store import Bundle
from knet_runtime.engines.base import EngineSpec, Tensor, check_batch, check_graph, check_outputs
from knet_runtime.engines.hardware import cpu_budget, gpu_name, processor_name
from knet_runtime.errors import EngineError, EngineUnavailable, first_line
from knet_runtime.types import Closeable

_log = logging.getLogger(__name__)

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
_CUDA, _TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
_PROVIDERS = {
    "onnxruntime-cuda": _CUDA,
    "onnxruntime-tensorrt": _TENSORRT,
    "onnxruntime-tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
# That plugin brings no allocator that onnxruntime could bind.
_BOUND = ("onnxruntime-cuda", "onnxruntime-tensorrt")
_INSTALL = "pip install --force-reinstall onnxruntime"
_INSTALL_GPU = "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
_NEEDS = {
    "onnxruntime-cuda": (
        "it needs an NVIDIA driver, CUDA and cuDNN in the versions of this onnxruntime-gpu: "
        'pip install "onnxruntime-gpu[cuda,cudnn]"'
    ),
    "onnxruntime-tensorrt": (
        "it needs an NVIDIA driver, CUDA, cuDNN and the TensorRT that this onnxruntime-gpu was "
        'built for: pip install "onnxruntime-gpu[cuda,cudnn]" "tensorrt<11"'
    ),
    "onnxruntime-tensorrt-rtx": "it needs an NVIDIA driver and an RTX GPU (Ampere or newer)",
}


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
    # What was checked is an ONNX graph: never take the file for ONNX Runtime's own format.
    options.add_session_config_entry("session.load_model_format", "ONNX")
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


def _open_cpu(bundle: Bundle, name: str, kind: Kind) -> OnnxRuntimeEngine:
    session = _load(name, bundle.file(bundle.graph(kind).path))
    return OnnxRuntimeEngine(bundle, name, kind, processor_name(), session)


def _probe_cpu(name: str) -> str:
    return _try_session(name, _load(name, TINY_GRAPH), f"{cpu_budget()} threads")


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


def _open_gpu(bundle: Bundle, name: str, kind: Kind) -> OnnxRuntimeEngine:
    graph, spec = bundle.graph(kind), bundle.manifest.input
    session = _open_gpu_session(str(bundle.file(graph.path)), name, spec, graph.precision)
    buffers = None
    if name in _BOUND:
        options = session.get_provider_options().get(_CUDA, {})
        graphs = options.get("enable_cuda_graph") == "1"  # as ``_make_gpu_session`` could open it
        buffers = BoundSession(session, spec, graph.outputs, graphs=graphs)
    return OnnxRuntimeEngine(bundle, name, kind, gpu_name() or "unknown GPU", session, buffers)


def _probe_gpu(name: str) -> str:
    session = _open_gpu_session(TINY_GRAPH, name, None, "fp32")
    return _try_session(name, session, gpu_name() or "unknown GPU")


def _open_gpu_session(
    model: str | bytes, engine: str, spec: InputSpec | None, precision: Precision
) -> Any:
    """An InferenceSession of ``model`` (its path or bytes) whose nodes really run on ``engine``.

    TensorRT builds its plan here, in memory, for batches 1 … max_batch at the size of ``spec``.
    Raises EngineUnavailable, with what to do, when the engine cannot run here or would not be used.
    """
    import onnxruntime as ort

    # Failed providers are reported by ONNX Runtime's own logger, which ignores the session's level.
    ort.set_default_logger_severity(4)
    options = session_options()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        session = _make_gpu_session(model, options, engine, spec, precision)
    except EngineError:
        raise
    except Exception as error:  # as in ``_load``
        raise _unavailable(engine, _missing_library(engine) or first_line(error)) from error
    _check_used(session, engine)
    return session


def _make_gpu_session(
    model: str | bytes, options: Any, engine: str, spec: InputSpec | None, precision: Precision
) -> Any:
    import onnxruntime as ort

    if engine == "onnxruntime-tensorrt-rtx":
        options.add_provider_for_devices(_plugin_devices(), _profile("nv", spec))
        return ort.InferenceSession(model, options, enable_fallback=0)
    if _PROVIDERS[engine] not in ort.get_available_providers():
        part = "CUDA" if engine == "onnxruntime-cuda" else "TensorRT"
        raise EngineUnavailable(
            f"{engine}: the installed onnxruntime is built without {part}: {_INSTALL_GPU}"
        )
    _load_libraries(engine)
    # TF32 keeps 10 bits: no parity. TensorRT's provider has no switch for it: verify decides.
    cuda = {"use_tf32": "0"}
    providers: list[Any] = [(_CUDA, cuda), "CPUExecutionProvider"]
    if engine == "onnxruntime-tensorrt":
        flags = {} if precision == "fp32" else {f"trt_{precision}_enable": "1"}
        if precision == "fp16":  # sums of squares pass 65,504
            flags["trt_layer_norm_fp32_fallback"] = "1"
        providers.insert(0, (_TENSORRT, {**_profile("trt", spec), **flags}))
    elif spec is not None:
        # A CUDA graph needs every node on the GPU; where one is not, the session does not open.
        graphs: list[Any] = [(_CUDA, {**cuda, "enable_cuda_graph": "1"}), "CPUExecutionProvider"]
        try:
            return ort.InferenceSession(model, options, providers=graphs, enable_fallback=0)
        except Exception as error:  # whatever it is, it shows again without the graph
            _log.info("%s runs without a CUDA graph: %s", engine, first_line(error))
    return ort.InferenceSession(model, options, providers=providers, enable_fallback=0)


def _profile(prefix: str, spec: InputSpec | None) -> dict[str, str]:
    """The shapes that TensorRT builds for, or it would build again for each new batch."""
    if spec is None:
        return {}
    image = f"{spec.height}x{spec.width}x3"
    return {
        f"{prefix}_profile_{which}_shapes": f"{spec.name}:{batch}x{image}"
        for which, batch in (("min", 1), ("opt", 1), ("max", spec.max_batch))
    }


def _plugin_devices() -> list[Any]:
    """The GPUs that the TensorRT-RTX plugin takes; it is registered once per process."""
    import onnxruntime as ort

    name = _PROVIDERS["onnxruntime-tensorrt-rtx"]
    if not hasattr(ort, "get_ep_devices"):
        raise EngineUnavailable(
            f"onnxruntime-tensorrt-rtx needs onnxruntime 1.24 or newer, this is {ort.__version__}: "
            "pip install --upgrade onnxruntime"
        )
    try:
        plugin = import_module(_PLUGIN)
    except ImportError as error:
        raise EngineUnavailable(
            "onnxruntime-tensorrt-rtx needs its plugin: pip install onnxruntime-ep-nv-tensorrt-rtx"
        ) from error
    if not any(device.ep_name == name for device in ort.get_ep_devices()):
        ort.register_execution_provider_library(name, plugin.get_library_path())
    devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
    if not devices:
        raise _unavailable("onnxruntime-tensorrt-rtx", "it finds no GPU that it supports")
    return devices[:1]


def _load_libraries(engine: str) -> None:
    """CUDA, cuDNN and TensorRT from pip's packages are found only when loaded first."""
    import onnxruntime as ort

    if (preload := getattr(ort, "preload_dlls", None)) is not None:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            preload()
        _log.debug("onnxruntime.preload_dlls: %s", printed.getvalue().strip() or "done")
    if engine == "onnxruntime-tensorrt":
        with contextlib.suppress(ImportError):  # it may be installed without pip's package
            import_module("tensorrt")


def _check_used(session: Any, engine: str) -> None:
    import onnxruntime as ort

    provider = _PROVIDERS[engine]
    if provider not in session.get_providers():
        raise _unavailable(engine, _missing_library(engine) or "it fell back to the CPU")
    ask = getattr(session, "get_provider_graph_assignment_info", None)
    if ask is None:
        if engine == "onnxruntime-cuda":
            return  # the oldest version that this package takes cannot say it
        raise EngineUnavailable(
            f"{engine}: onnxruntime {ort.__version__} cannot say whether it is used: "
            "pip install --upgrade onnxruntime-gpu"
        )
    nodes = Counter[str]()
    for part in ask():
        nodes[part.ep_name] += len(part.get_nodes())
    if not nodes[provider]:
        raise _unavailable(engine, "it took no node of the graph")
    if others := {name: count for name, count in nodes.items() if name != provider and count}:
        text = " and ".join(f"{count} on {name}" for name, count in others.items())
        _log.info("engine %s runs %d nodes, %s", engine, nodes[provider], text)


def _unavailable(engine: str, reason: str) -> EngineUnavailable:
    return EngineUnavailable(f"{engine} cannot start: {reason}; {_NEEDS[engine]}")


def _missing_library(engine: str) -> str | None:
    """Which library the provider lacks, in the loader's words: ONNX Runtime does not give them."""
    import onnxruntime as ort

    if engine == "onnxruntime-tensorrt-rtx":  # a plugin: its error says it
        return None
    part = "cuda" if engine == "onnxruntime-cuda" else "tensorrt"
    library = Path(ort.__file__).parent / "capi" / f"libonnxruntime_providers_{part}.so"
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        if "cannot open shared object file" in str(error) and library.name not in str(error):
            return str(error)
    return None


def _try_session(name: str, session: Any, where: str) -> str:
    """Run ``TINY_GRAPH`` in its session; words for ``doctor``, or EngineUnavailable."""
    import onnxruntime as ort

    try:
        session.run(None, {"x": np.ones(1, np.float32)})
    except Exception as error:  # as in ``_load``
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
        open=_open_cpu,
        probe=_probe_cpu,
        libraries=("onnxruntime",),
        install=_INSTALL,
        conflict=onnxruntime_clash,
        refuses={"bf16": "it has no bf16 operations: use openvino-bf16 or a GPU engine"},
        rank=100,  # it runs everywhere, and so ends the list
        verified_by_export=True,
    ),
    *(
        EngineSpec(
            name=name,
            device="gpu",
            open=_open_gpu,
            probe=_probe_gpu,
            libraries=("onnxruntime", *libraries),
            install=_INSTALL,
            conflict=onnxruntime_clash,
            graph="classmap",
            rank=rank,
        )
        for rank, name, libraries in (
            (50, "onnxruntime-cuda", ()),
            (30, "onnxruntime-tensorrt", ("tensorrt",)),
            (40, "onnxruntime-tensorrt-rtx", (_PLUGIN,)),
        )
    ),
)
