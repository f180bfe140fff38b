"""The engines that run a bundle's graph, behind one protocol; ``open_engine`` opens one.

An engine is never taken on trust: asking for one and silently getting another, or another
precision, is an error, and ``auto`` takes only what `verify` has passed.

Which engine ``auto`` takes: the first of an order that was proven for this bundle, here.
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

from knet_runtime.bundle.manifest import Graph, Kind
from knet_runtime.bundle.store import Bundle
from knet_runtime.engines.hardware import gpu_name, processor_name
from knet_runtime.errors import EngineError, EngineUnavailable, ParityError

CPU_ENGINES = ("onnxruntime-cpu", "openvino", "openvino-bf16")
# Fastest first: TensorRT's own engines, then its providers, which may split the graph, then CUDA;
# on the CPU, bf16 where it is right, then ONNX Runtime, which runs everywhere and so ends the list.
PREFERENCE: tuple[str, ...] = (
    "tensorrt",
    "tensorrt-rtx",
    "onnxruntime-tensorrt",
    "onnxruntime-tensorrt-rtx",
    "onnxruntime-cuda",
    "openvino-bf16",
    "onnxruntime-cpu",
)


def default_graph(bundle: Bundle, engine: str) -> Kind:
    """What ``engine`` runs when nobody says: GPUs the class map, which is less to bring back, where
    the bundle has it; processors the logits, for which the runtime's own tail is the faster."""
    kinds = [artefact.kind for artefact in bundle.manifest.artefacts]
    return "classmap" if engine not in CPU_ENGINES and "classmap" in kinds else "logits"


def device_of(engine: str) -> str | None:
    """The device that ``engine`` would run on; None when this machine has none."""
    return processor_name() if engine in CPU_ENGINES else gpu_name()


def unverified_reason(artefact: Graph, engine: str, device: str) -> str | None:
    """Why ``artefact`` on this engine and device is not proven right; None if verify passed it.

    What onnxruntime-cpu passed on one processor holds for the others, unless it failed there:
    every export is verified on it.
    """
    found = artefact.parity_on(engine, device)
    if found is not None:
        return None if found.passed else f"it did not pass verify on {device}"
    passed = any(parity.passed for parity in artefact.parity if parity.engine == engine)
    if passed and engine == "onnxruntime-cpu":
        return None
    return f"it was never verified on {device}"


def why_not_auto(bundle: Bundle, engine: str, kind: Kind | None = None) -> str | None:
    """Why ``auto`` may not take ``engine`` here; None if it may. onnxruntime-cpu needs no record,
    but one that says that it failed counts."""
    device = device_of(engine)
    if device is None:
        return "there is no NVIDIA GPU, or no driver for it"
    artefact = bundle.graph(kind or default_graph(bundle, engine))
    if engine == "onnxruntime-cpu" and artefact.parity_on(engine, device) is None:
        return None
    return unverified_reason(artefact, engine, device)


def reason(bundle: Bundle, engine: str) -> str:
    """Why ``auto`` took ``engine`` here, in words: what spoke against those before it."""
    passed_over: dict[str, list[str]] = {}
    for earlier in PREFERENCE[: PREFERENCE.index(engine)]:
        # Nothing was against it, and it was not taken: so it did not open, as a warning said.
        against = why_not_auto(bundle, earlier) or "it passed verify but does not work now"
        passed_over.setdefault(against, []).append(earlier)
    if not passed_over:
        return "the first of auto's order"
    others = "; ".join(f"{', '.join(names)}: {why}" for why, names in passed_over.items())
    return f"the first of auto's order that may be taken here ({others})"


_log = logging.getLogger(__name__)

ENGINES: tuple[str, ...] = (
    "onnxruntime-cpu",
    "onnxruntime-cuda",
    "onnxruntime-tensorrt",
    "onnxruntime-tensorrt-rtx",
    "tensorrt",
    "tensorrt-rtx",
    "openvino",
    "openvino-bf16",
)
# What would not run, or not at the precision that it says; the rest is for verify to judge.
_REFUSED = {
    ("onnxruntime-cpu", "bf16"): "it has no bf16 operations: use openvino-bf16 or a GPU engine",
    ("openvino", "bf16"): "it computes such a graph in bf16, not in f32: use openvino-bf16",
}
# Distributions that all install the package "onnxruntime" and overwrite each other's files.
_ONNXRUNTIMES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-silicon",
)


