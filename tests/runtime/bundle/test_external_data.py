"""The weights that a graph reads are those that its manifest lists, wherever they are named."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError, Message
from onnx import TensorProto, helper, numpy_helper

from knet_runtime.bundle.external_data import TENSOR_FIELDS, external_locations
from knet_runtime.bundle.manifest import Manifest
from knet_runtime.bundle.store import Bundle, open_bundle, write_bundle
from knet_runtime.errors import BundleError

WEIGHTS = np.zeros((3, 3, 4, 4), np.float32)
WEIGHTS[np.arange(3), np.arange(3)] = 1 / 16


def kept_in(location: str, name: str = "kernel") -> TensorProto:
    """The colour model's weights, in that file."""
    tensor = TensorProto(name=name, dims=WEIGHTS.shape, data_type=TensorProto.FLOAT)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def graph_with(tensor: TensorProto) -> onnx.GraphProto:
    return onnx.GraphProto(name="part", initializer=[tensor])


def node_with(**attributes: Any) -> onnx.NodeProto:
    node = onnx.NodeProto(op_type="Identity")
    for name, value in attributes.items():
        attribute = node.attribute.add(name="value")
        field = getattr(attribute, name)
        field.append(value) if hasattr(field, "append") else field.CopyFrom(value)
    return node


def sparse(**fields: TensorProto) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(**fields)


PLACES: dict[str, Callable[[onnx.ModelProto, TensorProto], Any]] = {
    "initializer": lambda m, t: m.graph.initializer.append(t),
    "sparse values": lambda m, t: m.graph.sparse_initializer.append(sparse(values=t)),
    "sparse indices": lambda m, t: m.graph.sparse_initializer.append(sparse(indices=t)),
    "constant": lambda m, t: m.graph.node.append(node_with(t=t)),
    "constants": lambda m, t: m.graph.node.append(node_with(tensors=t)),
    "sparse constant": lambda m, t: m.graph.node.append(node_with(sparse_tensor=sparse(values=t))),
    "sparse constants": lambda m, t: m.graph.node.append(
        node_with(sparse_tensors=sparse(values=t))
    ),
    "branch": lambda m, t: m.graph.node.append(node_with(g=graph_with(t))),
    "branches": lambda m, t: m.graph.node.append(node_with(graphs=graph_with(t))),
    "branch of a branch": lambda m, t: m.graph.node.append(
        node_with(g=onnx.GraphProto(node=[node_with(g=onnx.GraphProto(node=[node_with(t=t)]))]))
    ),
    "function": lambda m, t: m.functions.add(name="f").node.append(node_with(t=t)),
    "default of a function": lambda m, t: (
        m.functions.add(name="f").attribute_proto.add(name="a").t.CopyFrom(t)
    ),
    "training": lambda m, t: m.training_info.add().algorithm.CopyFrom(graph_with(t)),
    "start of training": lambda m, t: m.training_info.add().initialization.CopyFrom(graph_with(t)),
}


def test_every_field_that_leads_to_a_tensor_is_followed() -> None:
    """Held to the descriptors of the installed onnx, which a newer one may extend."""

    def reaches(message: Descriptor, seen: tuple[str, ...] = ()) -> bool:
        if message.name == "TensorProto":
            return True
        children = [field.message_type for field in message.fields if field.message_type]
        return any(
            reaches(child, (*seen, message.name)) for child in children if child.name not in seen
        )

    waiting, found = [onnx.ModelProto.DESCRIPTOR], {}
    while waiting:
        message = waiting.pop()
        leading = {f.number: f.message_type for f in message.fields if f.message_type}
        leading = {number: child for number, child in leading.items() if reaches(child)}
        found[message.name] = {number: child.name for number, child in leading.items()}
        waiting += [child for child in leading.values() if child.name not in found]
    entries = TensorProto.DESCRIPTOR.fields_by_name["external_data"]
    found["TensorProto"] = {entries.number: entries.message_type.name}
    found[entries.message_type.name] = {}
    assert found == TENSOR_FIELDS


