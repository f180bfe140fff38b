"""120 damaged, lying and hostile bundles, from one small good one; the same for the same seed.

    python tests/corpus/make_bundles.py GOOD.knet FOLDER [--seed 0]

Names say what was done: graph-flip-003. None of them may be run.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import re
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

GRAPH, GOLDEN, MANIFEST, WEIGHTS = "model.onnx", "golden.npz", "manifest.json", "weights.bin"
Change = Callable[[Path, random.Random], None]


def make_bundles(good: Path, folder: Path, seed: int = 0) -> list[Path]:
    """Write the corpus into ``folder``; its folders, in order. ``good`` holds a logits graph
    without external data and ``golden.npz``."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for number, (name, change) in enumerate(_changes()):
        bundle = folder / f"{number:03d}-{name}.knet"
        shutil.copytree(good, bundle)
        change(bundle, random.Random(f"{seed} {number}"))
        made.append(bundle)
    return made


def _changes() -> Iterator[tuple[str, Change]]:
    for file in (GRAPH, GOLDEN):
        yield from ((f"flip-{file}", _flipped(file)) for _ in range(8))
        yield from ((f"cut-{file}", _cut(file)) for _ in range(5))
        yield from ((f"cut-signed-{file}", _signed(_cut(file))) for _ in range(4))
        yield f"missing-{file}", lambda bundle, _, file=file: (bundle / file).unlink()
        yield f"longer-{file}", lambda bundle, _, file=file: _append(bundle / file)
        yield f"folder-{file}", lambda bundle, _, file=file: _as_folder(bundle / file)
        yield f"pipe-{file}", lambda bundle, _, file=file: _as_pipe(bundle / file)
        yield f"link-out-{file}", lambda bundle, _, file=file: _as_link(bundle / file, "/dev/zero")
        yield f"link-loop-{file}", lambda bundle, _, file=file: _as_link(bundle / file, file)
        yield f"hash-{file}", _listed(file, "sha256", "0" * 64)
        yield f"size-{file}", _listed(file, "bytes", 2**62)
    yield from (("flip-manifest", _flip_structure) for _ in range(8))
    yield from (("cut-manifest", _cut(MANIFEST)) for _ in range(5))
    yield "missing-manifest", lambda bundle, _: (bundle / MANIFEST).unlink()
    yield "empty-manifest", lambda bundle, _: (bundle / MANIFEST).write_bytes(b"")
    yield "pipe-manifest", lambda bundle, _: _as_pipe(bundle / MANIFEST)
    yield "link-manifest", lambda bundle, _: _as_link(bundle / MANIFEST, "/dev/zero")
    yield "large-manifest", _large
    yield "deep", lambda bundle, _: (bundle / MANIFEST).write_bytes(b'{"name":' + b"[" * 300_000)
    yield "deep-unknown", _deep_unknown
    yield "twice", _twice
    yield "no-utf8", lambda bundle, _: (bundle / MANIFEST).write_bytes(b'{"schema": "\xff\xfe"}')
    for path in ("../up.onnx", "/etc/hostname", "a/../../b", "C:\\x", "a\x00b", MANIFEST, "m/"):
        yield "path", _edit_manifest(lambda stated, path=path: _rename(stated, path))
    for keys, value in (
        (("input", "height"), 2**40),
        (("input", "width"), -24),
        (("input", "max_batch"), 0),
        (("graphs", 0, "outputs", 0, "stride"), 0),
        (("graphs", 0, "outputs", 0, "name"), "other"),
        (("input", "name"), "other"),
        (("schema",), 2**63),
        (("labels", "names"), ["red"]),
    ):
        yield "states-" + "-".join(map(str, keys)), _edit_manifest(_stating(keys, value))
    yield "bomb", _signed(lambda bundle, _: _bomb(bundle / GOLDEN))
    yield "lying-npy", _signed(lambda bundle, _: _lying_npy(bundle / GOLDEN))
    yield "pickle-npz", _signed(lambda bundle, _: _pickled(bundle / GOLDEN))
    yield "encrypted-npz", _signed(lambda bundle, _: _encrypted(bundle / GOLDEN))
    yield "nan-golden", _signed(lambda bundle, _: _golden(bundle, np.float32(np.nan)))
    yield "other-golden", _signed(lambda bundle, _: _golden(bundle, np.float32(50)))
    yield "nan-weights", _signed(_graph(lambda model: _weights(model, np.nan)))
    yield "other-weights", _signed(_graph(lambda model: _weights(model, -3)))
    yield "wrong-shape", _signed(_graph(lambda model: _shape(model, 32)))
    yield "weights-outside", _signed(_graph(lambda model: _external(model, "../outside.bin")))
    yield "weights-absolute", _signed(_graph(lambda model: _external(model, "/dev/zero")))
    yield "weights-unlisted", _signed(_graph(lambda model: _external(model, "unlisted.bin")))
    yield "huge-tensor", _signed(_graph(_huge))
    for place, put in _PLACES.items():
        yield f"weights-of-{place}", _signed(_graph(lambda model, put=put: put(model, _tensor())))
    for location in ("./weights.bin", "WEIGHTS.BIN", "a/../weights.bin", "*/_ORT_MEM_ADDR_/*"):
        yield "weights-spelt", _signed(_graph(lambda model, at=location: _external(model, at)))
    yield "weights-of-none", _signed(_listed_for_none)
    yield "weights-link", _signed(_linked_weights)
    yield "weights-twice", _edit_manifest(lambda stated: _twice_external(stated, 200_000))
    yield "compiled", _signed(_graph(_compiled))
    yield "ort-name", _ort_name
    yield "many-fields", _signed(lambda bundle, _: _append_fields(bundle / GRAPH))
    yield "many-files", _edit_manifest(_many_files)
    yield "long-path", _edit_manifest(lambda stated: _rename(stated, "a/" * 40_000 + GRAPH))
    yield "long-key", _edit_manifest(lambda stated: stated.update({"x\n" * 40_000: 1}))
    yield "many-golden", _signed(_many_golden)
    yield "many-members", _signed(lambda bundle, _: _many_members(bundle / GOLDEN))


