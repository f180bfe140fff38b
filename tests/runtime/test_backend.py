from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from importlib import metadata
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest

import knet_runtime.backends as backends
import knet_runtime.backends.ort as ort_module
from knet_runtime.backends import ENGINES, onnxruntime_clash, open_backend, probe_engines
from knet_runtime.backends.ort import cpu_budget, cuda_is_built_in, try_provider
from knet_runtime.errors import BackendError, BackendUnavailable
from knet_runtime.manifest import InputSpec, OutputSpec

CPU = "onnxruntime-cpu"
no_cuda_build = pytest.mark.skipif(cuda_is_built_in(), reason="this onnxruntime has CUDA")


@pytest.fixture
def opened(make_bundle):
    with open_backend(make_bundle(), CPU) as backend:
        yield backend


def batch(count: int) -> np.ndarray:
    images = np.random.default_rng(count).integers(0, 256, (count, 16, 24, 3))
    return images.astype(np.uint8)


def test_logits_are_those_of_the_graph(opened):
    images = batch(2)
    logits = opened.infer(images)
    assert logits.dtype == np.float32
    assert logits.shape == (2, 3, 4, 6)
    expected = images.reshape(2, 4, 4, 6, 4, 3).mean((2, 4)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(logits, expected, rtol=1e-5)


def test_every_batch_up_to_the_largest_gives_the_same_logits(opened):
    images = batch(3)
    together = opened.infer(images)
    for count in (1, 2):
        np.testing.assert_allclose(opened.infer(images[:count]), together[:count], rtol=1e-6)


def test_batch_need_not_be_contiguous(opened):
    images = batch(3)[:, :, ::-1]
    np.testing.assert_array_equal(opened.infer(images), opened.infer(np.ascontiguousarray(images)))


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (batch(4), "holds 4 pictures; this bundle takes 1 to 3"),
        (batch(1)[:0], "holds 0 pictures"),
        (batch(1).astype(np.float32), r"takes uint8 \[B, 16, 24, 3\]"),
        (batch(1)[0], "preprocess.fit"),
        (batch(1)[:, :8], "preprocess.fit"),
        (batch(1).transpose(0, 3, 1, 2), "preprocess.fit"),
    ],
)
def test_batch_that_does_not_fit_is_refused_with_the_mend(opened, images, reason):
    with pytest.raises(BackendError, match=reason):
        opened.infer(images)


