from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from time import process_time
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
    SegmentRules,
    SizeRange,
    Tolerance,
    check_paths,
    decode_manifest,
    encode_manifest,
    name_for,
)
from knet_runtime.errors import BundleError
from knet_runtime.labels import LabelMap, distinct_palette

OLD = Path(__file__).parent / "schema2.json"
RECORD = FileRecord("a" * 64, 3)
LISTED = {"sha256": "a" * 64, "bytes": 3}
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
            miou_measured=draw(score),
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
    task = draw(st.sampled_from(["semantic", "instance", "panoptic"]))
    share, rules = st.floats(0, 0.99), msgspec.UNSET
    outputs: dict[str, tuple[OutputSpec, ...]] = {
        "logits": (OutputSpec("logits", "semantic_logits", (n,), stride),),
        "classmap": (OutputSpec("classmap", "class_map", stride=1),),
    }
    if task != "semantic":
        kernels = n + draw(st.integers(0, 200))
        rules = SegmentRules(
            *draw(st.tuples(share, share, share, st.integers(1, 300))), 1 - draw(share)
        )
        outputs["logits"] = (
            OutputSpec("scores", "class_logits", (kernels, n)),
            OutputSpec("masks", "mask_logits", (kernels,), stride),
        )
    graphs = [
        Graph(
            path=path,
            kind=kind,
            outputs=outputs[kind],
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
        task=task,
        input=InputSpec(
            draw(st.text(min_size=1, max_size=5)),
            height,
            width,
            draw(st.sampled_from(["stretch", "letterbox"])),
            draw(st.integers(1, 64)),
            stride,
            sizes=draw(st.sampled_from([None, sizes])),
        ),
        labels=LabelMap(tuple(f"class {i}" for i in range(n)), distinct_palette(n), 255),
        graphs=tuple(graphs[: draw(st.integers(1, 2)) if task == "semantic" else 1]),
        files={p: FileRecord(draw(SHA256), draw(st.integers(0, 2**40))) for p in paths},
        provenance=Provenance(draw(SHA256), draw(WORDS), draw(st.dictionaries(WORDS, WORDS))),
        licence=Licence(draw(WORDS), draw(WORDS), draw(WORDS)),
        rules=rules,
    )


def size_range(low: list[int], high: list[int], multiple: int) -> dict[str, Any]:
    return {"min": low, "max": high, "multiple": multiple}


@pytest.mark.parametrize("size", [(8, 8), (16, 24), (12, 8), (16, 8)])
def test_sizes_of_the_range_are_in_it(size):
    assert size in SizeRange((8, 8), (16, 24), 4)


@pytest.mark.parametrize(
    "size", [(4, 8), (8, 4), (20, 8), (8, 28), (10, 8), (8, 9), (8,), "8x8", 8]
)
def test_other_sizes_are_not(size):
    assert size not in SizeRange((8, 8), (16, 24), 4)


def output(plain: Any) -> Any:
    """The one output of the one graph, in plain JSON."""
    return plain["graphs"][0]["outputs"][0]


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
    assert encode_manifest(first).startswith(b'{\n  "schema": 3,\n')
    assert encode_manifest(first).endswith(b"}\n")


def test_newer_schema_says_upgrade_even_with_unknown_fields(decode_changed):
    with pytest.raises(BundleError) as caught:
        decode_changed(lambda plain: plain.update(schema=4, quantum=True))
    assert "written by a newer version (schema 4, this one reads 2 to 3): upgrade" in str(
        caught.value
    )


def test_older_schema_says_export_again(decode_changed):
    """The first schema had fields that this one lacks: it is named before they are."""
    with pytest.raises(BundleError) as caught:
        decode_changed(lambda plain: plain.update(schema=1, output={"kind": "logits"}))
    assert "an older version (schema 1, this one reads 2 to 3): export the bundle again" in str(
        caught.value
    )


@pytest.fixture
def old() -> dict[str, Any]:
    """The packaged model's manifest as it was before schema 3."""
    plain: dict[str, Any] = json.loads(OLD.read_text(encoding="utf-8"))
    assert plain["schema"] == 2
    return plain


def test_schema_2_is_upgraded_and_nothing_of_it_lost(old: dict[str, Any]):
    old["input"]["sizes"] = {"least": [32, 32], "most": [512, 512], "multiple": 8}
    manifest = decode_manifest(json.dumps(old).encode())
    assert (manifest.schema, manifest.task) == (3, "semantic")
    assert manifest.input.multiple == 4
    assert manifest.input.sizes == SizeRange((32, 32), (512, 512), 8)
    logits, classmap = manifest.graphs
    assert logits.outputs == (OutputSpec("logits", "semantic_logits", (11,), 4),)
    assert classmap.outputs == (OutputSpec("classmap", "class_map", stride=1),)
    assert logits.parity[0].miou_measured == old["artefacts"][0]["parity"][0]["miou_artefact"]
    new = json.loads(encode_manifest(manifest))
    assert new["labels"].pop("things") == []
    for field in ("name", "labels", "files", "provenance", "licence"):
        assert new[field] == old[field]
    assert decode_manifest(encode_manifest(manifest)) == manifest


def test_schema_2_is_held_to_what_it_knew(old: dict[str, Any]):
    for change, reason in (
        (lambda m: m.pop("output"), "KeyError: 'output'"),
        (lambda m: m["output"].update(kind="logits"), "unknown field `kind`"),
        (lambda m: m["output"].update(stride=7), "multiple of 7"),
        (lambda m: m["artefacts"][0].update(kind="masks"), "KeyError: 'masks'"),
        (lambda m: m["artefacts"][0]["parity"][0].pop("miou_artefact"), "'miou_artefact'"),
        (lambda m: m.update(quantum=True), "unknown field `quantum`"),
    ):
        changed = json.loads(json.dumps(old))
        change(changed)
        with pytest.raises(BundleError, match=reason):
            decode_manifest(json.dumps(changed).encode())


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_schema_2_with_anything_anywhere_is_a_manifest_or_a_bundle_error(data):
    changed = json.loads(OLD.read_text(encoding="utf-8"))
    at: Any = changed
    while True:
        keys = list(at) if isinstance(at, dict) else range(len(at))
        key = data.draw(st.sampled_from(list(keys)))
        if not isinstance(at[key], dict | list) or not at[key] or data.draw(st.booleans()):
            break
        at = at[key]
    if key == "schema":
        return
    at[key] = data.draw(
        st.sampled_from([None, [], {}, "x", -1, 0.5, True, [[]], [{}], {"name": 1}, ["x"]])
    )
    with contextlib.suppress(BundleError):
        decode_manifest(json.dumps(changed).encode())


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
        (lambda m: m["input"].update(width=22), "16×22 must be a multiple of 4"),
        (lambda m: m["input"].update(multiple=0), "multiple 0 must be at least 1"),
        (lambda m: m["input"].update(multiple=2), "multiple 2 must be a multiple of logits's stri"),
        (lambda m: output(m).update(stride=0), "stride 0"),
        (lambda m: output(m).update(stride=None), "semantic_logits cannot have stride None"),
        (lambda m: output(m).update(name=""), "name of the graph's output"),
        (lambda m: output(m).update(meaning="depth"), "depth"),
        (lambda m: output(m).update(channels=[]), "has 1 channels of at least 1, not"),
        (lambda m: output(m).update(channels=[4]), "logits has 4 classes, the labels have 3"),
        (lambda m: output(m).update(meaning="class_map", channels=[]), "class_map cannot have str"),
        (
            lambda m: output(m).update(meaning="class_map", channels=[], stride=1),
            "a logits graph of a semantic bundle gives semantic_logits, not class_map",
        ),
        (lambda m: m["graphs"][0].update(outputs=[]), "gives semantic_logits, not nothing"),
        (lambda m: m["graphs"][0].update(outputs=2 * [output(m)]), "not semantic_logits, semantic"),
        (lambda m: m.update(task="panoptic"), "gives class_logits and mask_logits, not semantic_l"),
        (lambda m: m.update(task="depth"), "depth"),
        (lambda m: m["input"].update(name=""), "name of the graph's input"),
        (lambda m: m.update(name="../x"), "name"),
        (lambda m: m.update(graphs=[]), "needs a logits graph"),
        (lambda m: m.update(files={}), "lists no files"),
        (lambda m: m["graphs"][0].update(path="other.onnx"), "'other.onnx' is not listed"),
        (lambda m: m["graphs"][0].update(external_data=["w"]), "'w' is not listed"),
        (lambda m: m["graphs"][0].update(external_data=["model.onnx"]), "names a file twice"),
        (lambda m: m["graphs"][0].update(precision="fp64"), "fp64"),
        (lambda m: m["input"].update(height=2**40), "16384 pixels at most"),
        (lambda m: m["input"].update(max_batch=2**40), "max_batch 1099511627776 must be 1 to 1024"),
        (lambda m: m["input"].update(sizes=size_range([8, 8], [2**40, 24], 4)), "16384 pixels at"),
        (lambda m: m["files"].update({"a" * 256: LISTED}), "has more than 255 characters"),
        (lambda m: m["files"].update({f"{n}": LISTED for n in range(1000)}), "1000 files at most"),
        (lambda m: m["graphs"][0].update(kind="classmap"), "needs a logits graph"),
        (lambda m: m["graphs"].append(m["graphs"][0]), "may have a classmap graph after it"),
        (
            lambda m: m["graphs"].append(
                m["graphs"][0] | {"kind": "classmap", "precision": "fp16"}
            ),
            "have one precision",
        ),
        (lambda m: m["input"].update(sizes=size_range([8, 8], [16, 20], 4)), "16×24 .*not among"),
        (lambda m: m["input"].update(sizes=size_range([8, 8], [16, 24], 5)), "multiples of 5"),
        (lambda m: m["input"].update(sizes=size_range([2, 2], [16, 24], 2)), "multiples of 4"),
        (lambda m: m["input"].update(sizes=size_range([32, 8], [16, 24], 4)), "hold none"),
        (lambda m: m["input"].update(sizes=size_range([8, 8], [16, 24], 0)), "multiples of 0"),
        (lambda m: m["graphs"][0]["tolerance"].update(delta_miou=0), "delta_miou"),
        (lambda m: m["graphs"][0]["tolerance"].update(agreement=1.5), "agreement"),
        (lambda m: m["files"]["model.onnx"].update(sha256="A" * 64), "hexadecimal"),
        (lambda m: m["files"]["model.onnx"].update(bytes=-1), "-1 bytes"),
        (lambda m: m["provenance"].update(checkpoint_sha256="12"), "checkpoint_sha256"),
        (lambda m: m["labels"].update(ignore_index=1), "ignore_index"),
    ],
)
def test_manifest_that_does_not_hold_is_refused_with_its_fault(decode_changed, change, reason):
    with pytest.raises(BundleError, match=reason):
        decode_changed(change)