def _flipped(name: str) -> Change:
    def change(bundle: Path, chance: random.Random) -> None:
        data = bytearray((bundle / name).read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        (bundle / name).write_bytes(data)

    return change


def _cut(name: str) -> Change:
    def change(bundle: Path, chance: random.Random) -> None:
        data = (bundle / name).read_bytes()
        (bundle / name).write_bytes(data[: chance.randrange(len(data) - 2)])

    return change


def _flip_structure(bundle: Path, chance: random.Random) -> None:
    """A flip that is not inside a text, where it would be another name only."""
    data = bytearray((bundle / MANIFEST).read_bytes())
    places = [found.start() for found in re.finditer(rb'[{}\[\]":,]', bytes(data))]
    data[chance.choice(places)] ^= 1 << chance.randrange(7)
    (bundle / MANIFEST).write_bytes(data)


def _append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _as_link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def _large(bundle: Path, _: random.Random) -> None:
    with (bundle / MANIFEST).open("r+b") as file:
        file.truncate(2**40)  # holes: nothing is written


def _deep_unknown(bundle: Path, _: random.Random) -> None:
    data = (bundle / MANIFEST).read_bytes()
    nested = b"[" * 100_000 + b"]" * 100_000
    (bundle / MANIFEST).write_bytes(b'{"more": ' + nested + b"," + data.lstrip()[1:])


def _twice(bundle: Path, _: random.Random) -> None:
    """The last of two equal keys counts, and says something else."""
    data = (bundle / MANIFEST).read_bytes().rstrip()
    (bundle / MANIFEST).write_bytes(data[:-1] + b', "files": {}}')


def _edit_manifest(edit: Callable[[dict[str, Any]], None]) -> Change:
    def change(bundle: Path, _: random.Random) -> None:
        stated = json.loads((bundle / MANIFEST).read_bytes())
        edit(stated)
        (bundle / MANIFEST).write_text(json.dumps(stated))

    return change


def _listed(name: str, key: str, value: object) -> Change:
    return _edit_manifest(lambda stated: stated["files"][name].update({key: value}))


def _stating(keys: tuple[str | int, ...], value: object) -> Callable[[Any], None]:
    def edit(stated: Any) -> None:
        for key in keys[:-1]:
            stated = stated[key]
        stated[keys[-1]] = value

    return edit


def _rename(stated: dict[str, Any], path: str) -> None:
    stated["files"][path] = stated["files"].pop(GRAPH)
    stated["graphs"][0]["path"] = path


def _signed(change: Change) -> Change:
    """The change, and a manifest that agrees with it."""

    def both(bundle: Path, chance: random.Random) -> None:
        change(bundle, chance)
        stated = json.loads((bundle / MANIFEST).read_bytes())
        for name, record in stated["files"].items():
            data = (bundle / name).read_bytes()
            record.update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
        (bundle / MANIFEST).write_text(json.dumps(stated))

    return both


def _npy(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(10 + len(header) + 1) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


def _bomb(path: Path) -> None:
    """4 GiB of zeros in a few megabytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("images.npy", "w", force_zip64=True) as member:
            member.write(_npy((4096, 1024, 1024, 1)))
            block = bytes(2**24)
            for _ in range(4):  # of 256: the stated length below makes up for the rest
                member.write(block)
        archive.writestr("logits.npy", _npy((1,)) + b"\0")
    data = bytearray(path.read_bytes())
    at = data.rfind(b"images.npy") - 46  # the central record, which is what is believed
    struct.pack_into("<I", data, at + 24, 2**32 - 2)
    path.write_bytes(data)


def _lying_npy(path: Path) -> None:
    """Arrays that state a terabyte and hold nothing."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", _npy((2**20, 1024, 1024, 1)))
        archive.writestr("logits.npy", _npy((2**20, 1024, 1024, 1)))


def _pickled(path: Path) -> None:
    target = io.BytesIO()
    np.savez(target, images=np.array([{"a": 1}], object), logits=np.zeros(1, np.float32))
    path.write_bytes(target.getvalue())


def _encrypted(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.find(magic)
        while at >= 0:
            data[at + offset] |= 1
            at = data.find(magic, at + 4)
    path.write_bytes(data)


def _golden(bundle: Path, add: np.float32) -> None:
    with np.load(bundle / GOLDEN) as arrays:
        images, logits = arrays["images"], arrays["logits"]
    logits = logits.copy()
    logits[:, 0] += add
    target = io.BytesIO()
    np.savez_compressed(target, images=images, logits=logits)
    (bundle / GOLDEN).write_bytes(target.getvalue())


def _graph(edit: Callable[[onnx.ModelProto], None]) -> Change:
    def change(bundle: Path, _: random.Random) -> None:
        (bundle.parent / "outside.bin").write_bytes(bytes(4096))
        (bundle / "unlisted.bin").write_bytes(bytes(4096))
        model = onnx.load(bundle / GRAPH)
        edit(model)
        (bundle / GRAPH).write_bytes(model.SerializeToString())

    return change


def _weights(model: onnx.ModelProto, factor: float) -> None:
    weight = model.graph.initializer[0]
    values = numpy_helper.to_array(weight) * np.float32(factor)
    weight.CopyFrom(numpy_helper.from_array(values.astype(np.float32), weight.name))


def _shape(model: onnx.ModelProto, height: int) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = height


def _external(model: onnx.ModelProto, location: str) -> None:
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    entry = weight.external_data.add()
    entry.key, entry.value = "location", location


def _tensor() -> TensorProto:
    weight = TensorProto(name="more", dims=[2], data_type=TensorProto.FLOAT)
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="unlisted.bin")
    return weight


def _node(**value: Any) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["more"], **value)


