"""TensorRT's Python module, of either flavour, and what it says in its log.

``tensorrt`` (10.3 or newer) and ``tensorrt_rtx`` have one API. They are imported when a plan is
built or opened, never before.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

from knet_runtime.errors import EngineUnavailable

_OLDEST = (10, 3)
INSTALL = {
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
_LIBRARIES = ("libcudart.so.*", "libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1")
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


def load_tensorrt(engine: str) -> Any:
    """The module for ``engine``, "tensorrt" or "tensorrt-rtx". Raises EngineUnavailable with what
    to install."""
    try:
        module = importlib.import_module("tensorrt") if engine == "tensorrt" else _load_rtx()
    except (ImportError, OSError) as error:
        raise EngineUnavailable(
            f"{engine} is not installed ({error}): {INSTALL[engine]}"
        ) from error
    version = tuple(int(part) for part in module.__version__.split(".")[:2])
    if engine == "tensorrt" and version < _OLDEST:
        raise EngineUnavailable(
            f"tensorrt {module.__version__} is too old, 10.3 is the oldest: {INSTALL[engine]}"
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


def explain(errors: list[str]) -> str:
    """TensorRT's reason in one line, and what to do where that is known.

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
