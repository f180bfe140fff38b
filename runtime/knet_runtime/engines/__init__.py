"""The engines that run a bundle's graph, behind one protocol: ``open_engine`` opens one, and a
module of this package that names ``SPECS`` adds one.

Importing this imports no engine's library: those are imported when an engine is opened.
"""

from knet_runtime.engines.base import Engine, EngineSpec
from knet_runtime.engines.registry import (
    EngineStatus,
    default_graph,
    engine_spec,
    engine_specs,
    open_engine,
    probe_engine,
    probe_engines,
    unverified_reason,
    why_auto,
)

__all__ = [
    "Engine",
    "EngineSpec",
    "EngineStatus",
    "default_graph",
    "engine_spec",
    "engine_specs",
    "open_engine",
    "probe_engine",
    "probe_engines",
    "unverified_reason",
    "why_auto",
]