@pytest.mark.parametrize("text", ["a/" * 500_000, "x" * 1_000_000, "a\nb", "\x1b[31m"])
@pytest.mark.parametrize(
    "put",
    [
        lambda m, text: m["files"].update({text: LISTED}),
        lambda m, text: m.update({text: 1}),
        lambda m, text: m.update(name=text),
        lambda m, text: m.update(task=text),
        lambda m, text: m["graphs"][0].update(path=text),
        lambda m, text: output(m).update(name=text, stride=0),
        lambda m, text: m["labels"].update(names=[text] * 2),
    ],
)
def test_whatever_a_manifest_holds_is_refused_at_once_in_a_short_line(decode_changed, put, text):
    began = process_time()
    with pytest.raises(BundleError) as caught:
        decode_changed(lambda manifest: put(manifest, text))
    assert process_time() - began < 1
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b'{"schema": "1"}', b"\xff\xfe{}", b'"\xc3\x28"', b"[" * 100_000],
    ids=["empty", "cut", "list", "null", "text-schema", "utf16", "utf8", "deep"],
)
def test_what_is_no_manifest_is_one_clear_error(data):
    with pytest.raises(BundleError, match=r"manifest\.json cannot be read"):
        decode_manifest(data)


def kernels(task: str = "instance", **changes: Any) -> Manifest:
    """A manifest of 5 kernels and 3 classes; ``changes`` are of its mask logits."""
    masks = OutputSpec("masks", "mask_logits", (5,), 4)
    scores = OutputSpec("scores", "class_logits", (5, 3))
    outputs = (scores, msgspec.structs.replace(masks, **changes))
    return Manifest(
        name="x",
        task=task,
        input=InputSpec("i", 8, 12),
        labels=LabelMap(("a", "b", "c"), distinct_palette(3), 255),
        graphs=(Graph(path="m", outputs=outputs, tolerance=Tolerance(1, 1, 1, 1)),),
        provenance=Provenance("0" * 64, "", {}),
        licence=Licence("", "", ""),
    )


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_kernels_have_class_logits_and_mask_logits(task):
    (graph,) = kernels(task).graphs
    assert graph.output("mask_logits").shape((8, 12)) == (5, 2, 3)
    assert graph.output("class_logits").shape((8, 12)) == (5, 3)
    assert graph.output("class_logits").dtype == "float32"
    with pytest.raises(BundleError, match="m gives class_logits, mask_logits, which is not"):
        graph.output("class_map")
    for changes, reason in (
        ({"channels": (6,)}, "different numbers of kernels"),
        ({"name": "scores"}, "must have different names"),
        ({"stride": 3}, "multiple of masks's stride 3"),
    ):
        with pytest.raises(ValueError, match=reason):
            kernels(task, **changes)
    with pytest.raises(ValueError, match="gives semantic_logits, not class_logits, mask_logits"):
        kernels("semantic")
    classmap = Graph(
        path="c",
        kind="classmap",
        outputs=(OutputSpec("c", "class_map", stride=1),),
        tolerance=graph.tolerance,
    )
    with pytest.raises(ValueError, match="a classmap graph is for semantic bundles"):
        msgspec.structs.replace(kernels(task), graphs=(graph, classmap))


