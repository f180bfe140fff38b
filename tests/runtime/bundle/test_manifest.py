from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings, strategies as st

from knet_runtime.bundle.manifest import (
    FileRecord,
    Graph,
    InputSpec,
    Licence,
    Manifest,
    OutputSpec,
    Parity,
    Provenance,
    SizeRange,
    Tolerance,
    check_paths,
    decode_manifest,
    encode_manifest,
)
from knet_runtime.errors import BundleError
from knet_runtime.labels import LabelMap, distinct_palette

RECORD = FileRecord("a" * 64, 3)
WORDS = st.text(max_size=12)
POSITIVE = st.floats(1e-9, 1e6)
SHA256 = st.text("0123456789abcdef", min_size=64, max_size=64)
PATHS = st.from_regex(r"[a-z]{1,6}(/[a-z]{1,6}){0,2}\.[a-z]{1,4}", fullmatch=True).filter(
    lambda path: path != "manifest.json"
)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    n, stride = draw(st.integers(1, 20)), draw(st.sampled_from([1, 4, 8]))
    tolerance = Tolerance(draw(POSITIVE), draw(POSITIVE), draw(st.floats(0.01, 1)), draw(POSITIVE))
    score = st.none() | st.floats(0, 100)
    records = [
        Parity(
            engine=engine,
            device="a processor",
            passed=draw(st.booleans()),
            miou_reference=draw(score),
            miou_artefact=draw(score),
            delta_miou=None,
            worst_class_delta_iou=None,
            agreement=0.5,
            max_logit_diff=1e-4,
            images=draw(st.integers(1, 9)),
            data="x",
        )
        for engine in draw(st.lists(WORDS, max_size=2))
    ]
    paths = draw(st.lists(PATHS, min_size=2, max_size=4, unique=True))
    precision = draw(st.sampled_from(["fp32", "fp16", "bf16", "int8"]))
    artefacts = [
        Graph(
            path=path,
            kind=kind,
            precision=precision,
            tolerance=tolerance,
            parity=tuple(records),
            external_data=tuple(paths[2:3]),
        )
        for path, kind in zip(paths, ("logits", "classmap"), strict=False)
    ]
    height, width = stride * draw(st.integers(1, 500)), stride * draw(st.integers(1, 500))
    sizes = SizeRange((stride, stride), (height, width), stride)
    return Manifest(
        name=draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)),
        input=InputSpec(
            draw(st.text(min_size=1, max_size=5)),
            height,
            width,
            draw(st.sampled_from(["stretch", "letterbox"])),
            draw(st.integers(1, 64)),
            sizes=draw(st.sampled_from([None, sizes])),
        ),
        output=OutputSpec("logits", stride),
        labels=LabelMap(tuple(f"class {i}" for i in range(n)), distinct_palette(n), 255),
        artefacts=tuple(artefacts[: draw(st.integers(1, 2))]),
        files={p: FileRecord(draw(SHA256), draw(st.integers(0, 2**40))) for p in paths},
        provenance=Provenance(draw(SHA256), draw(WORDS), draw(st.dictionaries(WORDS, WORDS))),
        licence=Licence(draw(WORDS), draw(WORDS), draw(WORDS)),
    )


def size_range(least: list[int], most: list[int], multiple: int) -> dict[str, Any]:
    return {"least": least, "most": most, "multiple": multiple}


@pytest.mark.parametrize("size", [(8, 8), (16, 24), (12, 8), (16, 8)])
def test_sizes_of_the_range_are_in_it(size):
    assert size in SizeRange((8, 8), (16, 24), 4)


@pytest.mark.parametrize(
    "size", [(4, 8), (8, 4), (20, 8), (8, 28), (10, 8), (8, 9), (8,), "8x8", 8]
)
def test_other_sizes_are_not(size):
    assert size not in SizeRange((8, 8), (16, 24), 4)


@pytest.fixture
def whole(manifest: Manifest) -> Manifest:
    return msgspec.structs.replace(manifest, files={"model.onnx": RECORD})


@pytest.fixture
def decode_changed(whole: Manifest) -> Callable[..., Manifest]:
    """Decode the manifest after ``change`` has edited its plain JSON."""

    def decode(change: Callable[[Any], object]) -> Manifest:
        plain = json.loads(encode_manifest(whole))
        change(plain)
        return decode_manifest(json.dumps(plain).encode())

    return decode


@given(manifest=manifests())
@settings(max_examples=60, deadline=None)
def test_what_is_encoded_is_decoded_again(manifest):
    try:
        check_paths(list(manifest.files))
    except ValueError:
        return
    assert decode_manifest(encode_manifest(manifest)) == manifest


def test_text_is_stable_and_readable(whole: Manifest):
    records = {"b.onnx": RECORD, "model.onnx": RECORD, "a": RECORD}
    first = msgspec.structs.replace(whole, files=records)
    second = msgspec.structs.replace(whole, files=dict(reversed(records.items())))
    assert encode_manifest(first) == encode_manifest(second)
    assert encode_manifest(first).startswith(b'{\n  "schema": 2,\n')
    assert encode_manifest(first).endswith(b"}\n")


def test_newer_schema_says_upgrade_even_with_unknown_fields(decode_changed):
    with pytest.raises(BundleError) as caught:
        decode_changed(lambda plain: plain.update(schema=3, quantum=True))
    assert "written by a newer version (schema 3, this one reads 2): upgrade knet-deploy" in str(
        caught.value
    )


