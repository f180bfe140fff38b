"""A bundle's graph becomes a TensorRT plan: on the device, or for TensorRT-RTX ahead of time.

One path for ``tensorrt`` 10.3 and newer, 11.x and ``tensorrt_rtx``. Networks are strongly typed:
precision is what the graph says, no flag of the builder. Needs neither torch nor onnx.
"""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec

from knet_export.tensorrt.audit import check_delivered, count, read_layers
from knet_runtime.atomic import check_folder, write_atomic
from knet_runtime.bundle.manifest import Kind
from knet_runtime.bundle.store import Bundle, check_own
from knet_runtime.engines.cuda import explain, plain
from knet_runtime.engines.hardware import this_gpu
from knet_runtime.engines.plan_store import (
    BuildOptions,
    PlanRecord,
    StoredPlan,
    digest,
    graph_hashes,
    plan_path,
    read_record,
    store_plan,
    timing_cache,
)
from knet_runtime.engines.tensorrt import load_tensorrt, new_log
from knet_runtime.errors import ConfigError, EngineError, EngineUnavailable

_log = logging.getLogger(__name__)

_DYNAMIC_INT8 = ("MatMulInteger", "ConvInteger", "DynamicQuantizeLinear")
_PRECISIONS = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16"}
# Lines of the parser that say no more than that there was an error, or that there is no GPU.
_EMPTY = re.compile(r"^\s*(false)?\s*$|Invalid Node - |cudaError 35")
_MIB = 1 << 20


def build_plan(
    bundle: Bundle,
    engine: str,
    kind: Kind,
    options: BuildOptions,
    *,
    targets: Sequence[str] = (),
    force: bool = False,
    on_progress: Callable[[], None] = lambda: None,
) -> tuple[StoredPlan, bool]:
    """Build the ``kind`` graph of ``bundle`` and keep it under its key; the plan, and whether it
    was built now (False: it stood there already, whole, and ``force`` was not asked for).

    ``targets`` ("sm86", ...) builds a TensorRT-RTX plan without a GPU for those architectures;
    without them it is for this machine's GPU, and what was built is looked into (``audit``).
    ``on_progress`` is called now and then while it builds; Ctrl-C ends it with nothing written.
    Raises ConfigError for options that contradict each other, EngineUnavailable without TensorRT
    or a GPU, EngineError with the reason when the graph cannot be built or comes out in another
    precision, OutputError when it cannot be written, as into a packaged bundle.
    """
    check_own(bundle)
    targets = _in_order(engine, targets)
    module = load_tensorrt(engine)
    _check_known(module, targets)
    gpu = None if targets else this_gpu()
    if not targets and gpu is None:
        raise EngineUnavailable(_no_gpu(engine))
    graph = bundle.graph(kind)
    record = PlanRecord(
        engine=engine,
        version=module.__version__,
        kind=kind,
        precision=graph.precision,
        files=graph_hashes(bundle, kind),
        gpu=gpu,
        targets=targets,
        options=options,
        sha256="",
        bytes=0,
        seconds=0.0,
        built="",
    )
    path = plan_path(bundle, record)
    if not force and (kept := _already_built(path)) is not None:
        return kept, False
    check_folder(path.parent)  # before minutes of work
    log = new_log(module)  # outlives all that was made with it
    start = time.monotonic()
    network = _Network(module, log, bundle.file(graph.path))
    timings = None
    if gpu is not None and engine == "tensorrt":  # TensorRT-RTX times nothing when it builds
        timings = timing_cache(bundle, engine, record.version, gpu.sm)
    plan = network.build(record, timings, on_progress)
    layers = None
    if gpu is not None:
        information = _inspect(module, log, plan)
        found = read_layers(information)
        check_delivered(found, network.precisions())
        layers = count(found)
    record = msgspec.structs.replace(
        record,
        sha256=digest(plan),
        bytes=len(plan),
        seconds=round(time.monotonic() - start, 2),
        built=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        layers=layers,
    )
    return store_plan(bundle, plan, record), True


class _Network:
    """A parsed graph and the builder that it belongs to."""

    def __init__(self, module: Any, log: Any, path: Path) -> None:
        self._module, self._log, self._path = module, log, path
        self._builder = module.Builder(log)
        if self._builder is None:
            raise EngineError(f"TensorRT cannot start: {explain(log.errors)}")
        # By its name: the bit is another one in each major release.
        typed = 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self.network = self._builder.create_network(typed)
        parser = module.OnnxParser(self.network, log)
        if not parser.parse_from_file(str(path)):
            errors = [parser.get_error(index) for index in range(parser.num_errors)]
            raise EngineError(parser_reason(path, errors))

    def build(
        self, record: PlanRecord, timings: Path | None, on_progress: Callable[[], None]
    ) -> bytes:
        module, options = self._module, record.options
        config = self._builder.create_builder_config()
        # On by default, and keeps 10 bits: what the graph has in float32 is there to be exact.
        config.clear_flag(module.BuilderFlag.TF32)
        config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
        if options.workspace is not None:
            pool = module.MemoryPoolType.WORKSPACE
            config.set_memory_pool_limit(pool, options.workspace * _MIB)
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        if record.engine == "tensorrt-rtx":
            _set_targets(module, config, record.targets)
        self._add_profile(config, record)
        if timings is not None:
            _use_timings(config, timings)
        with _interruptible(module, on_progress) as monitor:
            config.progress_monitor = monitor
            plan = self._builder.build_serialized_network(self.network, config)
        if plan is None:
            raise EngineError(
                f"{self._path} does not become a plan for {record.engine}: "
                f"{explain(self._log.errors)}"
            )
        if timings is not None:
            _keep_timings(config, timings)
        return bytes(plan)

    def _add_profile(self, config: Any, record: PlanRecord) -> None:
        image, wanted = self.network.get_input(0), record.options.profile
        profile = self._builder.create_optimization_profile()
        shapes = [
            (shape.batch, shape.height, shape.width, 3)
            for shape in (wanted.min, wanted.opt, wanted.max)
        ]
        profile.set_shape(image.name, *shapes)
        if config.add_optimization_profile(profile) < 0:
            raise EngineError(
                f"TensorRT refuses the shapes {wanted.min} to {wanted.max}: "
                f"{explain(self._log.errors)}"
            )

    def precisions(self) -> dict[str, str]:
        """Convolutions and products of the graph by name -> the precision of their first input;
        int8 where that comes out of a DequantizeLinear."""
        module = self._module
        types = module.LayerType
        dequantised: set[str] = set()
        found = {}
        for index in range(self.network.num_layers):
            layer = self.network.get_layer(index)
            if layer.type == types.DEQUANTIZE:
                dequantised.add(layer.get_output(0).name)
            elif layer.type in (types.CONVOLUTION, types.MATRIX_MULTIPLY):
                tensor = layer.get_input(0)
                kind = "int8" if tensor.name in dequantised else _PRECISIONS.get(tensor.dtype.name)
                if kind is not None:
                    found[layer.name] = kind
        return found


