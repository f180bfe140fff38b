"""Which layers of a TensorRT plan really run in which precision.

The engine inspector describes layers in JSON, but no field says in what they compute, and the form
has changed between releases. What decides, in this order: the tactic's name (kernels are named
after their arithmetic), else the types of the tensors that go in and out. A fused region that
casts inside has half-precision borders and may compute in float32: it counts as undecided. The
graph's own types are the contract, the inspector is evidence for it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import msgspec

from knet_runtime.errors import EngineError

UNDECIDED = "undecided"
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
# In kernels' names, as a word between underscores or glued to a size: "f16f16_f32", "xmma_i8i8".
_TACTIC = (
    ("int8", r"i8i8|int8|imma|_i8_|s8s8"),
    ("fp8", r"e4m3|fp8"),
    ("bf16", r"bf16"),
    ("tf32", r"tf32"),
    ("fp16", r"f16|fp16|hmma|h884|h1688|h16816|half"),
    ("fp32", r"f32|fp32|sgemm|ffma|scudnn"),
)
_COMPUTING = re.compile(r"gemm|conv|xmma|cudnn|cublas|cutlass|fmha|sm\d+_", re.IGNORECASE)
# Words in a tensor's description, longest first: "BFloat16" holds "Float".
_TYPES = (
    ("bf16", r"\bbf(loat)?16\b"),
    ("fp8", r"\bfp8\b|\be4m3\b"),
    ("fp16", r"\bhalf\b|\bfp16\b|\bfloat16\b"),
    ("fp32", r"\bfloat\b|\bfp32\b|\bfloat32\b"),
    ("int8", r"\bint8\b"),
)
_FINEST_FIRST = ("int8", "fp8", "fp16", "bf16", "fp32")


class Layer(msgspec.Struct, frozen=True):
    """A layer of a plan, the precision it computes in, and the ONNX nodes it was made from."""

    name: str
    type: str
    precision: str
    nodes: tuple[str, ...]


def read_layers(information: str) -> list[Layer]:
    """The inspector's JSON of a whole plan, of TensorRT 10, 11 or RTX.

    Raises EngineError when it is none, or holds no more than names.
    """
    try:
        layers = json.loads(information)["Layers"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise EngineError(
            f"the engine inspector's answer has another form than known ({error!r}): report it"
        ) from error
    if not layers or not all(isinstance(layer, dict) for layer in layers):
        raise EngineError(
            "the engine inspector gives names only: the plan was built without details"
        )
    return [
        Layer(
            name=str(layer.get("Name", "")),
            type=str(layer.get("LayerType", "unknown")),
            precision=_precision(layer),
            nodes=tuple(_NODE.findall(str(layer.get("Metadata", "")))),
        )
        for layer in layers
    ]


def count(layers: list[Layer]) -> dict[str, int]:
    """How many layers there are of each "type precision"."""
    found = Counter(f"{layer.type} {layer.precision}" for layer in layers)
    return dict(sorted(found.items()))


def check_delivered(layers: list[Layer], wanted: Mapping[str, str]) -> None:
    """Hold a plan to the graph: ``wanted`` gives convolutions and products (ONNX nodes) the
    precision that their tensors have in the graph.

    fp32, fp16 and bf16 must be what each of them runs in. Q/DQ nodes allow int8 and do not force
    it, so of the nodes between them one at least must run in int8. Raises EngineError.
    """
    others = []
    for layer in layers:
        for node in layer.nodes:
            want = wanted.get(node)
            if want in (None, "int8") or layer.precision in (UNDECIDED, want):
                continue
            others.append(f"{node} ({want}) runs in {layer.precision}")
    if others:
        raise EngineError(
            f"the plan does not have the precision of its graph: {'; '.join(others[:3])}"
            f"{f' and {len(others) - 3} more' if len(others) > 3 else ''}; it was not kept: "
            "use another release of TensorRT, or export in another precision"
        )
    quantised = "int8" in wanted.values()
    if quantised and not any(layer.precision == "int8" for layer in layers):
        raise EngineError(
            "the graph is quantised, but no layer of the plan runs in int8; it was not kept: "
            "this GPU or release does not do it, export with --precision fp16"
        )


def _precision(layer: dict[str, Any]) -> str:
    tactic = str(layer.get("TacticName", ""))
    if _COMPUTING.search(tactic):
        for precision, pattern in _TACTIC:
            if re.search(pattern, tactic, re.IGNORECASE):
                return precision
    tensors = [*_parts(layer, "Inputs"), *_parts(layer, "Outputs"), *_parts(layer, "Constants")]
    types = {kind for tensor in tensors if (kind := _type(tensor))}
    fused = "__myl" in str(layer.get("Name", "")) and "cast" in str(layer.get("Name", "")).lower()
    if not types or (fused and types != {"fp32"}):
        return UNDECIDED
    inputs = {kind for tensor in _parts(layer, "Inputs") if (kind := _type(tensor))} or types
    return next((kind for kind in _FINEST_FIRST if kind in inputs), UNDECIDED)


def _parts(layer: dict[str, Any], key: str) -> list[dict[str, Any]]:
    parts = layer.get(key)
    return [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []


def _type(tensor: dict[str, Any]) -> str | None:
    """The numeric type of a tensor; None for what does not compute (indices, Bool, UInt8)."""
    for key in ("Datatype", "DataType", "Format/Datatype", "Format"):
        if text := tensor.get(key):
            for kind, pattern in _TYPES:
                if re.search(pattern, str(text), re.IGNORECASE):
                    return kind
            return None
    return None
