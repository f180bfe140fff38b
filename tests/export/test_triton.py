"""The Triton model repository: it parses under Triton's own schema, says what the graph is, and
appears whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from knet_export import triton
from knet_export.triton import triton_config, write_triton
from knet_runtime.bundle.manifest import (
    Graph,
    InputSpec,
    Licence,
    Manifest,
    OutputSpec,
    Provenance,
    SizeRange,
    Tolerance,
)
from knet_runtime.bundle.store import Bundle, write_bundle
from knet_runtime.errors import BundleError, OutputError
from knet_runtime.labels import LabelMap

LIMITS = Tolerance(0.02, 0.2, 0.9999, 1e-3)
FILES = ["1/model.onnx", "1/weights.bin", "config.pbtxt", "labels.txt"]


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(
        name="street",
        input=InputSpec("image", 8, 12, max_batch=4),
        labels=LabelMap(("road", "façade"), ((1, 2, 3), (4, 5, 6)), 255),
        graphs=(
            Graph(
                path="logits.onnx",
                outputs=(OutputSpec("logits", "semantic_logits", (2,), 4),),
                tolerance=LIMITS,
            ),
            Graph(
                path="classmap.onnx",
                kind="classmap",
                outputs=(OutputSpec("classmap", "class_map", stride=1),),
                tolerance=LIMITS,
                external_data=("weights.bin",),
            ),
        ),
        provenance=Provenance("0" * 64, "none", {}),
        licence=Licence("", "", ""),
    )


@pytest.fixture
def bundle(tmp_path: Path, manifest: Manifest) -> Bundle:
    """A bundle whose class map says where the image's first channel passes a threshold, which is
    kept in ``weights.bin``."""
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Gather", ["float", "zero"], ["red"], axis=3),
        helper.make_node("Greater", ["red", "threshold"], ["above"]),
        helper.make_node("Cast", ["above"], ["classmap"], to=TensorProto.UINT8),
    ]
    graph = helper.make_graph(
        nodes,
        "threshold",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["B", 8, 12, 3])],
        [helper.make_tensor_value_info("classmap", TensorProto.UINT8, ["B", 8, 12])],
        [
            numpy_helper.from_array(np.full((8, 12), 99, np.float32), "threshold"),
            numpy_helper.from_array(np.int64(0), "zero"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    place = tmp_path / "made"
    place.mkdir()
    onnx.save(
        model,
        str(place / "classmap.onnx"),
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    files = {name: place / name for name in ("classmap.onnx", "weights.bin")}
    return write_bundle(tmp_path / "street.knet", manifest, {"logits.onnx": b"", **files})


def listed(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def parsed(text: str) -> Any:
    """The text under Triton's own schema: an unknown field or a wrong type is an error."""
    model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_repository_parses_under_tritons_schema_and_says_what_the_graph_is(
    bundle: Bundle, tmp_path: Path
):
    folder = write_triton(bundle, tmp_path / "models")
    assert folder == tmp_path / "models" / "street"
    assert listed(folder) == FILES
    config = parsed((folder / "config.pbtxt").read_text(encoding="utf-8"))
    assert (config.name, config.backend, config.max_batch_size) == ("street", "onnxruntime", 4)
    assert config.HasField("dynamic_batching")
    (image,), (classes,) = config.input, config.output
    uint8 = config.input[0].DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_name
    assert image.data_type == classes.data_type == uint8["TYPE_UINT8"].number
    labels = (folder / classes.label_filename).read_text(encoding="utf-8")
    assert labels.splitlines() == ["road", "façade"]

    # What the server would load: the sizes it is promised are those of the graph, batch aside.
    session = onnxruntime.InferenceSession(
        folder / "1" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.type, taken.shape[1:]) == (
        image.name,
        "tensor(uint8)",
        list(image.dims),
    )
    assert (given.name, given.shape[1:]) == (classes.name, list(classes.dims))
    images = np.zeros((3, 8, 12, 3), np.uint8)
    images[1, 2, 3, 0] = 100
    (found,) = session.run(None, {"image": images})
    assert found.sum() == found[1, 2, 3] == 1


