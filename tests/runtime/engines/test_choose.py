"""Which engine is opened, and that none is which was not proven."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from functools import partial

import msgspec
import numpy as np
import pytest

import knet_runtime.engines.openvino
from knet_runtime.bundle.manifest import Parity
from knet_runtime.bundle.store import Bundle, open_bundle, record_parity
from knet_runtime.engines import (
    EngineStatus,
    auto_order,
    default_graph,
    engine_specs,
    open_engine,
    probe_engines,
    unverified_reason,
    waits_for_verify,
    why_not_auto,
)
from knet_runtime.errors import EngineError, EngineUnavailable, ParityError
from knet_runtime.segmenter import Segmenter

CPU = "onnxruntime-cpu"
GPU = "A GPU"


@pytest.fixture
def recorded(make_bundle, parity) -> Callable[..., Bundle]:
    """A bundle with what verify recorded of its logits on these engines."""

    def record(*records: Parity) -> Bundle:
        bundle = make_bundle()
        for measured in records:
            record_parity(bundle, "logits", measured)
        return open_bundle(bundle.path)

    return record


@pytest.fixture
def with_gpu(monkeypatch) -> None:
    """As on a machine whose driver names a GPU."""
    monkeypatch.setattr(knet_runtime.engines, "gpu_name", lambda: GPU)


def test_every_preferred_engine_exists_and_the_one_that_runs_everywhere_is_last():
    order = [spec.name for spec in auto_order()]
    assert order == [
        "tensorrt",
        "tensorrt-rtx",
        "onnxruntime-tensorrt",
        "onnxruntime-tensorrt-rtx",
        "onnxruntime-cuda",
        "openvino-bf16",
        CPU,
    ]
    assert set(engine_specs()) - set(order) == {"openvino"}


def test_unknown_engine_is_named_with_those_that_there_are(make_bundle):
    with pytest.raises(EngineError, match="no engine 'cpu': use auto, onnxruntime-cpu") as caught:
        open_engine(make_bundle(), "cpu")
    assert all(engine in str(caught.value) for engine in engine_specs())


def test_auto_takes_the_cpu_when_nothing_was_measured(make_bundle, caplog):
    with caplog.at_level(logging.INFO), open_engine(make_bundle()) as loaded:
        assert loaded.name == CPU
    assert "engine tensorrt: not taken, " in caplog.text
    assert "engine onnxruntime-cpu: the first that may be taken here" in caplog.text


def test_auto_takes_an_engine_that_passed_here(recorded, parity, monkeypatch):
    opened = []

    def remember(bundle: Bundle, engine: str, kind: str) -> str:
        opened.append((engine, kind))
        return engine

    specs = engine_specs()
    specs["openvino-bf16"] = msgspec.structs.replace(specs["openvino-bf16"], open=remember)
    monkeypatch.setattr(knet_runtime.engines, "engine_specs", lambda: specs)
    bundle = recorded(parity("openvino-bf16"))
    open_engine(bundle)
    assert opened == [("openvino-bf16", "logits")]


@pytest.mark.parametrize(("passed", "device"), [(False, None), (True, "another processor")])
def test_auto_passes_over_an_engine_that_failed_or_passed_elsewhere(
    recorded, parity, passed, device
):
    bundle = recorded(parity("openvino-bf16", passed, device))
    assert why_not_auto(bundle, "openvino-bf16") is not None
    with open_engine(bundle) as loaded:
        assert loaded.name == CPU


def test_auto_runs_nothing_that_failed_even_on_the_cpu(recorded, parity):
    bundle = recorded(parity(CPU, passed=False))
    # verify itself needs the name then, too.
    advice = "on no engine of this machine.*: name one with --engine, to verify it again or to run"
    with pytest.raises(ParityError, match=advice):
        open_engine(bundle)
    with open_engine(bundle, CPU) as loaded:  # whoever names it may have it
        assert loaded.name == CPU
    with open_engine(recorded(parity(CPU, False, "another processor"))) as loaded:
        assert loaded.name == CPU


@pytest.mark.usefixtures("with_gpu")
def test_proven_engine_that_does_not_open_is_passed_over_aloud(recorded, parity, caplog):
    bundle = recorded(parity("onnxruntime-tensorrt-rtx", device=GPU))
    assert why_not_auto(bundle, "onnxruntime-tensorrt-rtx") is None
    with open_engine(bundle) as loaded:
        assert loaded.name == CPU
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "onnxruntime-tensorrt-rtx does not work" in warning.getMessage()


@pytest.mark.usefixtures("with_gpu")
def test_kinds_are_proven_one_by_one(make_bundle, colour_model, parity):
    bundle = make_bundle(classmap=colour_model(kind="classmap"))
    record_parity(bundle, "logits", parity("tensorrt", device=GPU))
    bundle = open_bundle(bundle.path)
    assert default_graph(bundle, "tensorrt") == "classmap"
    assert default_graph(bundle, "openvino") == "logits"
    assert why_not_auto(bundle, "tensorrt") == "it was never verified on A GPU"
    assert why_not_auto(bundle, "tensorrt", "logits") is None
    assert default_graph(make_bundle(), "tensorrt") == "logits"


def test_gpu_engine_needs_a_gpu(make_bundle, monkeypatch):
    monkeypatch.setattr(knet_runtime.engines, "gpu_name", lambda: None)
    assert "no NVIDIA GPU" in str(why_not_auto(make_bundle(), "tensorrt"))


def test_doubt_is_lifted_by_the_same_engine_and_device_only(recorded, parity):
    def doubted(*records: Parity) -> str | None:
        return unverified_reason(recorded(*records).graph("logits"), "openvino", "here")

    assert doubted() == "it was never verified on here"
    assert doubted(parity(CPU, device="here")) == "it was never verified on here"
    assert doubted(parity("openvino", device="there")) == "it was never verified on here"
    assert doubted(parity("openvino", False, "here")) == "it did not pass verify on here"
    assert doubted(parity("openvino", device="here")) is None


def test_onnxruntime_cpu_that_passed_elsewhere_is_not_in_doubt(recorded, parity):
    elsewhere = recorded(parity(CPU, device="there")).graph("logits")
    assert unverified_reason(elsewhere, CPU, "here") is None
    both = recorded(parity(CPU, device="there"), parity(CPU, False, "here")).graph("logits")
    assert unverified_reason(both, CPU, "here") == "it did not pass verify on here"
    assert unverified_reason(recorded().graph("logits"), CPU, "here") is not None


def test_segmenter_knows_its_doubt(recorded, parity):
    with Segmenter(recorded(), CPU) as segment:
        assert "never verified" in str(segment.unverified_reason)
    with Segmenter(recorded(parity(CPU)), CPU) as segment:
        assert segment.unverified_reason is None


@pytest.mark.parametrize("engine", ["onnxruntime-cpu", "openvino"])
def test_precision_that_an_engine_cannot_compute_is_refused(make_bundle, colour_model, engine):
    bundle = make_bundle(colour_model(element=16), precision="bf16")  # onnx.TensorProto.BFLOAT16
    with pytest.raises(EngineError, match=f"{engine} cannot run .* a bf16 bundle: .*openvino-bf"):
        open_engine(bundle, engine)


def test_refused_precisions_would_really_not_be_right(make_bundle, colour_model):
    """The same graph under a false label: ONNX Runtime has no such convolution, and OpenVINO, where
    the processor has bf16, does not compute it in the float32 that was asked for."""
    openvino = pytest.importorskip("openvino")
    bundle = make_bundle(colour_model(element=16))
    with pytest.raises(EngineError, match="Could not find an implementation for Conv"):
        open_engine(bundle, CPU)
    if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(EngineError, match=r"was to compute in f32 but runs .* in bf16"):
            open_engine(bundle, "openvino")


@pytest.mark.parametrize("engine", ["onnxruntime-cpu", "openvino"])
def test_fp16_bundle_runs_on_the_cpu(make_bundle, colour_model, engine):
    if engine == "openvino":
        pytest.importorskip("openvino")
    bundle = make_bundle(colour_model(element=10), precision="fp16")  # onnx.TensorProto.FLOAT16
    with open_engine(bundle, engine) as loaded:
        logits = loaded.infer(np.full((1, 16, 24, 3), 200, np.uint8))["logits"]
    np.testing.assert_allclose(logits, 200, rtol=1e-3)


def test_openvino_that_is_not_installed_is_the_pip_line(make_bundle, monkeypatch):
    again = knet_runtime.engines.openvino._core.__wrapped__  # which imports it
    monkeypatch.setattr(knet_runtime.engines.openvino, "_core", again)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EngineUnavailable, match=r'pip install "knet-deploy\[openvino\]"'):
        open_engine(make_bundle(), "openvino")


def test_probe_tries_every_engine(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", None)
    statuses = {status.name: status for status in probe_engines()}
    assert list(statuses) == list(engine_specs())
    assert statuses[CPU].available
    assert importlib.import_module("onnxruntime").__version__ in statuses[CPU].detail
    plugin = statuses["onnxruntime-tensorrt-rtx"]
    assert not plugin.available
    assert "pip install onnxruntime-ep-nv-tensorrt-rtx" in plugin.detail


def test_probe_reports_an_onnxruntime_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    broken = [status for status in probe_engines() if status.name.startswith("onnxruntime")]
    assert len(broken) == 4
    for status in broken:
        assert not status.available
        assert "onnxruntime cannot be imported" in status.detail
        assert "pip install" in status.detail


def test_only_what_works_here_and_was_never_tried_waits_for_verify(
    recorded, parity, with_gpu, monkeypatch
):
    works = {"onnxruntime-cuda", "openvino-bf16"}
    status = partial(EngineStatus, detail="")
    monkeypatch.setattr(
        knet_runtime.engines, "probe_engine", lambda spec: status(spec.name, spec.name in works)
    )
    bundle = recorded(parity(CPU))
    assert waits_for_verify(bundle, CPU) == "onnxruntime-cuda"
    assert waits_for_verify(bundle, "tensorrt") is None
    works.remove("onnxruntime-cuda")
    assert waits_for_verify(bundle, CPU) == "openvino-bf16"
    assert waits_for_verify(recorded(parity("openvino-bf16", passed=False)), CPU) is None
    monkeypatch.setattr(knet_runtime.engines, "gpu_name", lambda: None)
    works |= {"onnxruntime-cuda"}
    assert waits_for_verify(bundle, CPU) == "openvino-bf16"