@pytest.mark.parametrize("place", PLACES)
def test_weights_named_anywhere_in_a_graph_are_found_and_must_be_listed(
    make_bundle: Callable[..., Bundle], colour_model: Callable[..., bytes], place: str
) -> None:
    model = onnx.load_model_from_string(colour_model())
    PLACES[place](model, kept_in("unlisted.bin"))
    assert external_locations(model.SerializeToString()) == {"unlisted.bin"}
    with pytest.raises(BundleError, match=r"model\.onnx reads weights from 'unlisted\.bin'"):
        make_bundle(model.SerializeToString())


def external_model(colour_model: Callable[..., bytes], location: str) -> bytes:
    model = onnx.load_model_from_string(colour_model())
    model.graph.initializer[0].CopyFrom(kept_in(location))
    return bytes(model.SerializeToString())


def bundle_of(
    folder: Path, manifest: Manifest, files: dict[str, bytes], stated: tuple[str, ...]
) -> Bundle:
    (path,) = (name for name in files if name.endswith(".onnx"))
    graph = msgspec.structs.replace(manifest.graphs[0], path=path, external_data=stated)
    changed = msgspec.structs.replace(manifest, graphs=(graph,))
    return write_bundle(folder / "x.knet", changed, files)


@pytest.mark.parametrize("folder", ["", "graphs/"])
def test_listed_weights_beside_the_graph_are_taken_and_read(
    tmp_path: Path, manifest: Manifest, colour_model: Callable[..., bytes], folder: str
) -> None:
    from knet_runtime.engines import open_engine

    model, weights = external_model(colour_model, "w.bin"), WEIGHTS.tobytes()
    files = {f"{folder}model.onnx": model, f"{folder}w.bin": weights}
    bundle = bundle_of(tmp_path, manifest, files, (f"{folder}w.bin",))
    with open_engine(open_bundle(bundle.path), "onnxruntime-cpu") as engine:
        logits = engine.infer(np.full((1, 16, 24, 3), 40, np.uint8))["logits"]
    assert logits == pytest.approx(40)


@pytest.mark.parametrize(
    "location",
    ["../w.bin", "./w.bin", "a/../w.bin", "W.BIN", "w.bin/", "w.bin\0", "", "*/_ORT_MEM_ADDR_/*"],
)
def test_weights_are_spelt_as_the_manifest_lists_them(
    tmp_path: Path, manifest: Manifest, colour_model: Callable[..., bytes], location: str
) -> None:
    (tmp_path / "w.bin").write_bytes(WEIGHTS.tobytes())
    model = external_model(colour_model, location)
    files = {"model.onnx": model, "w.bin": WEIGHTS.tobytes()}
    with pytest.raises(BundleError, match=r"model\.onnx reads weights from") as caught:
        bundle_of(tmp_path, manifest, files, ("w.bin",))
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "x.knet").exists()


def test_an_absolute_path_is_refused(
    tmp_path: Path, manifest: Manifest, colour_model: Callable[..., bytes]
) -> None:
    (tmp_path / "w.bin").write_bytes(WEIGHTS.tobytes())
    model = external_model(colour_model, str(tmp_path / "w.bin"))
    with pytest.raises(BundleError, match=r"reads weights from '/"):
        bundle_of(tmp_path, manifest, {"model.onnx": model}, ())


def test_weights_that_are_listed_for_no_graph_are_refused(
    tmp_path: Path, manifest: Manifest, colour_model: Callable[..., bytes]
) -> None:
    """They would be hashed, and be no part of the model's id."""
    files = {"model.onnx": external_model(colour_model, "w.bin"), "w.bin": WEIGHTS.tobytes()}
    with pytest.raises(BundleError, match=r"'w\.bin', which the manifest does not list as its ext"):
        bundle_of(tmp_path, manifest, files, ())