def test_older_schema_says_export_again(decode_changed):
    """The first schema had fields that this one lacks: it is named before they are."""
    with pytest.raises(BundleError) as caught:
        decode_changed(
            lambda plain: (plain.update(schema=1), plain["output"].update(kind="logits"))
        )
    assert "an older version (schema 1, this one reads 2): export the bundle again" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update(lables=1), "unknown field `lables`"),
        (lambda m: m["input"].update(heigth=1), "unknown field `heigth`"),
        (lambda m: m.pop("licence"), "missing required field `licence`"),
        (lambda m: m.pop("schema"), "missing required field `schema`"),
        (lambda m: m.update(schema=0), "schema 0"),
        (lambda m: m["input"].update(height="360"), r"input\.height"),
        (lambda m: m["input"].update(layout="NCHW"), "NCHW"),
        (lambda m: m["input"].update(max_batch=0), "max_batch 0"),
        (lambda m: m["input"].update(width=22), "multiple of the output's stride 4"),
        (lambda m: m["output"].update(stride=0), "stride 0"),
        (lambda m: m["input"].update(name=""), "name of the graph's input"),
        (lambda m: m.update(name="../x"), "name"),
        (lambda m: m.update(artefacts=[]), "needs a logits artefact"),
        (lambda m: m.update(files={}), "lists no files"),
        (lambda m: m["artefacts"][0].update(path="other.onnx"), "'other.onnx' is not listed"),
        (lambda m: m["artefacts"][0].update(external_data=["w"]), "'w' is not listed"),
        (lambda m: m["artefacts"][0].update(precision="fp64"), "fp64"),
        (lambda m: m["artefacts"][0].update(kind="classmap"), "needs a logits artefact"),
        (lambda m: m["artefacts"].append(m["artefacts"][0]), "may have a classmap after it"),
        (
            lambda m: m["artefacts"].append(
                m["artefacts"][0] | {"kind": "classmap", "precision": "fp16"}
            ),
            "have one precision",
        ),
        (lambda m: m["input"].update(sizes=size_range([8, 8], [16, 20], 4)), "16×24 .*not among"),
        (lambda m: m["input"].update(sizes=size_range([8, 8], [16, 24], 5)), "multiples of 5"),
        (lambda m: m["input"].update(sizes=size_range([32, 8], [16, 24], 4)), "hold none"),
        (lambda m: m["input"].update(sizes=size_range([8, 8], [16, 24], 0)), "multiples of 0"),
        (lambda m: m["artefacts"][0]["tolerance"].update(delta_miou=0), "delta_miou"),
        (lambda m: m["artefacts"][0]["tolerance"].update(agreement=1.5), "agreement"),
        (lambda m: m["files"]["model.onnx"].update(sha256="A" * 64), "hexadecimal"),
        (lambda m: m["files"]["model.onnx"].update(bytes=-1), "-1 bytes"),
        (lambda m: m["provenance"].update(checkpoint_sha256="12"), "checkpoint_sha256"),
        (lambda m: m["labels"].update(ignore_index=1), "ignore_index"),
    ],
)
def test_manifest_that_does_not_hold_is_refused_with_its_fault(decode_changed, change, reason):
    with pytest.raises(BundleError, match=reason):
        decode_changed(change)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b'{"schema": "1"}', b"\xff\xfe{}", b'"\xc3\x28"', b"[" * 100_000],
    ids=["empty", "cut", "list", "null", "text-schema", "utf16", "utf8", "deep"],
)
def test_what_is_no_manifest_is_one_clear_error(data):
    with pytest.raises(BundleError, match=r"manifest\.json can not be read"):
        decode_manifest(data)


@given(cut=st.integers(0, 2000))
@settings(max_examples=40, deadline=None)
def test_truncated_manifest_is_refused(cut):
    labels = LabelMap(("a",), ((0, 0, 0),), 255)
    artefact = Graph(path="m", tolerance=Tolerance(1, 1, 1, 1))
    data = encode_manifest(
        Manifest(
            name="x",
            input=InputSpec("i", 4, 4),
            output=OutputSpec("o"),
            labels=labels,
            artefacts=(artefact,),
            files={"m": RECORD},
            provenance=Provenance("0" * 64, "", {}),
            licence=Licence("", "", ""),
        )
    )
    with pytest.raises(BundleError):
        decode_manifest(data[: min(cut, len(data) - 3)])


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "..",
        "/etc/passwd",
        "../x",
        "a/../../x",
        "a/./b",
        "a//b",
        "a/",
        "a\\b",
        "\\\\server\\x",
        "C:x",
        "C:/x",
        "a\0b",
        "a\nb",
        "manifest.json",
        "Manifest.JSON",
    ],
)
def test_path_that_could_leave_the_bundle_is_refused(decode_changed, path):
    with pytest.raises(BundleError):
        decode_changed(lambda m: m["files"].update({path: {"sha256": "a" * 64, "bytes": 1}}))


@pytest.mark.parametrize("paths", [["a", "A"], ["a", "a/b"], ["x/y", "X/Y"]])
def test_paths_that_collide_are_refused(paths):
    with pytest.raises(ValueError, match=r"only in case|both a file and a folder"):
        check_paths(paths)


@pytest.mark.parametrize(
    "path", ["a", "a.b/c", "weights/model.onnx.data", "ä ö/x-1_2", "..a", "a.."]
)
def test_plain_paths_are_taken(path):
    check_paths([path, "other"])
