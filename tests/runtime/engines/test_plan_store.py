"""Which engine of a bundle is handed out, and how the others are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from knet_runtime.bundle.manifest import SizeRange
from knet_runtime.bundle.store import Bundle, open_bundle
from knet_runtime.engines import (
    engine_spec,
    hardware as gpu_module,
    open_engine,
    tensorrt as tensorrt_module,
)
from knet_runtime.engines.cuda import Cuda, explain, plain
from knet_runtime.engines.hardware import Gpu, this_gpu
from knet_runtime.engines.plan_store import (
    BuildOptions,
    PlanRecord,
    Profile,
    Shape,
    digest,
    find_plan,
    graph_hashes,
    store_plan,
)
from knet_runtime.engines.tensorrt import load_tensorrt
from knet_runtime.errors import EngineError, EngineUnavailable, OutputError

ORIN = Gpu("Orin", "sm87", "CUDA 12.6")
PLAN = b"ftrt" + bytes(range(256))
WHOLE = Profile(Shape(1, 16, 24), Shape(1, 16, 24), Shape(3, 16, 24))


@pytest.fixture
def bundle(make_bundle: Callable[..., Bundle]) -> Bundle:
    return make_bundle()


def record_of(bundle: Bundle, **changes: Any) -> PlanRecord:
    record = PlanRecord(
        engine="tensorrt",
        version="10.3.0",
        kind="logits",
        precision="fp32",
        files=graph_hashes(bundle, "logits"),
        gpu=ORIN,
        options=BuildOptions(WHOLE),
        sha256=digest(PLAN),
        bytes=len(PLAN),
        seconds=1.5,
        built="2026-01-01T00:00:00+00:00",
    )
    return msgspec.structs.replace(record, **changes)


def find(bundle: Bundle, version: str = "10.3.0", gpu: Gpu = ORIN) -> Any:
    return find_plan(bundle, "tensorrt", "logits", version, gpu)


def test_stored_engine_is_found_and_the_bundle_stays_whole(bundle: Bundle) -> None:
    stored = store_plan(bundle, PLAN, record_of(bundle))
    assert stored.path.name == f"tensorrt-{stored.record.key}.plan"
    assert len(stored.record.key) == 16
    found = find(open_bundle(bundle.path))
    assert found == stored
    assert found.read() == PLAN
    assert sorted(path.suffix for path in stored.path.parent.iterdir()) == [".json", ".plan"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"version": "10.16.0"}, "was built by tensorrt 10.16.0, this is 10.3.0"),
        ({"gpu": Gpu("RTX 4090", "sm89", "CUDA 12.6")}, "was built on RTX 4090 .sm89."),
        ({"gpu": Gpu("Orin", "sm87", "CUDA 12.2")}, "with driver CUDA 12.2, this is CUDA 12.6"),
        ({"files": {"model.onnx": "0" * 64}}, "another graph or other weights"),
        ({"kind": "classmap"}, "gives classmap, not logits"),
        ({"gpu": None, "targets": ("sm86", "sm89")}, "was built for sm86, sm89, this GPU is sm87"),
        (
            {"options": BuildOptions(Profile(*[Shape(1, 32, 24)] * 3))},
            "takes 1x32x24 to 1x32x24, not 16x24 pixels",
        ),
    ],
)
def test_engine_for_something_else_is_refused_by_what_differs(
    bundle: Bundle, change: dict[str, Any], told: str
) -> None:
    store_plan(bundle, PLAN, record_of(bundle, **change))
    with pytest.raises(EngineUnavailable, match=told) as caught:
        find(bundle)
    command = f"knet-deploy build {bundle.path} --engine tensorrt --graph logits"
    assert command in str(caught.value)


def test_every_build_choice_has_a_key_of_its_own(bundle: Bundle) -> None:
    records = [
        record_of(bundle),
        record_of(bundle, version="10.4.0"),
        record_of(bundle, engine="tensorrt-rtx"),
        record_of(bundle, kind="classmap"),
        record_of(bundle, files={"model.onnx": "0" * 64}),
        record_of(bundle, gpu=Gpu("Orin", "sm87", "CUDA 12.8")),
        record_of(bundle, gpu=None, targets=("sm86",)),
        record_of(bundle, options=BuildOptions(WHOLE, workspace=64)),
        record_of(bundle, options=BuildOptions(WHOLE, optimization_level=1)),
    ]
    assert len({record.key for record in records}) == len(records)
    again = record_of(bundle, seconds=9.0, built="2027-01-01T00:00:00+00:00", sha256="0" * 64)
    assert again.key == records[0].key


def test_the_nearest_engine_is_named_and_the_right_one_taken_beside_it(bundle: Bundle) -> None:
    far = Gpu("RTX 4090", "sm89", "CUDA 12.2")
    store_plan(bundle, PLAN, record_of(bundle, gpu=far, version="11.0.0"))
    near = store_plan(bundle, PLAN, record_of(bundle, version="11.0.0"))
    with pytest.raises(EngineUnavailable, match=near.path.name):
        find(bundle)
    right = store_plan(bundle, PLAN, record_of(bundle))
    assert find(bundle) == right


def test_the_latest_of_several_that_fit_is_taken(bundle: Bundle) -> None:
    store_plan(bundle, PLAN, record_of(bundle))
    options = BuildOptions(WHOLE, optimization_level=5)
    later = record_of(bundle, options=options, built="2026-02-01T00:00:00+00:00")
    latest = store_plan(bundle, PLAN, later)
    assert find(bundle) == latest


def test_engine_ahead_of_time_runs_on_its_targets(bundle: Bundle) -> None:
    record = record_of(bundle, gpu=None, targets=("sm86", "sm87"))
    stored = store_plan(bundle, PLAN, record)
    assert find(bundle) == stored


def test_engine_of_a_range_is_found_at_every_size_in_it(make_bundle: Callable[..., Bundle]) -> None:
    spec = msgspec.structs.replace(
        make_bundle().manifest.input, sizes=SizeRange((8, 8), (64, 64), 8)
    )
    bundle = make_bundle(input=spec)
    narrow = Profile(Shape(1, 16, 16), Shape(1, 16, 24), Shape(3, 32, 32))
    store_plan(bundle, PLAN, record_of(bundle, options=BuildOptions(narrow)))
    assert find(bundle.with_input_size((32, 32)))
    with pytest.raises(EngineUnavailable, match="not 64x32 pixels"):
        find(bundle.with_input_size((64, 32)))


def test_flipped_byte_in_a_plan_is_refused(bundle: Bundle) -> None:
    stored = store_plan(bundle, PLAN, record_of(bundle))
    broken = bytearray(PLAN)
    broken[100] ^= 1
    stored.path.write_bytes(broken)
    with pytest.raises(EngineUnavailable, match=r"is damaged .* not loaded: .*--force"):
        find(bundle).read()


@pytest.mark.parametrize("text", ["", "{}", "[", '{"engine": "tensorrt", "colour": 1}'])
def test_engine_with_a_broken_record_is_refused(bundle: Bundle, text: str) -> None:
    stored = store_plan(bundle, PLAN, record_of(bundle))
    stored.path.with_suffix(".json").write_text(text)
    with pytest.raises(EngineUnavailable, match="record that cannot be understood"):
        find(bundle)


def test_plan_without_a_record_does_not_count(bundle: Bundle) -> None:
    stored = store_plan(bundle, PLAN, record_of(bundle))
    stored.path.with_suffix(".json").unlink()
    with pytest.raises(EngineUnavailable, match="no record that can be read"):
        find(bundle)


def test_record_that_was_edited_no_longer_fits_its_name(bundle: Bundle) -> None:
    stored = store_plan(bundle, PLAN, record_of(bundle, version="10.16.0"))
    path = stored.path.with_suffix(".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": "10.3.0"}))
    with pytest.raises(EngineUnavailable, match="not named after its record"):
        find(bundle)


def test_bundle_without_engines_says_how_to_build_one(bundle: Bundle) -> None:
    with pytest.raises(EngineUnavailable, match=r"no tensorrt plan .*knet-deploy build"):
        find(bundle)


def test_store_that_cannot_be_written_leaves_nothing(bundle: Bundle) -> None:
    (bundle.path / "engines").write_text("a file where the folder is to be")
    with pytest.raises(OutputError):
        store_plan(bundle, PLAN, record_of(bundle))
    (bundle.path / "engines").unlink()

    def fail(path: Path, data: bytes) -> None:
        if path.suffix == ".json":
            raise OSError(28, "No space left on device")
        path.write_bytes(data)

    from knet_runtime.engines import plan_store

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_store, "write_atomic", fail)
        with pytest.raises(OutputError, match="free some space"):
            store_plan(bundle, PLAN, record_of(bundle))
    assert not (bundle.path / "engines").exists()


def test_reasons_lose_the_places_in_the_source_and_gain_advice() -> None:
    # The first as TensorRT-RTX 1.7.1 wrote it; the others by hand, after NVIDIA's documentation.
    old = (
        "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([pass.cpp:337: "
        "check_turing_op_compatibility] Cannot compile operation 'classifier/MatMul_U116' for "
        "Turing (SM75): FP32 GEMM is not supported. In compileGraph at "
        "/_src/optimizer/myelin/codeGenerator.cpp:2012)"
    )
    assert plain(old) == (
        "Myelin (Cannot compile operation 'classifier/MatMul_U116' for Turing (SM75): FP32 GEMM is "
        "not supported.)"
    )
    assert "too old" in explain([old])
    full = "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)"
    assert "--workspace" in explain([full])
    foreign = "Error Code 6: The engine plan file is generated on an incompatible device, expecting"
    assert "another GPU" in explain([foreign])
    noise = "Error Code 1: Cuda Runtime (cudaError 35: CUDA driver version is insufficient)"
    assert "too old" in explain([noise, old])
    assert "no NVIDIA driver" in explain([noise])
    assert explain([]) == "it gave no reason"


def test_machine_without_a_gpu_is_told_so(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_module, "DRIVER_LIBRARY", "libno-such-driver.so.1")
    assert this_gpu() is None
    monkeypatch.setattr(tensorrt_module, "load_tensorrt", lambda _: np)  # any module
    with pytest.raises(EngineUnavailable, match="finds no NVIDIA GPU"):
        open_engine(bundle, "tensorrt", "logits")
    with pytest.raises(EngineUnavailable, match="finds no NVIDIA GPU"):
        engine_spec("tensorrt-rtx").probe("tensorrt-rtx")


def test_missing_and_old_tensorrt_are_named_with_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text("__version__ = '8.6.1'\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EngineUnavailable, match=r"8\.6\.1 is too old.*knet-deploy\[tensorrt\]"):
        load_tensorrt("tensorrt")
    (tmp_path / "tensorrt_rtx.py").write_text("raise ImportError('libtensorrt_rtx.so.1')\n")
    with pytest.raises(EngineUnavailable, match=r"libtensorrt_rtx.*pip install"):
        load_tensorrt("tensorrt-rtx")


def test_cuda_without_a_driver_is_an_error_and_no_crash() -> None:
    pytest.importorskip("cuda.bindings.runtime")
    if this_gpu() is not None:
        pytest.skip("this machine has a GPU")
    with pytest.raises(EngineError, match="driver"):
        Cuda()
