"""OpenVINO computes at the precision that the engine's name says, or not at all."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from knet_runtime.bundle.store import default_bundle_path, open_bundle
from knet_runtime.engines import engine_spec, open_engine
from knet_runtime.errors import EngineError, EngineUnavailable
from knet_runtime.golden import load_golden, replay

openvino = pytest.importorskip("openvino")

from knet_runtime.engines import openvino as module  # noqa: E402 (it imports openvino)

CPU = "onnxruntime-cpu"
HAS_BF16 = "BF16" in module._core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def test_packaged_model_gives_its_golden_results_in_f32():
    bundle = open_bundle(default_bundle_path())
    with open_engine(bundle, "openvino") as loaded:
        report = replay(bundle, loaded)
    assert report.passed
    assert report.max_logit_diff is not None
    assert report.max_logit_diff < 1e-4


_SIGNAL_AFTER_TWO = """
import faulthandler, gc, os, signal
from knet_runtime.engines import open_engine
from knet_runtime.bundle.store import default_bundle_path, open_bundle

faulthandler.enable()
signal.signal(signal.SIGUSR1, lambda *_: None)
bundle = open_bundle(default_bundle_path())
first, second = (open_engine(bundle, "openvino", kind) for kind in ("logits", "classmap"))
first.close()
del first
gc.collect()
second.close()
del second
gc.collect()
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_signals_arrive_after_two_of_them_were_closed_in_the_order_they_were_opened():
    done = subprocess.run([sys.executable, "-c", _SIGNAL_AFTER_TWO], timeout=120, check=False)
    assert done.returncode == 0


_WITHOUT_HOME = """
import os, pwd, sys
def unknown(_): raise KeyError("uid not found")
pwd.getpwuid = unknown
os.environ.pop("HOME", None)
from knet_runtime.engines import engine_spec, probe_engine
print(probe_engine(engine_spec("openvino")).available, "openvino_telemetry" in sys.modules)
"""


def test_a_user_without_a_home_has_it_too():
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_HOME], timeout=120, capture_output=True, text=True
    )
    assert done.stdout == "True False\n", done.stderr


@pytest.mark.skipif(not HAS_BF16, reason="this processor has no bf16")
def test_bf16_is_really_bf16_and_another_precision_than_f32():
    bundle = open_bundle(default_bundle_path())
    images = load_golden(bundle).images[:1]
    with open_engine(bundle, "openvino") as exact, open_engine(bundle, "openvino-bf16") as short:
        full, half = exact.infer(images)["logits"], short.infer(images)["logits"]
    difference = np.abs(full - half).max() / np.abs(full).max()
    assert 1e-3 < difference < 0.2


def test_bf16_without_the_hardware_names_what_to_use(make_bundle, monkeypatch):
    real = module._core()

    class Old:
        """A processor without bf16."""

        def get_property(self, device: str, name: str) -> list[str]:
            return [able for able in real.get_property(device, name) if able != "BF16"]

    monkeypatch.setattr(module, "_core", Old)
    with pytest.raises(EngineUnavailable, match="no bf16 arithmetic: use openvino or onnxruntime"):
        open_engine(make_bundle(), "openvino-bf16")


@pytest.mark.skipif(not HAS_BF16, reason="this processor has no bf16")
def test_precision_that_was_not_delivered_is_an_error(make_bundle, monkeypatch):
    """As when OpenVINO does not follow the hint that it is given."""
    monkeypatch.setattr(module, "_HINTS", {"openvino": "bf16", "openvino-bf16": "f32"})
    with pytest.raises(EngineError, match=r"openvino was to compute in f32 but runs \d+ op"):
        open_engine(make_bundle(), "openvino")
    with pytest.raises(EngineError, match="openvino-bf16 was to compute in bf16 but does not"):
        open_engine(make_bundle(), "openvino-bf16")


@pytest.mark.skipif(not HAS_BF16, reason="this processor has no bf16")
@pytest.mark.parametrize(
    ("precision", "element"), [("fp32", TensorProto.FLOAT), ("fp16", TensorProto.FLOAT16)]
)
def test_what_is_computed_is_what_the_engine_says(make_bundle, colour_model, precision, element):
    """An fp16 bundle too is computed in bf16, and bench's rows say so."""
    path = make_bundle(colour_model(element=element), precision=precision).file("model.onnx")
    compiled = module._core().compile_model(path, "CPU", module.settings_of("openvino-bf16"))
    found = {
        operation.get_rt_info()["runtimePrecision"].astype(str)
        for operation in compiled.get_runtime_model().get_ops()
    }
    assert "bf16" in found
    assert "f16" not in found
    assert engine_spec("openvino-bf16").computes[precision] == "bf16"


def shared_weight(transposed: bool) -> bytes:
    """Logits C W + C W, or C W + C Wᵀ, of the mean colours C, from one 3×3 weight W."""
    weight = np.random.default_rng(0).standard_normal((3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["planes"], ["small"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Transpose", ["small"], ["colours"], perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["colours", "weight"], ["once"]),
        helper.make_node("Transpose", ["weight"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["colours", "turned" if transposed else "weight"], ["twice"]),
        helper.make_node("Add", ["once", "twice"], ["sum"]),
        helper.make_node("Transpose", ["sum"], ["logits"], perm=[0, 3, 1, 2]),
    ]
    graph = helper.make_graph(
        nodes,
        "shared",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["B", 16, 24, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", 3, 4, 6])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def test_form_that_openvino_computes_wrongly_is_refused_by_name(make_bundle):
    bundle = make_bundle(shared_weight(transposed=True))
    with pytest.raises(EngineError, match="two products share the weight weight, one of them"):
        open_engine(bundle, "openvino")


def test_weight_that_is_shared_the_same_way_is_right(make_bundle):
    bundle = make_bundle(shared_weight(transposed=False))
    images = np.random.default_rng(1).integers(0, 256, (2, 16, 24, 3)).astype(np.uint8)
    with open_engine(bundle, "openvino") as loaded, open_engine(bundle, CPU) as expected:
        np.testing.assert_allclose(
            loaded.infer(images)["logits"], expected.infer(images)["logits"], rtol=1e-4
        )
