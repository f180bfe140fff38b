"""Two ONNX graphs of one model laid beside each other: which nodes are the same, which are not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from knet_export.graph.onnx_graph import OnnxGraph

# Nodes that change a type: another precision has others, and they are no step of the model.
_TYPE_NODES = ("Cast", "QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True, eq=False)
class Pair:
    """A node of the reference's graph, and the examined graph's node that does the same."""

    reference: onnx.NodeProto
    found: onnx.NodeProto

    @property
    def module(self) -> str:
        """The module that it comes from; empty in a graph of unnamed nodes."""
        return scope(self.reference)


@dataclass(frozen=True)
class Parting:
    """A node that only one of the graphs has; the pair ``before`` is the next that both have."""

    before: int
    missing: bool  # from the examined graph; else it is the reference that lacks it
    node: str
    module: str | None  # the module that the other graph lacks altogether


@dataclass(frozen=True, eq=False)
class Alignment:
    """Pairs in the graphs' own order, and where the graphs part."""

    pairs: tuple[Pair, ...]
    partings: tuple[Parting, ...]


def scope(node: onnx.NodeProto) -> str:
    """The module that a node of ``to_onnx`` comes from. ``precision`` wraps a normalisation in a
    module of its own, which is left out."""
    return node.name.rpartition("/")[0].removesuffix(".norm")


def align(reference: OnnxGraph, found: OnnxGraph) -> Alignment:
    """Pair the nodes by kind and module, in their order."""
    ours, theirs = _steps(reference), _steps(found)
    keys = [[(node.op_type, scope(node)) for node in nodes] for nodes in (ours, theirs)]
    pairs: list[Pair] = []
    alone: list[tuple[int, bool, onnx.NodeProto]] = []
    matcher = SequenceMatcher(None, keys[0], keys[1], autojunk=False)
    for kind, first, last, other_first, other_last in matcher.get_opcodes():
        if kind == "equal":
            mates = zip(ours[first:last], theirs[other_first:other_last], strict=True)
            pairs += [Pair(*mate) for mate in mates]
            continue
        alone += [(len(pairs), True, node) for node in ours[first:last]]
        alone += [(len(pairs), False, node) for node in theirs[other_first:other_last]]
    scopes = [{scope(node) for node in nodes} for nodes in (ours, theirs)]
    return Alignment(
        tuple(pairs),
        tuple(
            Parting(before, missing, node.name, _absent(scope(node), scopes[1 if missing else 0]))
            for before, missing, node in alone
        ),
    )


def static_differences(
    pair: Pair, reference: OnnxGraph, found: OnnxGraph, rounding: float
) -> Iterator[str]:
    """In words: attributes of a pair that differ, and weights that differ by more than ``rounding``
    times the largest."""
    before, after = (
        {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        for node in (pair.reference, pair.found)
    )
    for name in sorted(before.keys() | after.keys()):
        was, now = before.get(name), after.get(name)
        if was != now:
            yield f"its {name} is {_word(now)}, in the reference {_word(was)}"
    stored, others = reference.constants(), found.constants()
    for name, other in zip(pair.reference.input, pair.found.input, strict=False):
        if name not in stored or other not in others:
            continue
        values = reference.value(stored[name]), found.value(others[other])
        if difference := _difference(*values, rounding):
            yield f"its constant {other} {difference}"


def _steps(graph: OnnxGraph) -> list[onnx.NodeProto]:
    return [node for node in graph.nodes if node.op_type not in _TYPE_NODES]


def _absent(name: str, present: set[str]) -> str | None:
    """The outermost module on the way to ``name`` that no node of ``present`` is in."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        outer = ".".join(parts[:end])
        if not any(other == outer or other.startswith(f"{outer}.") for other in present):
            return outer
    return None


def _difference(
    expected: NDArray[np.generic], found: NDArray[np.generic], rounding: float
) -> str | None:
    if expected.shape != found.shape:
        return f"is of shape {found.shape}, in the reference {expected.shape}"
    if not expected.size:
        return None
    before, after = expected.astype(np.float64), found.astype(np.float64)
    off = ~(np.abs(after - before) <= rounding * max(float(np.abs(before).max()), 1e-30))
    if not off.any():
        return None
    place = tuple(int(axis[0]) for axis in np.nonzero(off))
    where = f"[{', '.join(map(str, place))}]" if place else "its value"
    return (
        f"differs in {int(off.sum())} of {off.size} values, first at {where}: "
        f"{after[place]:.6g}, in the reference {before[place]:.6g}"
    )


def _word(value: object) -> str:
    return repr(value.decode()) if isinstance(value, bytes) else str(value)


def modules_apart(partings: Sequence[Parting]) -> list[str]:
    """In words, whole modules first: what only one of the graphs has."""
    words: dict[str, None] = {}
    for parting in sorted(partings, key=lambda one: one.module is None):
        what = parting.module or parting.node
        verb = "lacks" if parting.missing else "has, and the reference has not,"
        words[f"the bundle's graph {verb} {what}"] = None
    return list(words)