_PLACES: dict[str, Callable[[onnx.ModelProto, TensorProto], object]] = {
    "constant": lambda model, weight: model.graph.node.append(_node(value=weight)),
    "branch": lambda model, weight: model.graph.node.append(
        _node(body=helper.make_graph([_node(value=weight)], "body", [], []))
    ),
    "function": lambda model, weight: model.functions.add(name="f", domain="d").node.append(
        _node(value=weight)
    ),
    "training": lambda model, weight: model.training_info.add().algorithm.initializer.append(
        weight
    ),
    "sparse": lambda model, weight: model.graph.sparse_initializer.append(
        onnx.SparseTensorProto(values=weight, dims=[4])
    ),
}


def _listed_for_none(bundle: Path, chance: random.Random) -> None:
    """Its weights are listed and hashed, but as no graph's."""
    _graph(lambda model: _external(model, WEIGHTS))(bundle, chance)
    (bundle / WEIGHTS).write_bytes(bytes(4096))
    _edit_manifest(lambda stated: stated["files"].update({WEIGHTS: {"sha256": "", "bytes": 0}}))(
        bundle, chance
    )


def _linked_weights(bundle: Path, chance: random.Random) -> None:
    _listed_for_none(bundle, chance)
    _edit_manifest(lambda stated: stated["graphs"][0].update(external_data=[WEIGHTS]))(
        bundle, chance
    )
    (bundle / WEIGHTS).unlink()
    (bundle / WEIGHTS).symlink_to("unlisted.bin")