def test_threads_may_share_an_engine(opened):
    images = batch(2)
    expected = opened.infer(images)
    results: list[np.ndarray] = []

    def work() -> None:
        results.extend(opened.infer(images) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 60
    assert all((result == expected).all() for result in results)


def test_closed_engine_says_so(make_bundle):
    with open_backend(make_bundle(), CPU) as backend:
        assert backend.name == CPU
    backend.close()
    with pytest.raises(BackendError, match="was closed"):
        backend.infer(batch(1))


def changed_spec(spec: InputSpec | OutputSpec, **changes: object) -> InputSpec | OutputSpec:
    return msgspec.structs.replace(spec, **changes)


@pytest.mark.parametrize(
    ("part", "changes", "reason"),
    [
        ("input", {"name": "picture"}, r"inputs are \[image\], the manifest says 'picture'"),
        ("output", {"name": "scores"}, r"outputs are \[logits\], the manifest says 'scores'"),
        ("input", {"height": 32}, r"image is \['B', 16, 24, 3\], .* \['any', 32, 24, 3\]"),
        ("output", {"stride": 8}, r"logits is \['B', 3, 4, 6\], .* \['any', 3, 2, 3\]"),
    ],
)
def test_graph_at_odds_with_the_manifest_is_refused_naming_both(
    make_bundle, manifest, part, changes, reason
):
    bundle = make_bundle(**{part: changed_spec(getattr(manifest, part), **changes)})
    with pytest.raises(BackendError, match=reason) as caught:
        open_backend(bundle, CPU)
    assert "model.onnx" in str(caught.value)


def test_frozen_batch_is_refused_where_the_manifest_promises_batches(
    make_bundle, manifest, colour_model
):
    frozen = colour_model(batch=1)
    with pytest.raises(BackendError, match=r"image is \[1, 16, 24, 3\], the manifest says \['any'"):
        open_backend(make_bundle(frozen), CPU)
    alone = msgspec.structs.replace(manifest.input, max_batch=1)
    with open_backend(make_bundle(frozen, input=alone), CPU) as backend:
        assert backend.infer(batch(1)).shape == (1, 3, 4, 6)


def test_graph_of_another_type_is_refused(make_bundle, colour_model):
    model = onnx.load_from_string(colour_model())
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    with pytest.raises(BackendError, match=r"image is tensor\(float\), .* tensor\(uint8\)"):
        open_backend(make_bundle(model.SerializeToString()), CPU)


def test_output_that_comes_out_in_another_shape_is_an_error(make_bundle, colour_model):
    model = onnx.load_from_string(colour_model(height=32))
    for tensor in (model.graph.input[0], model.graph.output[0]):
        tensor.type.tensor_type.shape.dim[2 if tensor.name == "logits" else 1].dim_param = "free"
        tensor.type.tensor_type.shape.dim[3 if tensor.name == "logits" else 2].dim_param = "wide"
    model.graph.node[2].attribute.append(onnx.helper.make_attribute("pads", [0, 0, 4, 0]))
    with (
        open_backend(make_bundle(model.SerializeToString()), CPU) as backend,
        pytest.raises(BackendError, match=r"gave logits \(1, 3, 5, 6\), the manifest says"),
    ):
        backend.infer(batch(1))


@pytest.mark.parametrize("model", [b"not a graph", b"\0" * 100])
def test_what_is_no_graph_is_one_clear_error(make_bundle, model, capfd):
    with pytest.raises(BackendError, match=r"can not load .*model\.onnx") as caught:
        open_backend(make_bundle(model), CPU)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_loading_and_running_print_nothing(make_bundle, capfd):
    with open_backend(make_bundle(), "auto") as backend:
        backend.infer(batch(3))
    assert capfd.readouterr() == ("", "")


def test_external_weights_are_read_from_the_bundle(tmp_path: Path, manifest, colour_model):
    from knet_runtime.bundle import write_bundle

    model = onnx.load_from_string(colour_model())
    onnx.save(
        model,
        str(tmp_path / "model.onnx"),
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
    )
    artefact = msgspec.structs.replace(manifest.artefacts[0], external_data=("model.onnx.data",))
    changed = msgspec.structs.replace(manifest, artefacts=(artefact,))
    files = {name: tmp_path / name for name in ("model.onnx", "model.onnx.data")}
    bundle = write_bundle(tmp_path / "x.knet", changed, files)
    with open_backend(bundle, CPU) as backend:
        assert backend.infer(batch(1)).shape == (1, 3, 4, 6)


def test_unknown_and_planned_engines_are_named(make_bundle):
    bundle = make_bundle()
    with pytest.raises(BackendError, match="there is no engine 'cpu': use auto, onnxruntime-cpu"):
        open_backend(bundle, "cpu")
    with pytest.raises(BackendUnavailable, match="tensorrt is not supported in this version"):
        open_backend(bundle, "tensorrt")


@no_cuda_build
def test_cuda_without_a_cuda_build_names_the_mend(make_bundle):
    with pytest.raises(BackendUnavailable, match="pip install onnxruntime-gpu"):
        open_backend(make_bundle(), "onnxruntime-cuda")


@no_cuda_build
def test_auto_without_cuda_takes_the_cpu_and_logs_why(make_bundle, caplog):
    with caplog.at_level(logging.INFO), open_backend(make_bundle()) as backend:
        assert backend.name == CPU
    assert "engine onnxruntime-cpu: this onnxruntime is built without CUDA" in caplog.text


@no_cuda_build
def test_silent_fall_back_to_the_cpu_is_refused(make_bundle, monkeypatch, caplog):
    """As on a machine with onnxruntime-gpu but no driver: the session comes up on the CPU."""
    monkeypatch.setattr(ort_module, "cuda_is_built_in", lambda: True)
    real = onnxruntime.InferenceSession

    def on_cpu(model: object, options: object, providers: object, **rest: object) -> object:
        return real(model, options, providers=["CPUExecutionProvider"], **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", on_cpu)
    bundle = make_bundle()
    with pytest.raises(BackendUnavailable, match="it fell back to the CPU; it needs an NVIDIA"):
        open_backend(bundle, "onnxruntime-cuda")
    with caplog.at_level(logging.INFO), open_backend(bundle, "auto") as backend:
        assert backend.name == CPU
    assert "onnxruntime-cuda does not work" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_is_built_in(), reason="needs onnxruntime-gpu")
def test_cuda_gives_the_logits_of_the_cpu(make_bundle):
    bundle = make_bundle()
    with open_backend(bundle, CPU) as cpu, open_backend(bundle, "onnxruntime-cuda") as cuda:
        np.testing.assert_allclose(cuda.infer(batch(3)), cpu.infer(batch(3)), rtol=1e-5)


def test_probe_tries_every_engine():
    statuses = {status.name: status for status in probe_engines()}
    assert list(statuses)[: len(ENGINES)] == list(ENGINES)
    assert statuses[CPU].available
    assert onnxruntime.__version__ in statuses[CPU].detail
    assert not statuses["tensorrt"].available
    assert "not supported in this version" in statuses["openvino"].detail
    if not cuda_is_built_in():
        assert not statuses["onnxruntime-cuda"].available
        assert "pip install onnxruntime-gpu" in statuses["onnxruntime-cuda"].detail


def test_probe_reports_an_onnxruntime_that_can_not_be_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "knet_runtime.backends.ort")
    monkeypatch.delattr(backends, "ort")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with contextlib.ExitStack() as stack:
        stack.callback(sys.modules.__setitem__, "knet_runtime.backends.ort", ort_module)
        statuses = probe_engines()
    assert not any(status.available for status in statuses)
    assert "can not be imported" in statuses[0].detail
    assert "pip install" in statuses[0].detail


def test_two_onnxruntimes_are_named_with_the_mend(monkeypatch):
    def version(name: str) -> str:
        if name in ("onnxruntime", "onnxruntime-gpu"):
            return "1.0"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    clash = onnxruntime_clash()
    assert clash is not None
    assert "onnxruntime and onnxruntime-gpu are both installed" in clash
    assert "pip install onnxruntime-gpu" in clash
    assert all(clash in status.detail for status in probe_engines() if status.name in ENGINES)


def test_one_onnxruntime_is_no_clash(monkeypatch):
    def version(name: str) -> str:
        if name == "onnxruntime":
            return "1.0"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert onnxruntime_clash() is None


def test_tiny_graph_is_a_real_one():
    onnx.checker.check_model(onnx.load_from_string(ort_module._TINY_GRAPH))
    assert "onnxruntime" in try_provider(CPU)


def test_threads_are_no_more_than_this_process_may_use(monkeypatch):
    assert 1 <= cpu_budget() <= (os.cpu_count() or 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    read_text = Path.read_text
    for quota, threads in (("150000 100000", 2), ("max 100000", 64), ("1000 100000", 1)):

        def read(self: Path, quota: str = quota) -> str:
            return quota if self.name == "cpu.max" else read_text(self)

        monkeypatch.setattr(Path, "read_text", read)
        assert cpu_budget() == threads
