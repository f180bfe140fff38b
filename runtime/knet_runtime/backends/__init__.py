"""The engines that run a bundle's graph, behind one protocol; ``open_backend`` chooses.

This version runs ONNX Runtime on the CPU and on NVIDIA GPUs. An engine is never taken on trust:
asking for CUDA and silently getting the CPU is an error here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from types import TracebackType
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_runtime.bundle import Bundle
from knet_runtime.errors import BackendError, BackendUnavailable

_log = logging.getLogger(__name__)

ENGINES: tuple[str, ...] = ("onnxruntime-cpu", "onnxruntime-cuda")
_PLANNED = ("tensorrt", "tensorrt-rtx", "openvino")
# Distributions that all install the package "onnxruntime" and overwrite each other's files.
_ONNXRUNTIMES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-silicon",
)


class Backend(Protocol):
    """A loaded engine. A context manager; ``infer`` may be called from several threads."""

    @property
    def name(self) -> str:
        """One of ENGINES."""

    def infer(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [B, H, W, 3] RGB at the model's size, 1 <= B <= max_batch, to logits float32
        [B, N, h, w]. Raises BackendError for another batch, or when the engine fails."""

    def close(self) -> None:
        """Free the engine; a second call does nothing."""

    def __enter__(self) -> Backend: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class EngineStatus(msgspec.Struct, frozen=True):
    """Whether an engine runs on this machine, and in words why (not) and what to do."""

    name: str
    available: bool
    detail: str


def open_backend(bundle: Bundle, engine: str = "auto") -> Backend:
    """Load the bundle's graph on ``engine``: one of ENGINES, or "auto" (CUDA if it works here,
    else the CPU). Raises BackendUnavailable when the engine can not run here (its text says what
    to install) and BackendError when it is unknown or the graph is not what the manifest says.
    """
    match engine:
        case "onnxruntime-cpu" | "onnxruntime-cuda":
            with _importing():
                from knet_runtime.backends.ort import OrtBackend
            backend = OrtBackend(bundle, engine)
            _log.info("engine %s: asked for", engine)
            return backend
        case "auto":
            return _open_best(bundle)
        case _ if engine in _PLANNED:
            raise BackendUnavailable(_not_yet(engine))
        case _:
            raise BackendError(f"there is no engine {engine!r}: use auto, {', '.join(ENGINES)}")


def _open_best(bundle: Bundle) -> Backend:
    with _importing():
        from knet_runtime.backends.ort import OrtBackend, cuda_is_built_in
    reason = "this onnxruntime is built without CUDA"
    if cuda_is_built_in():
        try:
            backend = OrtBackend(bundle, "onnxruntime-cuda")
        except BackendUnavailable as error:
            # A GPU build was installed, so its owner expects the GPU: say it aloud.
            _log.warning("engine onnxruntime-cuda does not work: %s", error)
            reason = "CUDA does not work here"
        else:
            _log.info("engine onnxruntime-cuda: CUDA works here")
            return backend
    backend = OrtBackend(bundle, "onnxruntime-cpu")
    _log.info("engine onnxruntime-cpu: %s", reason)
    return backend


def probe_engines() -> list[EngineStatus]:
    """Try every engine on a tiny graph: ENGINES first, then those that this version lacks."""
    clash = onnxruntime_clash()
    statuses = []
    for engine in ENGINES:
        try:
            with _importing():
                from knet_runtime.backends.ort import try_provider
            available, detail = True, try_provider(engine)
        except BackendError as error:
            available, detail = False, str(error)
        statuses.append(EngineStatus(engine, available, f"{detail}; {clash}" if clash else detail))
    return statuses + [EngineStatus(engine, False, _not_yet(engine)) for engine in _PLANNED]


def onnxruntime_clash() -> str | None:
    """What is wrong, and the mend, when several onnxruntime distributions are installed at once."""
    installed = [name for name in _ONNXRUNTIMES if _is_installed(name)]
    if len(installed) < 2:
        return None
    keep = "onnxruntime-gpu" if "onnxruntime-gpu" in installed else installed[0]
    return (
        f"{' and '.join(installed)} are both installed and overwrite each other's files: "
        f"pip uninstall -y {' '.join(installed)} && pip install {keep}"
    )


@contextmanager
def _importing() -> Iterator[None]:
    """onnxruntime is imported when an engine is opened: a broken one must not break the rest."""
    try:
        yield
    except ImportError as error:
        mend = onnxruntime_clash() or "pip install --force-reinstall onnxruntime"
        raise BackendUnavailable(f"onnxruntime can not be imported ({error}): {mend}") from error


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _not_yet(engine: str) -> str:
    return f"{engine} is not supported in this version: use {' or '.join(ENGINES)}"