def parser_reason(path: Path, errors: Sequence[Any]) -> str:
    """The parser's first error as one line: node, operation, why, and what to try."""
    if not errors:
        return f"{path} cannot be parsed, and the parser gives no reason: export it again"
    error = errors[0]
    operator, node = error.node_operator(), error.node_name()
    if not operator:
        return f"{path} cannot be read as ONNX ({plain(error.desc())}): export it again"
    said = [plain(line) for line in error.desc().splitlines() if not _EMPTY.search(line)]
    why = said[0] if said else "TensorRT has no such operation"
    attempt = "run this bundle with --engine onnxruntime-cuda, or try a newer TensorRT"
    if operator in _DYNAMIC_INT8:
        attempt = "export with --precision int8, which quantises with fixed ranges (Q/DQ)"
    elif "UInt8" in why:
        attempt = "cast the image to float before anything else: export it again"
    elif "zero point" in why.lower():
        attempt = "quantise symmetrically to int8: export with --precision int8"
    return f"{path}: node {node} ({operator}) cannot be built: {why}; what to try: {attempt}"


def _in_order(engine: str, targets: Sequence[str]) -> tuple[str, ...]:
    if targets and engine != "tensorrt-rtx":
        raise ConfigError(
            f"--target is for TensorRT-RTX; {engine} builds on the GPU that the plan is to run on: "
            "leave --target out, or take --engine tensorrt-rtx"
        )
    return tuple(sorted(set(targets), key=lambda target: (len(target), target)))


def _no_gpu(engine: str) -> str:
    if engine == "tensorrt-rtx":
        return (
            "there is no NVIDIA GPU here, or no driver: name what the plan is for, such as "
            "--target sm86,sm89"
        )
    return (
        "there is no NVIDIA GPU here, or no driver: tensorrt builds on the device that the plan "
        "is to run on; TensorRT-RTX builds without one: --engine tensorrt-rtx --target sm86"
    )


def _check_known(module: Any, targets: Sequence[str]) -> None:
    known = module.ComputeCapability.__members__ if targets else ()
    for target in targets:
        if target.upper() not in known:
            able = ", ".join(name.lower() for name in known if name.startswith("SM"))
            raise ConfigError(f"--target {target}: this release builds for {able}")


def _set_targets(module: Any, config: Any, targets: Sequence[str]) -> None:
    names = [target.upper() for target in targets] or ["CURRENT"]
    config.num_compute_capabilities = len(names)  # before any is set
    for index, name in enumerate(names):
        config.set_compute_capability(module.ComputeCapability.__members__[name], index)


def _already_built(path: Path) -> StoredPlan | None:
    try:
        stored = StoredPlan(path, read_record(path))
        stored.read()
    except EngineError:
        return None
    return stored


def _use_timings(config: Any, path: Path) -> None:
    known = b""
    with contextlib.suppress(OSError):
        known = path.read_bytes()
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, False):  # of another release: start anew
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _keep_timings(config: Any, path: Path) -> None:
    try:
        write_atomic(path, bytes(config.get_timing_cache().serialize()))
    except OSError as error:
        _log.warning("the timing cache is not kept, the next build takes as long: %s", error)


def _inspect(module: Any, log: Any, plan: bytes) -> str:
    engine = module.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(f"the plan cannot be loaded here: {explain(log.errors)}")
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(module.LayerInformationFormat.JSON))


@contextlib.contextmanager
def _interruptible(module: Any, on_progress: Callable[[], None]) -> Iterator[Any]:
    """An ``IProgressMonitor`` with which SIGINT and SIGTERM end a build.

    TensorRT swallows exceptions of its callbacks. So a signal is only noted, the monitor asks
    TensorRT to stop, and when it has, the signal is raised again for whoever handled it before.
    """
    caught: list[int] = []

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]  # known at run time only
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            _log.debug("TensorRT: %s", phase)

        def step_complete(self, phase: str, step: int) -> bool:
            on_progress()
            return not caught

        def phase_finish(self, phase: str) -> None:
            pass

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)

    before: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:  # not in the main thread, where signals never arrive anyway
        pass
    try:
        yield Monitor()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        if caught:
            signal.raise_signal(caught[0])
