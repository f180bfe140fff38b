"""OpenVINO on the CPU, at the precision that the engine's name says.

Left to itself OpenVINO computes fp32 graphs in bf16 where the processor has it. So the precision is
set, and what was compiled is looked at: an engine that would run at another one is refused. So is a
graph of the one form that OpenVINO is known to compute wrongly (``_check_shared_weights``).
It compiles anew whenever it is opened: no cache of its models is kept on disk.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knet_runtime.bundle.manifest import Kind
from knet_runtime.bundle.store import Bundle
from knet_runtime.engines.base import EngineSpec, Tensor, check_batch, check_graph, check_outputs
from knet_runtime.engines.hardware import cpu_budget, processor_name
from knet_runtime.errors import EngineError, EngineUnavailable
from knet_runtime.types import Closeable

_HINTS = {"openvino": "f32", "openvino-bf16": "bf16"}
_HALVES = {"bf16", "f16"}
_TELEMETRY = "openvino_telemetry"
_ANY = -1  # OpenVINO's word for a size that is left free
_VIEWS = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Convert")
_DTYPES = {"f32": "float32", "u8": "uint8"}


class OpenVinoEngine(Closeable):
    """The bundle's graph, compiled by OpenVINO for this processor and for one image; for more at
    once when they come. With all sizes known OpenVINO takes less time than with a free batch."""

    def __init__(self, bundle: Bundle, engine: str, kind: Kind) -> None:
        self.name, self.kind, self.device = engine, kind, processor_name()
        self._manifest = bundle.manifest
        self._path = path = bundle.file(bundle.graph(kind).path)
        _check_processor(_core(), engine)
        with _loading(engine, path):
            self._model: Any = _core().read_model(path)
        # Compiling may give the ports other names.
        outputs = _tensors(self._model.outputs)
        check_graph(path, self._manifest, kind, _tensors(self._model.inputs), outputs)
        if engine == "openvino":
            _check_shared_weights(self._model, path)
        names = [port.name for port in outputs]
        stated = [output.name for output in bundle.graph(kind).outputs]
        self._outputs = {name: names.index(name) for name in stated}
        self._requests: dict[int, Any] = {1: self._compiled(1)}
        # One request: the LATENCY hint gives it every thread, so two at once would gain nothing.
        self._lock = threading.Lock()

    def infer(self, batch: NDArray[np.uint8]) -> Mapping[str, NDArray[Any]]:
        """See ``Engine.infer``."""
        checked = check_batch(self.name, self._manifest.input, batch)
        with self._lock:
            if self._model is None:
                raise EngineError(f"{self.name} was closed: open it again")
            size = 1 if len(batch) == 1 else _ANY
            if size not in self._requests:
                self._requests[size] = self._compiled(size)
            request = self._requests[size]
            try:
                request.infer({0: checked}, share_inputs=True)
                # The request's own memory is written again by the next call.
                outputs = {
                    name: request.get_output_tensor(at).data.copy()
                    for name, at in self._outputs.items()
                }
            except RuntimeError as error:
                raise EngineError(
                    f"{self.name} failed on a batch of {len(batch)}: {_last_line(error)}"
                ) from error
        return check_outputs(self.name, self._manifest, self.kind, len(batch), outputs)

    def _compiled(self, batch: int) -> Any:
        """A request for ``batch`` images, in the precision that the engine's name says."""
        spec, model = self._manifest.input, self._model.clone()
        model.reshape({0: [batch, spec.height, spec.width, 3]})
        with _loading(self.name, self._path):
            compiled = _core().compile_model(model, "CPU", settings_of(self.name))
        _check_precision(compiled, self.name)
        return compiled.create_infer_request()

    def close(self) -> None:
        """Free the compiled graphs; a second call does nothing."""
        with self._lock:
            self._model = None
            self._requests = {}


def _probe(engine: str) -> str:
    _check_processor(_core(), engine)
    version = load_openvino().get_version().partition("-")[0]
    return f"openvino {version}, {_HINTS[engine]}, {cpu_budget()} threads"


def settings_of(engine: str) -> dict[str, str | int]:
    """What OpenVINO is told when it compiles for ``engine``."""
    return {
        "INFERENCE_PRECISION_HINT": _HINTS[engine],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": cpu_budget(),
    }