class Engine(Protocol):
    """A loaded engine. A context manager; ``infer`` may be called from several threads."""

    @property
    def name(self) -> str:
        """One of ENGINES."""

    @property
    def device(self) -> str:
        """What it runs on, in words that tell two machines apart: the processor's or GPU's name."""

    @property
    def kind(self) -> Kind:
        """Which of the bundle's artefacts it runs, and so what ``infer`` gives."""

    def infer(self, batch: NDArray[np.uint8]) -> NDArray[np.float32] | NDArray[np.uint8]:
        """uint8 [B, H, W, 3] RGB at the model's size, 1 <= B <= max_batch, to logits float32
        [B, N, h, w], or with ``kind`` "classmap" to classes uint8 [B, H, W]. Raises EngineError
        for another batch, or when the engine fails."""

    def close(self) -> None:
        """Free the engine; a second call does nothing."""

    def __enter__(self) -> Engine: ...

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


def open_engine(bundle: Bundle, engine: str = "auto", kind: Kind | None = None) -> Engine:
    """Load the bundle on ``engine``: one of ENGINES, or "auto", the first of ``PREFERENCE`` that
    has passed verify for this bundle on this machine.

    ``kind`` says which of its graphs; None leaves it to the engine (``choose.default_graph``).
    Raises EngineUnavailable when the engine can not run here (its text says what to install),
    EngineError when it is unknown, can not take the bundle's precision or the graph is not what
    the manifest says, and ParityError when "auto" finds no engine that it may take.
    """
    if engine == "auto":
        return _open_best(bundle, kind)
    backend = _open(bundle, engine, kind or default_graph(bundle, engine))
    _log.info("engine %s: asked for", engine)
    return backend


def _open(bundle: Bundle, engine: str, kind: Kind) -> Engine:
    precision = bundle.artefact.precision
    if reason := _REFUSED.get((engine, precision)):
        raise EngineError(f"{engine} can not run {bundle.path}, a {precision} bundle: {reason}")
    match engine:
        case "tensorrt" | "tensorrt-rtx":
            from knet_runtime.engines.tensorrt import TensorRTEngine

            return TensorRTEngine(bundle, engine, kind)
        case "openvino" | "openvino-bf16":
            with _importing("openvino"):
                from knet_runtime.engines.openvino import OpenVinoEngine
            return OpenVinoEngine(bundle, engine, kind)
        case _ if engine in ENGINES:
            with _importing("onnxruntime"):
                from knet_runtime.engines.onnxruntime import OnnxRuntimeEngine
            return OnnxRuntimeEngine(bundle, engine, kind)
        case _:
            raise EngineError(f"there is no engine {engine!r}: use auto, {', '.join(ENGINES)}")


def _open_best(bundle: Bundle, kind: Kind | None) -> Engine:
    for engine in PREFERENCE:
        if reason := why_not_auto(bundle, engine, kind):
            _log.info("engine %s: not taken, %s", engine, reason)
            continue
        try:
            backend = _open(bundle, engine, kind or default_graph(bundle, engine))
        except EngineError as error:
            if engine == PREFERENCE[-1]:
                raise
            # It was verified here, so its owner expects it: say it aloud.
            _log.warning("engine %s does not work: %s", engine, error)
        else:
            _log.info("engine %s: the first that may be taken here", engine)
            return backend
    raise ParityError(
        f"{bundle.path} passes verify on no engine of this machine, so none is taken by itself: "
        "run knet-deploy verify, or name the engine with --engine"
    )


def probe_engines() -> list[EngineStatus]:
    """Try every engine of ENGINES on something tiny."""
    clash = onnxruntime_clash()
    statuses = []
    for engine in ENGINES:
        try:
            available, detail = True, _try(engine)
        except EngineError as error:
            available, detail = False, str(error)
        if clash and engine.startswith("onnxruntime"):
            detail = f"{detail}; {clash}"
        statuses.append(EngineStatus(engine, available, detail))
    return statuses


def _try(engine: str) -> str:
    match engine:
        case "tensorrt" | "tensorrt-rtx":
            from knet_runtime.engines.tensorrt import try_tensorrt

            return try_tensorrt(engine)
        case "openvino" | "openvino-bf16":
            with _importing("openvino"):
                from knet_runtime.engines.openvino import try_openvino
            return try_openvino(engine)
        case _:
            with _importing("onnxruntime"):
                from knet_runtime.engines.onnxruntime import try_provider
            return try_provider(engine)


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
def _importing(package: str) -> Iterator[None]:
    """Engines are imported when they are opened: a broken one must not break the rest."""
    try:
        yield
    except ImportError as error:
        if package == "onnxruntime":
            mend = onnxruntime_clash() or "pip install --force-reinstall onnxruntime"
        else:
            mend = f'pip install "knet-deploy[{package}]"'
        raise EngineUnavailable(f"{package} can not be imported ({error}): {mend}") from error


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