@given(cut=st.integers(0, 2000))
@settings(max_examples=40, deadline=None)
def test_truncated_manifest_is_refused(cut):
    labels = LabelMap(("a",), ((0, 0, 0),), 255)
    output = OutputSpec("o", "semantic_logits", (1,), 4)
    graph = Graph(path="m", outputs=(output,), tolerance=Tolerance(1, 1, 1, 1))
    data = encode_manifest(
        Manifest(
            name="x",
            input=InputSpec("i", 4, 4),
            labels=labels,
            graphs=(graph,),
            files={"m": RECORD},
            provenance=Provenance("0" * 64, "", {}),
            licence=Licence("", "", ""),
        )
    )
    with pytest.raises(BundleError):
        decode_manifest(data[: min(cut, len(data) - 3)])


LIMITS = Tolerance(0.1, 0.5, 0.99, 1e-3, agreement_confident=0.999, mean_logit_diff=1e-4)


def test_what_is_at_its_limit_or_was_not_measured_is_inside():
    assert LIMITS.failures(**msgspec.structs.asdict(LIMITS)) == {}
    assert LIMITS.failures(delta_miou=-0.1, worst_class_delta_iou=-0.5) == {}
    assert LIMITS.failures(agreement=1.0, max_logit_diff=0.0, delta_miou=None) == {}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("delta_miou", 0.11, "ΔmIoU +0.110 points is outside ±0.1"),
        ("delta_miou", -0.11, "ΔmIoU -0.110 points is outside ±0.1"),
        ("worst_class_delta_iou", -2.0, "ΔIoU of the worst class -2.000 points is outside ±0.5"),
        ("agreement", 0.9, "pixel agreement 0.900000 is below 0.99"),
        ("agreement_confident", 0.99, "agreement of confident pixels 0.990000 is below 0.999"),
        ("max_logit_diff", 0.5, "largest logit difference 5.00e-01 is above 0.001"),
        ("mean_logit_diff", 0.5, "mean logit difference 5.00e-01 is above 0.0001"),
    ],
)
def test_what_is_outside_a_tolerance_is_said_in_words(name, value, words):
    found = LIMITS.failures(**{name: value})
    assert list(found) == [name]
    assert found[name].startswith(words)


@pytest.mark.parametrize("name", Tolerance.__struct_fields__)
def test_nan_is_outside_every_tolerance(name):
    assert name in LIMITS.failures(**{name: float("nan")})


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


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("street.knet", "street"),
        ("my model.knet", "my-model"),
        ("a/b/modèle v2.1.knet", "modele-v2.1"),
        ("-x (copy).knet", "x-copy"),
        ("街道.knet", "model"),
        ("x" * 200 + ".knet", "x" * 100),
        ("plain", "plain"),
    ],
)
def test_a_bundle_is_named_for_its_folder_in_what_a_name_can_hold(folder, name):
    assert name_for(Path(folder)) == name