@functools.cache
def _core() -> Any:
    """OpenVINO, once for the process and to its end. Its CPU plugin gives the thread that loads it
    an alternate stack for signals and puts the former one back when it is freed: of two, the second
    puts back the freed one of the first, and the next signal is a segmentation fault."""
    return load_openvino().Core()


def load_openvino() -> Any:
    """The module, without its telemetry: that cannot be loaded by a user who has no home, and an
    edge box reports to nobody. Raises ImportError."""
    absent: Any = None  # to import it is an ImportError, for which OpenVINO has a stub
    sys.modules.setdefault(_TELEMETRY, absent)
    try:
        return import_module("openvino")
    finally:
        if sys.modules[_TELEMETRY] is absent:
            del sys.modules[_TELEMETRY]


def _check_processor(core: Any, engine: str) -> None:
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if engine == "openvino-bf16" and "BF16" not in able:
        raise EngineUnavailable(
            f"openvino-bf16: this processor ({processor_name()}) has no bf16 arithmetic: "
            "use openvino or onnxruntime-cpu"
        )


@contextmanager
def _loading(engine: str, path: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        why = _last_line(error)
        raise EngineError(
            f"{engine} cannot load {path}: {why}; export it again, or upgrade openvino"
        ) from error


def _tensors(ports: list[Any]) -> list[Tensor]:
    tensors = []
    for port in ports:
        dtype = port.element_type.to_string()
        sides = (side.get_length() if side.is_static else None for side in port.get_partial_shape())
        tensors.append(Tensor(port.get_any_name(), _DTYPES.get(dtype, dtype), tuple(sides)))
    return tensors


def _check_shared_weights(model: Any, path: Path) -> None:
    """EngineError for a square constant that is multiplied with both as it is and transposed.

    At f32 OpenVINO (2026.4.1) packs such weights once, in the layout of the first product, and the
    second comes out wrong without a word. K-Net's feature transform T is such a constant where it
    is applied by itself, as S Tᵀ and Q T; the exporter merges it into the linears beside it.
    """
    uses: dict[str, set[bool]] = {}
    for product in model.get_ops():
        if product.get_type_name() != "MatMul":
            continue
        shape = product.input_value(1).get_partial_shape()
        weight = product.input_value(1).get_node()
        transposed = bool(product.get_attributes()["transpose_b"])
        while weight.get_type_name() in _VIEWS:
            transposed ^= weight.get_type_name() == "Transpose"
            weight = weight.input_value(0).get_node()
        if weight.get_type_name() == "Constant" and len(shape) == 2 and shape[0] == shape[1]:
            uses.setdefault(weight.get_friendly_name(), set()).add(transposed)
    for name, ways in uses.items():
        if len(ways) > 1:
            raise EngineError(
                f"openvino would compute {path} wrongly: two products share the weight {name}, one "
                "of them transposed; export it again with this version, or use onnxruntime-cpu"
            )


def _check_precision(compiled: Any, engine: str) -> None:
    """EngineError unless what was compiled computes in the precision that ``engine`` names."""
    found = Counter(
        operation.get_rt_info()["runtimePrecision"].astype(str)
        for operation in compiled.get_runtime_model().get_ops()
    )
    halves = {name: count for name, count in found.items() if name in _HALVES}
    if engine == "openvino" and halves:
        text = ", ".join(f"{count} operations in {name}" for name, count in halves.items())
        raise EngineError(f"openvino was to compute in f32 but runs {text}: use another engine")
    if engine == "openvino-bf16" and not found["bf16"]:
        raise EngineError("openvino-bf16 was to compute in bf16 but does not: use openvino")


def _last_line(error: Exception) -> str:
    """OpenVINO begins with where in its source it raised; what happened stands in the last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


SPECS = (
    EngineSpec(
        name="openvino",
        device="cpu",
        open=OpenVinoEngine,
        probe=_probe,
        libraries=("openvino",),
        install='pip install "knet-deploy[openvino]"',
        refuses={"bf16": "it computes such a graph in bf16, not in f32: use openvino-bf16"},
    ),
    EngineSpec(
        name="openvino-bf16",
        device="cpu",
        open=OpenVinoEngine,
        probe=_probe,
        libraries=("openvino",),
        install='pip install "knet-deploy[openvino]"',
        computes={"fp32": "bf16", "fp16": "bf16", "int8": "int8, bf16"},
        rank=60,
    ),
)