def _twice_external(stated: dict[str, Any], times: int) -> None:
    stated["graphs"][0]["external_data"] = [GOLDEN] * times


def _ort_name(bundle: Path, chance: random.Random) -> None:
    (bundle / GRAPH).rename(bundle / "model.ort")
    _edit_manifest(lambda stated: _rename(stated, "model.ort"))(bundle, chance)


def _compiled(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("EPContext", [], ["more"], domain="com.microsoft"))


def _append_fields(path: Path) -> None:
    """Small numbers in a field that no ONNX has."""
    path.write_bytes(path.read_bytes() + b"\x78\x01" * 5_000_000)


def _many_files(stated: dict[str, Any]) -> None:
    record = stated["files"][GRAPH]
    stated["files"].update({f"{'d/' * 50}{number}": record for number in range(50_000)})


def _many_golden(bundle: Path, _: random.Random) -> None:
    """2,000 images in little more than a kilobyte each, or less."""
    with np.load(bundle / GOLDEN) as arrays:
        images, logits = (np.repeat(arrays[name][:1], 2000, 0) for name in ("images", "logits"))
    np.savez_compressed(bundle / GOLDEN, images=images, logits=logits)


def _many_members(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(5000):
            archive.writestr(f"{number}", b"")


def _huge(model: onnx.ModelProto) -> None:
    """The graph asks for a tensor of 16 TiB on the way."""
    nodes = model.graph.node
    (last,) = (node for node in nodes if "logits" in node.output)
    last.output[0] = "plain"
    shape = numpy_helper.from_array(np.array([4, 2**40], np.int64), "huge_shape")
    model.graph.initializer.append(shape)
    nodes.append(helper.make_node("ConstantOfShape", ["huge_shape"], ["huge"]))
    nodes.append(helper.make_node("ReduceMax", ["huge"], ["most"], keepdims=0))
    nodes.append(helper.make_node("Add", ["plain", "most"], ["logits"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("good", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    made = make_bundles(given.good, given.folder, given.seed)
    print(f"{len(made)} bundles in {given.folder}")  # noqa: T201


if __name__ == "__main__":
    main()
