"""ONNX Runtime on the CPU and on CUDA."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from knet_runtime.bundle import Bundle
from knet_runtime.errors import BackendError, BackendUnavailable
from knet_runtime.manifest import Manifest

_log = logging.getLogger(__name__)

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_INSTALL_GPU = "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
# y = Relu(x), float32 [1]: the least graph that makes a provider load and run.
_TINY_GRAPH = (
    b'\x08\x08:3\n\x0c\n\x01x\x12\x01y"\x04Relu\x12\x01pZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12'
    b"\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)


class OrtBackend:
    """The bundle's graph in an ONNX Runtime session, on exactly the engine that was asked for."""

    def __init__(self, bundle: Bundle, engine: str) -> None:
        self.name = engine
        self._manifest = bundle.manifest
        path = bundle.file(bundle.artefact.path)
        self._session: Any = _open_session(str(path), engine, str(path))
        _check_graph(self._session, self._manifest, path)

    def infer(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [B, H, W, 3] RGB at the model's size, 1 <= B <= max_batch, to logits float32
        [B, N, h, w]. Raises BackendError for another batch, or when the engine fails."""
        session, spec = self._session, self._manifest.input
        if session is None:
            raise BackendError(f"{self.name} was closed: open it again")
        expected = (spec.height, spec.width, 3)
        if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[1:] != expected:
            raise BackendError(
                f"the batch is {batch.dtype} {batch.shape}; this bundle takes uint8 [B, "
                f"{', '.join(map(str, expected))}]: fit the frames with preprocess.fit"
            )
        if not 1 <= len(batch) <= spec.max_batch:
            raise BackendError(
                f"the batch holds {len(batch)} pictures; this bundle takes 1 to {spec.max_batch}: "
                "split it, or export with a larger max_batch"
            )
        feed = {spec.name: np.ascontiguousarray(batch)}
        try:
            (logits,) = session.run([self._manifest.output.name], feed)
        except Exception as error:  # ONNX Runtime's own exceptions share no base but this one
            raise BackendError(f"{self.name} failed on a batch of {len(batch)}: {error}") from error
        shape = (len(batch), *_logits_shape(self._manifest))
        if logits.shape != shape:
            raise BackendError(
                f"{self.name} gave logits {logits.shape}, the manifest says {shape}: export again"
            )
        return np.asarray(logits, np.float32)

    def close(self) -> None:
        """Free the session; a second call does nothing."""
        self._session = None

    def __enter__(self) -> OrtBackend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def cuda_is_built_in() -> bool:
    """Whether the installed onnxruntime has CUDA at all (not: whether it works here)."""
    return _CUDA in ort.get_available_providers()


def try_provider(engine: str) -> str:
    """Run a tiny graph on ``engine``; words for `doctor`, or BackendUnavailable with the mend."""
    session = _open_session(_TINY_GRAPH, engine, "a tiny test graph")
    try:
        session.run(None, {"x": np.ones(1, np.float32)})
    except Exception as error:
        raise BackendUnavailable(f"{engine} fails on a tiny graph: {_first_line(error)}") from error
    threads = f", {cpu_budget()} threads" if engine == "onnxruntime-cpu" else ""
    return f"onnxruntime {ort.__version__}{threads}"


def cpu_budget() -> int:
    """How many CPU cores this process may use: its affinity mask, less a container's quota.

    ONNX Runtime counts the machine's cores instead; in a container held to two of 64 it would run
    64 threads that take turns.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        pass
    return max(cores, 1)


def _open_session(model: str | bytes, engine: str, what: str) -> Any:
    if engine == "onnxruntime-cuda":
        providers: list[Any] = [(_CUDA, {"use_tf32": "0"}), _CPU]  # TF32 keeps 10 bits: no parity
        _load_cuda_libraries()
    else:
        providers = [_CPU]
    options = ort.SessionOptions()
    options.log_severity_level = 4  # fatal only: what matters is raised, and stderr is the user's
    options.intra_op_num_threads = cpu_budget()
    # Threads that spin while they wait take the cores from the decoder and the class map's tail.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's own exceptions share no base but this one
        if engine == "onnxruntime-cuda":
            raise BackendUnavailable(_no_cuda(_first_line(error))) from error
        raise BackendError(
            f"{engine} can not load {what}: {_first_line(error)}; "
            "export it again, or upgrade onnxruntime"
        ) from error
    # A provider that fails to start is dropped without an error: look at what really runs.
    if engine == "onnxruntime-cuda" and session.get_providers()[0] != _CUDA:
        raise BackendUnavailable(_no_cuda("it fell back to the CPU"))
    return session


def _no_cuda(reason: str) -> str:
    return (
        f"onnxruntime-cuda can not start: {reason}; it needs an NVIDIA driver, CUDA and cuDNN in "
        'the versions of this onnxruntime-gpu: pip install "onnxruntime-gpu[cuda,cudnn]"'
    )


def _load_cuda_libraries() -> None:
    if not cuda_is_built_in():
        raise BackendUnavailable(
            f"onnxruntime-cuda: the installed onnxruntime is built without CUDA: {_INSTALL_GPU}"
        )
    # CUDA and cuDNN from pip's nvidia-* packages are found only when loaded first. It prints.
    if (preload := getattr(ort, "preload_dlls", None)) is not None:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            preload()
        _log.debug("onnxruntime.preload_dlls: %s", printed.getvalue().strip() or "done")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _logits_shape(manifest: Manifest) -> tuple[int, int, int]:
    stride = manifest.output.stride
    height, width = manifest.input.height // stride, manifest.input.width // stride
    return manifest.labels.num_classes, height, width


def _check_graph(session: Any, manifest: Manifest, path: Path) -> None:
    """Hold the graph's names, types and static sizes to the manifest; BackendError names both."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if [tensor.name for tensor in inputs] != [manifest.input.name]:
        names = ", ".join(tensor.name for tensor in inputs)
        raise BackendError(
            f"{path}: the graph's inputs are [{names}], the manifest says {manifest.input.name!r}: "
            "export again"
        )
    by_name = {tensor.name: tensor for tensor in outputs}
    if manifest.output.name not in by_name:
        raise BackendError(
            f"{path}: the graph's outputs are [{', '.join(by_name)}], the manifest says "
            f"{manifest.output.name!r}: export again"
        )
    # A batch frozen in tracing must not pass for a free one.
    batch = 1 if manifest.input.max_batch == 1 else "any"
    picture = (manifest.input.height, manifest.input.width, 3)
    expected = (
        (inputs[0], "tensor(uint8)", (batch, *picture)),
        (by_name[manifest.output.name], "tensor(float)", (batch, *_logits_shape(manifest))),
    )
    for tensor, kind, shape in expected:
        if tensor.type != kind:
            raise BackendError(
                f"{path}: {tensor.name} is {tensor.type}, the manifest says {kind}: export again"
            )
        # Symbolic sizes (text or None) are free; what they turn out to be is checked in infer.
        if len(tensor.shape) != len(shape) or any(
            isinstance(actual, int) and actual != stated
            for actual, stated in zip(tensor.shape, shape, strict=True)
        ):
            raise BackendError(
                f"{path}: {tensor.name} is {tensor.shape}, the manifest says {list(shape)}: "
                "export again"
            )