def test_one_image_a_request_and_free_sizes_are_said_in_tritons_words(manifest: Manifest):
    alone = msgspec.structs.replace(manifest.input, max_batch=1)
    config = parsed(triton_config(msgspec.structs.replace(manifest, input=alone)))
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [1, 8, 12, 3]
    assert list(config.output[0].dims) == [1, 8, 12]

    free = msgspec.structs.replace(manifest.input, sizes=SizeRange((4, 4), (64, 64), 4))
    config = parsed(triton_config(msgspec.structs.replace(manifest, input=free)))
    assert list(config.input[0].dims) == [-1, -1, 3]
    assert list(config.output[0].dims) == [-1, -1]


def test_other_models_of_the_repository_are_left_alone(bundle: Bundle, tmp_path: Path):
    other = tmp_path / "models" / "other"
    other.mkdir(parents=True)
    write_triton(bundle, tmp_path / "models")
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["other", "street"]


def test_model_is_replaced_only_when_that_was_asked_for(bundle: Bundle, tmp_path: Path):
    folder = write_triton(bundle, tmp_path)
    (folder / "config.pbtxt").write_text("old")
    with pytest.raises(OutputError, match=r"street exists already: .*--force"):
        write_triton(bundle, tmp_path)
    write_triton(bundle, tmp_path, replace=True)
    assert (folder / "config.pbtxt").read_text() != "old"
    assert listed(folder) == FILES
    (folder / "config.pbtxt").unlink()
    with pytest.raises(OutputError, match="is no Triton model"):
        write_triton(bundle, tmp_path, replace=True)


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_writing_leaves_nothing_new(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Any
):
    write_triton(bundle, tmp_path / "models")
    before = {name: (tmp_path / "models/street" / name).read_bytes() for name in FILES}

    def fail(source: object, target: object) -> None:
        raise fault

    monkeypatch.setattr(triton.shutil, "copyfile", fail)
    expected = OutputError if isinstance(fault, OSError) else KeyboardInterrupt
    for place in ("models", "new"):
        with pytest.raises(expected):
            write_triton(bundle, tmp_path / place, replace=True)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["street"]
    assert {name: (tmp_path / "models/street" / name).read_bytes() for name in FILES} == before
    assert not (tmp_path / "new").exists()


def test_bundle_without_class_map_and_places_that_are_none_are_named(
    tmp_path: Path, manifest: Manifest, bundle: Bundle
):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="file"):
        write_triton(bundle, tmp_path / "file")
    lone = msgspec.structs.replace(manifest, graphs=manifest.graphs[:1])
    other = write_bundle(tmp_path / "lone.knet", lone, {"logits.onnx": b""})
    with pytest.raises(BundleError, match="holds no classmap graph"):
        write_triton(other, tmp_path / "models")


def test_logits_of_classes_and_masks_are_served_where_there_is_no_class_map(manifest: Manifest):
    outputs = (
        OutputSpec("class_logits", "class_logits", (5, 2)),
        OutputSpec("mask_logits", "mask_logits", (5,), 4),
    )
    graph = msgspec.structs.replace(manifest.graphs[0], outputs=outputs)
    labels = msgspec.structs.replace(manifest.labels, things=(1,))
    segments = msgspec.structs.replace(manifest, task="panoptic", graphs=(graph,), labels=labels)
    classes, masks = parsed(triton_config(segments)).output
    assert (classes.name, list(classes.dims)) == ("class_logits", [5, 2])
    assert (masks.name, list(masks.dims)) == ("mask_logits", [5, 2, 3])
    floats = classes.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_name["TYPE_FP32"]
    assert classes.data_type == masks.data_type == floats.number
