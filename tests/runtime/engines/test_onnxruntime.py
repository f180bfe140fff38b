from __future__ import annotations

import logging
import sys
import threading
from importlib import metadata
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest

import knet_runtime.engines.onnxruntime as ort_module
from knet_runtime.bundle.manifest import SizeRange
from knet_runtime.engines import engine_spec, engine_specs, open_engine, probe_engines
from knet_runtime.engines.hardware import gpu_name, processor_name
from knet_runtime.engines.onnxruntime import BoundSession, onnxruntime_clash
from knet_runtime.errors import EngineError, EngineUnavailable
from knet_runtime.metrics import agreement
from knet_runtime.postprocess import upsampled_argmax

CPU = "onnxruntime-cpu"
CPU_ENGINES = ("onnxruntime-cpu", "openvino")
no_cuda_build = pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(),
    reason="this onnxruntime has CUDA",
)


@pytest.fixture(params=CPU_ENGINES)
def engine(request):
    """Every engine that runs on any processor in float32."""
    if request.param == "openvino":
        pytest.importorskip("openvino")
    return request.param


@pytest.fixture
def opened(make_bundle, engine):
    with open_engine(make_bundle(), engine) as loaded:
        yield loaded


def batch(count: int) -> np.ndarray:
    images = np.random.default_rng(count).integers(0, 256, (count, 16, 24, 3))
    return images.astype(np.uint8)


def test_logits_are_those_of_the_graph(opened):
    images = batch(2)
    logits = opened.infer(images)["logits"]
    assert logits.dtype == np.float32
    assert logits.shape == (2, 3, 4, 6)
    expected = images.reshape(2, 4, 4, 6, 4, 3).mean((2, 4)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(logits, expected, rtol=1e-5)


def test_every_batch_up_to_the_largest_gives_the_same_logits(opened):
    images = batch(3)
    together = opened.infer(images)["logits"]
    for count in (1, 2):
        np.testing.assert_allclose(
            opened.infer(images[:count])["logits"], together[:count], rtol=1e-6
        )


def test_batch_need_not_be_contiguous(opened):
    images = batch(3)[:, :, ::-1]
    np.testing.assert_array_equal(
        opened.infer(images)["logits"], opened.infer(np.ascontiguousarray(images))["logits"]
    )


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (batch(4), r"holds 4 images; \S+ with this bundle takes 1 to 3"),
        (batch(1)[:0], "holds 0 images"),
        (batch(1).astype(np.float32), r"takes uint8 \[B, 16, 24, 3\]"),
        (batch(1)[0], "preprocess.fit_to_input"),
        (batch(1)[:, :8], "preprocess.fit_to_input"),
        (batch(1).transpose(0, 3, 1, 2), "preprocess.fit_to_input"),
    ],
)
def test_batch_that_does_not_fit_is_refused_with_the_fix(opened, images, reason):
    with pytest.raises(EngineError, match=reason):
        opened.infer(images)


