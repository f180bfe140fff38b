"""Exports that need not trace a network again: that takes most of an export's time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

from knet_runtime.bundle.store import Bundle


@contextmanager
def traced_before(bundle: Bundle) -> Iterator[None]:
    """Whoever exports the network of ``bundle`` meanwhile, at its sizes and in its precision, is
    given its graph by the tracer; all that follows is done as ever."""
    from onnxscript import ir

    from knet_export.graph import to_onnx

    def trace(*_: object) -> SimpleNamespace:
        model = ir.load(bundle.file(to_onnx.LOGITS_NAME))
        for node in model.graph:
            module, _, _ = (node.name or "").partition("/")
            node.metadata_props[to_onnx._SCOPES] = repr([module, node.op_type])
        return SimpleNamespace(model=model)

    with mock.patch.object(to_onnx, "_trace", trace):
        yield
