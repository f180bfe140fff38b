"""The engines that run a bundle's graph, behind one protocol, and which of them runs a bundle.

Every module of this package may define engines in ``SPECS``; whoever needs a list of engines asks
here. Importing this imports no engine's library: those are imported when an engine is opened. An
engine is never taken on trust: asking for one and silently getting another, or another precision,
is an error, and "auto" takes only what ``verify`` has passed for this bundle, here.
"""

from __future__ import annotations

import logging
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import msgspec

from knet_runtime.bundle.manifest import Graph, Kind
from knet_runtime.bundle.store import Bundle
from knet_runtime.engines.base import Engine as Engine, EngineSpec as EngineSpec
from knet_runtime.engines.hardware import gpu_name, processor_name
from knet_runtime.errors import EngineError, EngineUnavailable, ParityError

_log = logging.getLogger(__name__)


class EngineStatus(msgspec.Struct, frozen=True):
    """Whether an engine runs on this machine, and in words why (not) and what to do."""

    name: str
    available: bool
    detail: str


def engine_specs() -> dict[str, EngineSpec]:
    """All engines by name, in the order of the files that define them."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    found = (import_module(f"{__name__}.{module}") for module in modules)
    return {spec.name: spec for module in found for spec in getattr(module, "SPECS", ())}


def engine_spec(name: str) -> EngineSpec:
    """The engine of this name; EngineError, with all names, where there is none."""
    specs = engine_specs()
    if name not in specs:
        raise EngineError(f"there is no engine {name!r}: use auto, {', '.join(specs)}")
    return specs[name]


def auto_order() -> list[EngineSpec]:
    """What "auto" tries, in its order."""
    ranked = [(spec.rank, spec) for spec in engine_specs().values() if spec.rank is not None]
    return [spec for _, spec in sorted(ranked, key=lambda pair: pair[0])]


def default_graph(bundle: Bundle, engine: str) -> Kind:
    """What ``engine`` runs when nobody says: GPUs the class map, which is less to bring back, where
    the bundle has it; processors the logits, for which the runtime's postprocessing is faster."""
    wanted = engine_spec(engine).graph
    return wanted if any(graph.kind == wanted for graph in bundle.manifest.graphs) else "logits"


def unverified_reason(graph: Graph, engine: str, device: str) -> str | None:
    """Why ``graph`` on this engine and device is not proven right; None if verify passed it.

    What an engine that verifies every export passed on one machine holds for the others, unless it
    failed there.
    """
    found = graph.parity_on(engine, device)
    if found is not None:
        return None if found.passed else f"it did not pass verify on {device}"
    passed = any(parity.passed for parity in graph.parity if parity.engine == engine)
    if passed and engine_spec(engine).verified_by_export:
        return None
    return f"it was never verified on {device}"


def why_not_auto(bundle: Bundle, engine: str, kind: Kind | None = None) -> str | None:
    """Why "auto" may not take ``engine`` here; None if it may. An engine that verifies every export
    needs no record, but one that says that it failed counts."""
    spec = engine_spec(engine)
    device = processor_name() if spec.device == "cpu" else gpu_name()
    if device is None:
        return "there is no NVIDIA GPU, or no driver for it"
    graph = bundle.graph(kind or default_graph(bundle, engine))
    if spec.verified_by_export and graph.parity_on(engine, device) is None:
        return None
    return unverified_reason(graph, engine, device)


def waits_for_verify(bundle: Bundle, engine: str) -> str | None:
    """The first engine before ``engine`` in auto's order that works here, and was never verified
    here with this bundle; None where there is none."""
    for spec in auto_order():
        if spec.name == engine:
            break
        device = processor_name() if spec.device == "cpu" else gpu_name()
        if device is None or bundle.manifest.precision in spec.refuses:
            continue
        graph = bundle.graph(default_graph(bundle, spec.name))
        if graph.parity_on(spec.name, device) is None and probe_engine(spec).available:
            return spec.name
    return None


def open_engine(bundle: Bundle, engine: str = "auto", kind: Kind | None = None) -> Engine:
    """Load the bundle on ``engine``, or on the first that "auto" may take here.

    ``kind`` says which of its graphs; None leaves it to the engine (``default_graph``).
    Raises EngineUnavailable when the engine cannot run here (its text says what to install),
    EngineError when it is unknown, cannot take the bundle's precision or the graph is not what the
    manifest says, and ParityError when "auto" finds no engine that it may take.
    """
    if engine == "auto":
        return _open_best(bundle, kind)
    opened = _open(bundle, engine_spec(engine), kind)
    _log.info("engine %s: asked for", engine)
    return opened


def _open(bundle: Bundle, spec: EngineSpec, kind: Kind | None) -> Engine:
    precision = bundle.manifest.precision
    if reason := spec.refuses.get(precision):
        raise EngineError(f"{spec.name} cannot run {bundle.path}, a {precision} bundle: {reason}")
    with _imports(spec):
        return spec.open(bundle, spec.name, kind or default_graph(bundle, spec.name))


def _open_best(bundle: Bundle, kind: Kind | None) -> Engine:
    order = auto_order()
    for spec in order:
        if reason := why_not_auto(bundle, spec.name, kind):
            _log.info("engine %s: not taken, %s", spec.name, reason)
            continue
        try:
            opened = _open(bundle, spec, kind)
        except EngineError as error:
            if spec is order[-1]:
                raise
            # It was verified here, so its owner expects it: say it aloud.
            _log.warning("engine %s does not work: %s", spec.name, error)
        else:
            _log.info("engine %s: the first that may be taken here", spec.name)
            return opened
    raise ParityError(
        f"{bundle.path} passes verify on no engine of this machine, so none is taken by itself: "
        "name one with --engine, to verify it again or to run it all the same"
    )


def probe_engines() -> list[EngineStatus]:
    """Try every engine on something tiny."""
    return [probe_engine(spec) for spec in engine_specs().values()]


def probe_engine(spec: EngineSpec) -> EngineStatus:
    """Try one engine on something tiny."""
    try:
        with _imports(spec):
            available, detail = True, spec.probe(spec.name)
    except EngineError as error:
        available, detail = False, str(error)
    if conflict := spec.conflict():
        detail = f"{detail}; {conflict}"
    return EngineStatus(spec.name, available, detail)


@contextmanager
def _imports(spec: EngineSpec) -> Iterator[None]:
    """What engines run on is imported when they are opened: a broken one must not break the
    rest."""
    try:
        yield
    except ImportError as error:
        raise EngineUnavailable(
            f"{spec.libraries[0]} cannot be imported ({error}): {spec.conflict() or spec.install}"
        ) from error