def test_threads_may_share_an_engine(opened):
    images = batch(2)
    expected = opened.infer(images)["logits"]
    results: list[np.ndarray] = []

    def work() -> None:
        results.extend(opened.infer(images)["logits"] for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 60
    assert all((result == expected).all() for result in results)


def test_engine_says_what_and_where_it_is(opened, engine):
    assert (opened.name, opened.kind, opened.device) == (engine, "logits", processor_name())


def test_results_stay_when_the_engine_runs_again(opened):
    first = opened.infer(batch(2))["logits"]
    before = first.copy()
    opened.infer(255 - batch(2))
    np.testing.assert_array_equal(first, before)


def test_class_maps_are_those_of_the_graph(make_bundle, colour_model, engine):
    images = batch(2)
    bundle = make_bundle(classmap=colour_model(kind="classmap"))
    with open_engine(bundle, engine, "classmap") as loaded:
        assert loaded.kind == "classmap"
        classes = loaded.infer(images)["classmap"]
    with open_engine(bundle, engine) as loaded:
        logits = loaded.infer(images)["logits"]
    assert (classes.dtype, classes.shape) == (np.uint8, (2, 16, 24))
    for got, planes in zip(classes, logits, strict=True):
        assert agreement(got, upsampled_argmax(planes, (16, 24))) > 0.99


def test_graph_of_free_size_runs_at_each(make_bundle, manifest, colour_model, engine):
    spec = msgspec.structs.replace(manifest.input, sizes=SizeRange((8, 8), (64, 64), 4))
    bundle = make_bundle(colour_model(height="H", width="W"), input=spec)
    for size in ((16, 24), (8, 64)):
        with open_engine(bundle.with_input_size(size), engine) as loaded:
            images = np.full((2, *size, 3), (9, 200, 30), np.uint8)
            logits = loaded.infer(images)["logits"]
        assert logits.shape == (2, 3, size[0] // 4, size[1] // 4)
        np.testing.assert_allclose(logits[:, 1], 200, rtol=1e-5)


def test_graph_with_one_free_side_runs_and_its_other_side_is_held(
    make_bundle, manifest, colour_model, engine
):
    spec = msgspec.structs.replace(manifest.input, sizes=SizeRange((8, 24), (64, 24), 4))
    bundle = make_bundle(colour_model(height="H"), input=spec)
    with open_engine(bundle.with_input_size((40, 24)), engine) as loaded:
        assert loaded.infer(np.zeros((2, 40, 24, 3), np.uint8))["logits"].shape == (2, 3, 10, 6)
    wider = msgspec.structs.replace(spec, width=28, sizes=SizeRange((8, 28), (64, 28), 4))
    with pytest.raises(EngineError, match=r"24, 3\], the manifest says .*'any', 28, 3\]"):
        open_engine(make_bundle(colour_model(height="H"), input=wider), engine)


def test_graph_of_one_size_is_refused_where_the_manifest_promises_more(
    make_bundle, manifest, engine
):
    spec = msgspec.structs.replace(manifest.input, sizes=SizeRange((8, 8), (64, 64), 4))
    bundle = make_bundle(input=spec)
    with pytest.raises(EngineError, match=r"16, 24, 3\], the manifest says .*'any', 'any', 3\]"):
        open_engine(bundle, engine)


def test_closed_engine_says_so(make_bundle, engine):
    with open_engine(make_bundle(), engine) as loaded:
        assert loaded.name == engine
    loaded.close()
    with pytest.raises(EngineError, match="was closed"):
        loaded.infer(batch(1))


@pytest.mark.parametrize(
    ("part", "changes", "reason"),
    [
        ("input", {"name": "frame"}, r"inputs are \[image\], the manifest says 'frame'"),
        ("output", {"name": "scores"}, r"outputs are \[logits\], the manifest says 'scores'"),
        ("input", {"height": 32}, r"image is \[.*, 16, 24, 3\], .* \['any', 32, 24, 3\]"),
        ("output", {"stride": 8}, r"logits is \[.*, 3, 4, 6\], .* \['any', 3, 2, 3\]"),
    ],
)
def test_graph_at_odds_with_the_manifest_is_refused_naming_both(
    make_bundle, manifest, engine, part, changes, reason
):
    if part == "input":
        changed = {"input": msgspec.structs.replace(manifest.input, **changes)}
    else:
        (graph,) = manifest.graphs
        output = msgspec.structs.replace(graph.outputs[0], **changes)
        spec = msgspec.structs.replace(manifest.input, multiple=8)
        changed = {"input": spec, "graphs": (msgspec.structs.replace(graph, outputs=(output,)),)}
    bundle = make_bundle(**changed)
    with pytest.raises(EngineError, match=reason) as caught:
        open_engine(bundle, engine)
    assert "model.onnx" in str(caught.value)


def test_frozen_batch_is_refused_where_the_manifest_promises_batches(
    make_bundle, manifest, colour_model, engine
):
    frozen = colour_model(batch=1)
    with pytest.raises(EngineError, match=r"image is \[1, 16, 24, 3\], the manifest says \['any'"):
        open_engine(make_bundle(frozen), engine)
    alone = msgspec.structs.replace(manifest.input, max_batch=1)
    with open_engine(make_bundle(frozen, input=alone), engine) as loaded:
        assert loaded.infer(batch(1))["logits"].shape == (1, 3, 4, 6)


def test_graph_of_another_type_is_refused(make_bundle, colour_model, engine):
    model = onnx.load_from_string(colour_model())
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    with pytest.raises(EngineError, match=r"image is float32, the manifest says uint8"):
        open_engine(make_bundle(model.SerializeToString()), engine)


def test_output_that_comes_out_in_another_shape_is_an_error(make_bundle, colour_model, engine):
    model = onnx.load_from_string(colour_model(height=32))
    for tensor in (model.graph.input[0], model.graph.output[0]):
        tensor.type.tensor_type.shape.dim[2 if tensor.name == "logits" else 1].dim_param = "free"
        tensor.type.tensor_type.shape.dim[3 if tensor.name == "logits" else 2].dim_param = "wide"
    convolution = next(node for node in model.graph.node if node.op_type == "Conv")
    convolution.attribute.append(onnx.helper.make_attribute("pads", [0, 0, 4, 0]))
    with (
        open_engine(make_bundle(model.SerializeToString()), engine) as loaded,
        pytest.raises(EngineError, match=r"gave logits \(1, 3, 5, 6\), the manifest says"),
    ):
        loaded.infer(batch(1))


@pytest.mark.parametrize("model", [b"\x12\x05graph", b"\x3a\x00"])
def test_what_is_no_graph_is_one_clear_error(make_bundle, model, capfd, engine):
    with pytest.raises(EngineError, match=r"cannot load .*model\.onnx") as caught:
        open_engine(make_bundle(model), engine)
    assert "\n" not in str(caught.value)
    if engine == CPU:  # OpenVINO tries every format that it knows, and each complains for itself
        assert capfd.readouterr() == ("", "")


def test_loading_and_running_print_nothing(make_bundle, capfd, engine):
    with open_engine(make_bundle(), engine) as loaded:
        loaded.infer(batch(3))
    assert capfd.readouterr() == ("", "")


def test_external_weights_are_read_from_the_bundle(tmp_path: Path, manifest, colour_model, engine):
    from knet_runtime.bundle.store import write_bundle

    model = onnx.load_from_string(colour_model())
    onnx.save(
        model,
        str(tmp_path / "model.onnx"),
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
    )
    graph = msgspec.structs.replace(manifest.graphs[0], external_data=("model.onnx.data",))
    changed = msgspec.structs.replace(manifest, graphs=(graph,))
    files = {name: tmp_path / name for name in ("model.onnx", "model.onnx.data")}
    bundle = write_bundle(tmp_path / "x.knet", changed, files)
    with open_engine(bundle, engine) as loaded:
        assert loaded.infer(batch(1))["logits"].shape == (1, 3, 4, 6)


@no_cuda_build
def test_cuda_without_a_cuda_build_names_the_fix(make_bundle):
    with pytest.raises(EngineUnavailable, match="pip install onnxruntime-gpu"):
        open_engine(make_bundle(), "onnxruntime-cuda")


@no_cuda_build
@pytest.mark.parametrize("gpu", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_silent_fall_back_to_the_cpu_is_refused(make_bundle, monkeypatch, gpu):
    """As on a machine with onnxruntime-gpu but no driver: the session comes up on the CPU."""
    listed = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    real = onnxruntime.InferenceSession

    def on_cpu(model: object, options: object, providers: object, **rest: object) -> object:
        return real(model, options, providers=["CPUExecutionProvider"], **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", on_cpu)
    with pytest.raises(EngineUnavailable, match="it fell back to the CPU; it needs an NVIDIA"):
        open_engine(make_bundle(), gpu)


@no_cuda_build
def test_provider_that_takes_no_node_is_refused(make_bundle, monkeypatch):
    """A provider may start and still leave every node to the CPU."""
    if not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"):
        pytest.skip(f"onnxruntime {onnxruntime.__version__} cannot say which nodes it took")
    monkeypatch.setitem(ort_module._PROVIDERS, "onnxruntime-cuda", "AzureExecutionProvider")
    monkeypatch.setattr(
        ort_module, "_CUDA", "AzureExecutionProvider"
    )  # every onnxruntime has it, and it runs nothing by itself
    with pytest.raises(EngineUnavailable, match="it took no node of the graph"):
        open_engine(make_bundle(), "onnxruntime-cuda")


@no_cuda_build
def test_tensorrt_without_its_provider_names_the_fix(make_bundle):
    with pytest.raises(EngineUnavailable, match=r"without TensorRT: .*install onnxruntime-gpu"):
        open_engine(make_bundle(), "onnxruntime-tensorrt")


def test_tensorrt_rtx_without_its_plugin_names_the_fix(make_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", None)
    with pytest.raises(EngineUnavailable, match=r"pip install onnxruntime-ep-nv-tensorrt-rtx$"):
        open_engine(make_bundle(), "onnxruntime-tensorrt-rtx")


@pytest.mark.skipif(gpu_name() is not None, reason="this machine has an NVIDIA GPU")
def test_tensorrt_rtx_without_a_driver_says_what_is_missing(make_bundle, capfd):
    pytest.importorskip("onnxruntime_ep_nv_tensorrt_rtx")
    with pytest.raises(EngineUnavailable, match=r"libcuda|no GPU that it supports") as caught:
        open_engine(make_bundle(), "onnxruntime-tensorrt-rtx")
    assert "it needs an NVIDIA driver" in str(caught.value)
    assert capfd.readouterr().err == ""


@no_cuda_build
def test_a_graph_that_cannot_be_captured_is_opened_without(make_bundle, monkeypatch, caplog):
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    asked = []

    def refuse(model: object, options: object, providers: list, **rest: object) -> object:
        asked.append(dict(providers[:1])["CUDAExecutionProvider"])
        raise RuntimeError("This session cannot use the graph capture feature\nat line 7")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with caplog.at_level(logging.INFO), pytest.raises(EngineUnavailable, match="cannot use"):
        open_engine(make_bundle(), "onnxruntime-cuda")
    assert asked == [{"use_tf32": "0", "enable_cuda_graph": "1"}, {"use_tf32": "0"}]
    assert "without a CUDA graph: This session cannot use the graph capture" in caplog.text


@pytest.mark.parametrize("graphs", [False, True])  # the processor's provider makes none
@pytest.mark.parametrize("kind", ["logits", "classmap"])
def test_bound_buffers_give_what_a_plain_run_gives(make_bundle, colour_model, kind, graphs):
    bundle = make_bundle(classmap=colour_model(kind="classmap"))
    session = onnxruntime.InferenceSession(str(bundle.file(bundle.graph(kind).path)))
    outputs = bundle.graph(kind).outputs
    bound = BoundSession(session, bundle.manifest.input, outputs, graphs=graphs, device="cpu")
    with open_engine(bundle, CPU, kind) as plain:
        batches = [np.roll(batch(count), turn) for turn, count in enumerate((3, 1, 2, 1, 1, 3))]
        results = [array for images in batches for array in bound.run(images)]
        for images, result in zip(batches, results, strict=True):
            np.testing.assert_array_equal(result, plain.infer(images)[kind])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "gpu", ["onnxruntime-cuda", "onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx"]
)
@pytest.mark.parametrize("kind", ["logits", "classmap"])
def test_gpu_engine_gives_the_results_of_the_cpu(make_bundle, colour_model, gpu, kind):
    bundle = make_bundle(classmap=colour_model(kind="classmap"))
    try:
        opened = open_engine(bundle, gpu, kind)
    except EngineUnavailable as error:
        pytest.skip(str(error))
    with opened, open_engine(bundle, CPU, kind) as cpu:
        assert opened.device == gpu_name()
        for turn, count in enumerate((3, 1, 2, 1, 1, 1, 2)):  # what was captured runs anew
            images = np.roll(batch(count), turn)
            got, expected = opened.infer(images)[kind], cpu.infer(images)[kind]
            if kind == "classmap":  # where two colours are level, rounding decides
                assert (got == expected).mean() > 0.99
            else:
                np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_two_onnxruntimes_are_named_with_the_fix(monkeypatch):
    def version(name: str) -> str:
        if name in ("onnxruntime", "onnxruntime-gpu"):
            return "1.0"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    clash = onnxruntime_clash()
    assert clash is not None
    assert "onnxruntime and onnxruntime-gpu are both installed" in clash
    assert "pip install onnxruntime-gpu" in clash
    assert {status.name for status in probe_engines() if clash in status.detail} == {
        name for name in engine_specs() if name.startswith("onnxruntime")
    }


def test_one_onnxruntime_is_no_clash(monkeypatch):
    def version(name: str) -> str:
        if name == "onnxruntime":
            return "1.0"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert onnxruntime_clash() is None


def test_tiny_graph_is_a_real_one():
    onnx.checker.check_model(onnx.load_from_string(ort_module.TINY_GRAPH))
    assert "onnxruntime" in engine_spec(CPU).probe(CPU)
