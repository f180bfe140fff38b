"""Rounds of keeping a part of a graph in fp32: how much of it has to be, for it to be right?

The first part's tensors are taken from the fp32 graph and fed to the rest of the graph of lower
precision. A prefix that is long enough brings the result inside the tolerance; its length is
halved from both sides until the one tensor is found that makes the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from knet_export.parity.align import Alignment, Graph
from knet_runtime.manifest import Tolerance
from knet_runtime.metrics import agreement


def keep_halves(
    expected: Graph,
    found: Graph,
    aligned: Alignment,
    feed: dict[str, NDArray[Any]],
    tolerance: Tolerance,
    on_step: Callable[[str], None],
) -> str:
    """The finding in words: the first tensors of ``found`` that must be fp32, so that its result on
    ``feed`` is inside ``tolerance`` of that of ``expected``."""
    pairs = aligned.pairs
    (wanted,) = expected.run(feed, [expected.model.graph.output[0].name])

    def inside(count: int) -> bool:
        result = with_prefix(expected, found, aligned, feed, count)
        good, words = _judge(wanted, result, tolerance)
        state = "inside" if good else "outside"
        on_step(f"bisect: first {count} of {len(pairs)} tensors in fp32: {words}, {state}")
        return good

    if inside(0):
        return "this picture alone is inside the tolerance: nothing has to be kept in fp32 for it"
    low, high = 0, len(pairs)  # outside with ``low``, inside with ``high``: that is all of them
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if inside(middle) else (middle, high)
    pair = pairs[high - 1]
    return (
        f"it is inside the tolerance once the first {high} of {len(pairs)} tensors are fp32; the "
        f"last of them is {pair.artefact.output[0]} (module {pair.module or 'unnamed'})"
    )


def with_prefix(
    expected: Graph,
    found: Graph,
    aligned: Alignment,
    feed: dict[str, NDArray[Any]],
    count: int,
) -> NDArray[Any]:
    """The result of ``found`` when its first ``count`` paired tensors are those of ``expected``."""
    (output,) = found.model.graph.output
    mates = {
        after: before
        for pair in aligned.pairs[:count]
        for after, before in zip(pair.artefact.output, pair.reference.output, strict=True)
        if after != output.name
    }
    nodes, fed = _rest(found.model.graph, set(mates))
    types = dict(zip(fed, found.run(feed, fed), strict=True)) if fed else {}
    values = expected.run(feed, [mates[name] for name in fed]) if fed else []
    inputs = {
        name: value.astype(types[name].dtype) for name, value in zip(fed, values, strict=True)
    }
    rest = onnx.ModelProto()
    rest.CopyFrom(found.model)
    del rest.graph.node[:]
    rest.graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in rest.graph.initializer if tensor.name in read]
    del rest.graph.initializer[:]
    rest.graph.initializer.extend(kept)
    del rest.graph.value_info[:]
    rest.graph.input.extend(
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim
        )
        for name, value in inputs.items()
    )
    unused = [tensor for tensor in rest.graph.input if tensor.name not in read]
    for tensor in unused:
        rest.graph.input.remove(tensor)
    needed = {name: value for name, value in {**feed, **inputs}.items() if name in read}
    (result,) = Graph(rest, found.folder).run(needed, [output.name])
    return result


def _rest(graph: onnx.GraphProto, given: set[str]) -> tuple[list[onnx.NodeProto], list[str]]:
    """The nodes that are still needed for the graph's output when the tensors ``given`` are there,
    and those of ``given`` that they read."""
    makers = {name: node for node in graph.node for name in node.output}
    wanted, needed = [graph.output[0].name], set()
    fed: dict[str, None] = {}
    while wanted:
        name = wanted.pop()
        if name in given:
            fed[name] = None
        elif name in makers and makers[name].output[0] not in needed:
            needed.add(makers[name].output[0])
            wanted += makers[name].input
    return [node for node in graph.node if node.output[0] in needed], list(fed)


def _judge(expected: NDArray[Any], found: NDArray[Any], tolerance: Tolerance) -> tuple[bool, str]:
    if not np.issubdtype(expected.dtype, np.floating):  # class maps
        agreed = agreement(expected, found)
        return agreed >= tolerance.agreement, f"agreement {agreed:.5f}"
    worst = float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-30))
    agreed = agreement(expected.argmax(1), found.argmax(1))
    good = worst <= tolerance.max_logit_diff and agreed >= tolerance.agreement
    return good, f"largest logit difference {worst:.1e}, agreement {agreed:.5f}"