@pytest.mark.parametrize("name", ["model.onnx", "w.bin"])
def test_a_graph_and_its_weights_are_no_links(
    tmp_path: Path, manifest: Manifest, colour_model: Callable[..., bytes], name: str
) -> None:
    files = {"model.onnx": external_model(colour_model, "w.bin"), "w.bin": WEIGHTS.tobytes()}
    bundle = bundle_of(tmp_path, manifest, files, ("w.bin",))
    (bundle.path / name).rename(bundle.path / "real")
    (bundle.path / name).symlink_to("real")
    with pytest.raises(BundleError, match=f"{name} is or goes through a link"):
        open_bundle(bundle.path)


def test_a_name_that_engines_take_for_another_format_is_refused(
    tmp_path: Path, manifest: Manifest, colour_model: Callable[..., bytes]
) -> None:
    for path in ("model.ort", "model.xml", "model"):
        graph = msgspec.structs.replace(manifest.graphs[0], path=path)
        changed = msgspec.structs.replace(manifest, graphs=(graph,))
        with pytest.raises(BundleError, match=f"{path} is a graph and must end in .onnx"):
            write_bundle(tmp_path / "x.knet", changed, {path: colour_model()})


def test_a_location_that_is_given_in_pieces_is_found() -> None:
    """Parsers merge a message that is given twice, and take the last of two texts."""

    def field(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2, len(data)]) + data

    entry = field(1, b"offset") + field(2, b"a.bin") + field(1, b"location") + field(2, b"b.bin")
    twice = field(5, field(1, b"value") + field(5, b"\x70\x01") + field(5, field(13, entry)))
    model = field(7, field(1, twice))
    parsed = onnx.load_model_from_string(model).graph.node[0].attribute[0].t
    assert parsed.data_location == TensorProto.EXTERNAL
    assert parsed.external_data[0].value == "b.bin"
    assert external_locations(model) == {"a.bin", "b.bin"}


def test_a_node_of_compiled_code_is_refused(
    make_bundle: Callable[..., Bundle], colour_model: Callable[..., bytes]
) -> None:
    model = onnx.load_model_from_string(colour_model())
    model.graph.node.append(helper.make_node("EPContext", [], [], domain="com.microsoft"))
    with pytest.raises(BundleError, match="compiled code"):
        make_bundle(model.SerializeToString())


@pytest.mark.parametrize(
    "data",
    [b"words", b"<?xml version='1.0'?><net/>", b"\0" * 8, b"\x3a", b"\x3a\x05abc", b"\x3b\x3c",
     b"\x18\x00\x00\x00ORTM", b"\x08" + b"\xff" * 11, b"\x3a\xff\xff\xff\xff\xff\x01",
     b"\x08\x01" * 500_001],
    ids=range(10),
)  # fmt: skip
def test_what_is_no_onnx_file_is_refused(make_bundle: Callable[..., Bundle], data: bytes) -> None:
    with pytest.raises(BundleError, match=r"model\.onnx cannot be taken: it ") as caught:
        make_bundle(data)
    assert len(str(caught.value).splitlines()) == 1


def locations(message: Message) -> Iterator[str]:
    """What onnx's own parser finds."""
    if isinstance(message, TensorProto):
        for one in message.external_data:
            if one.key == "location":
                # Not UTF-8, it is given as bytes.
                value: Any = one.value
                yield value if isinstance(value, str) else value.decode("utf-8", "surrogateescape")
    for field, value in message.ListFields():
        if field.message_type is not None:
            for child in [value] if isinstance(value, Message) else value:
                yield from locations(child)


def test_whatever_is_flipped_no_location_that_onnx_sees_is_missed(
    colour_model: Callable[..., bytes],
) -> None:
    model = onnx.load_model_from_string(colour_model())
    for place, put in PLACES.items():
        put(model, kept_in(f"{place}.bin"))
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros(1, np.float32)))
    data, chance = model.SerializeToString(), random.Random(0)
    taken = 0
    for _ in range(1000):
        changed = bytearray(data)
        for _ in range(chance.randint(1, 3)):
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        try:
            seen = set(locations(onnx.load_model_from_string(bytes(changed))))
        except (DecodeError, UnicodeDecodeError):
            continue
        try:
            found = external_locations(bytes(changed))
        except ValueError:
            continue
        taken += 1
        assert seen <= found
    assert taken > 30
