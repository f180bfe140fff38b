"""ONNX Runtime's providers for NVIDIA GPUs, and whether they are really used.

ONNX Runtime drops a provider that fails to start without an error, and gives what a provider does
not take to the CPU. So after a session is open it is asked which provider got which nodes: an
engine that got none is refused, and what others got is logged.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

from knet_runtime.bundle.manifest import InputSpec, Kind, Precision
from knet_runtime.bundle.store import Bundle
from knet_runtime.engines.base import EngineSpec
from knet_runtime.engines.hardware import gpu_name
from knet_runtime.engines.onnxruntime import (
    TINY_GRAPH,
    BoundSession,
    OnnxRuntimeEngine,
    onnxruntime_clash,
    session_options,
    try_session,
)
from knet_runtime.errors import EngineError, EngineUnavailable, first_line

_log = logging.getLogger(__name__)

_CUDA, _TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
_PROVIDERS = {
    "onnxruntime-cuda": _CUDA,
    "onnxruntime-tensorrt": _TENSORRT,
    "onnxruntime-tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
# That plugin brings no allocator that onnxruntime could bind.
_BOUND = ("onnxruntime-cuda", "onnxruntime-tensorrt")
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


def _open_engine(bundle: Bundle, name: str, kind: Kind) -> OnnxRuntimeEngine:
    graph, spec = bundle.graph(kind), bundle.manifest.input
    session = open_gpu_session(str(bundle.file(graph.path)), name, spec, graph.precision)
    buffers = None
    if name in _BOUND:
        options = session.get_provider_options().get(_CUDA, {})
        graphs = options.get("enable_cuda_graph") == "1"  # as ``_open`` could open it
        buffers = BoundSession(session, spec, graph.outputs, graphs=graphs)
    return OnnxRuntimeEngine(bundle, name, kind, gpu_name() or "unknown GPU", session, buffers)


def _probe(name: str) -> str:
    session = open_gpu_session(TINY_GRAPH, name, None, "fp32")
    return try_session(name, session, gpu_name() or "unknown GPU")


def open_gpu_session(
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
        session = _open(model, options, engine, spec, precision)
    except EngineError:
        raise
    except Exception as error:  # ONNX Runtime's own exceptions share no base but this one
        raise _unavailable(engine, _missing_library(engine) or first_line(error)) from error
    _check_used(session, engine)
    return session


def _open(
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


SPECS = tuple(
    EngineSpec(
        name=name,
        device="gpu",
        open=_open_engine,
        probe=_probe,
        libraries=("onnxruntime", *libraries),
        install="pip install --force-reinstall onnxruntime",
        conflict=onnxruntime_clash,
        graph="classmap",
        rank=rank,
    )
    for rank, name, libraries in (
        (50, "onnxruntime-cuda", ()),
        (30, "onnxruntime-tensorrt", ("tensorrt",)),
        (40, "onnxruntime-tensorrt-rtx", (_PLUGIN,)),
    )
)
