"""Which files an ONNX graph reads weights from, asked of its bytes: the base install has no onnx.

An ONNX file is a protobuf message. Of it only those fields are followed that lead to tensors; a
tensor kept elsewhere has ``external_data`` entries, of which "location" names the file.
"""

from __future__ import annotations

from mmap import mmap

_MOST_FIELDS = 500_000  # that are looked at; the packaged graph has 8,000
_ENTRY = "StringStringEntryProto"

# Messages by name, and their fields that hold, or lead to, tensors.
TENSOR_FIELDS: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "TensorProto": {13: _ENTRY},
    _ENTRY: {},
}
_OP_TYPE = 4  # of NodeProto
_COMPILED = b"EPContext"  # ONNX Runtime's node that names a file of compiled code
_KEY, _VALUE = 1, 2  # of an entry


def external_locations(graph: bytes | mmap) -> set[str]:
    """The files that the graph names, as they stand in it, relative to its own folder.

    Those of every tensor count, whether it is used or not and wherever it is: initializers,
    constants, subgraphs, functions, sparse tensors, training. Raises ValueError for bytes that are
    no ONNX file, one with compiled code of some device, and one of more than 500,000 fields.
    """
    found: set[str] = set()
    left = _MOST_FIELDS
    waiting = [("ModelProto", 0, len(graph))]
    while waiting:
        message, at, end = waiting.pop()
        children = TENSOR_FIELDS[message]
        texts: dict[int, list[bytes]] = {_KEY: [], _VALUE: []}
        while at < end:
            left -= 1
            if left < 0:
                raise ValueError(f"it has more than {_MOST_FIELDS:,} fields")
            number, start, at = _field(graph, at, end)
            if start < 0:
                continue
            if number in children:
                waiting.append((children[number], start, at))
            elif message == _ENTRY and number in texts:
                texts[number].append(graph[start:at])
            elif message == "NodeProto" and number == _OP_TYPE and graph[start:at] == _COMPILED:
                raise ValueError("it holds compiled code (EPContext), which no hash covers")
        # Of fields that are given twice parsers take the last one; here each counts.
        if b"location" in texts[_KEY]:
            values = texts[_VALUE] or [b""]
            found.update(value.decode("utf-8", "surrogateescape") for value in values)
    return found


def _field(graph: bytes | mmap, at: int, end: int) -> tuple[int, int, int]:
    """The number of the field at ``at``, where its text or message begins (-1: it is a number), and
    where it ends. ValueError for what no writer of ONNX writes."""
    tag, at = _varint(graph, at, end, 5)
    number, wire = tag >> 3, tag & 7
    start = -1
    if wire == 0:
        _, at = _varint(graph, at, end, 10)
    elif wire == 2:
        size, start = _varint(graph, at, end, 5)
        at = start + size
    elif wire in (1, 5):
        at += 8 if wire == 1 else 4
    else:
        at = end + 1
    if not number or number >= 1 << 29 or at > end:
        raise ValueError("it is no ONNX file, or a damaged one")
    return number, start, at


def _varint(graph: bytes | mmap, at: int, end: int, most: int) -> tuple[int, int]:
    """The number at ``at``, of at most ``most`` bytes and before ``end``, and where it ends."""
    if at < end and (value := graph[at]) < 128:
        return value, at + 1
    value = 0
    for shift, byte in enumerate(graph[at : min(end, at + most)]):
        value |= (byte & 127) << 7 * shift
        if byte < 128:
            return value, at + shift + 1
    raise ValueError("it is no ONNX file, or a damaged one")
