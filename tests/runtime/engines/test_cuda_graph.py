"""TensorRT's engine over a simulated GPU: buffers, CUDA graphs, and what is freed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import cv2
import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from knet_deploy.cli.main import main
from knet_runtime.bundle.store import Bundle
from knet_runtime.engines import open_engine, tensorrt as tensorrt_module
from knet_runtime.engines.cuda import Cuda
from knet_runtime.engines.hardware import Gpu, this_gpu
from knet_runtime.engines.plan_store import (
    BuildOptions,
    PlanRecord,
    Profile,
    Shape,
    digest,
    graph_hashes,
    store_plan,
)
from knet_runtime.engines.tensorrt import TensorRTEngine, load_tensorrt
from knet_runtime.errors import EngineError, EngineUnavailable

from .simulated_gpu import SimulatedContext, SimulatedCuda, SimulatedTensorRT

GPU = Gpu("Orin", "sm87", "CUDA 12.6")
PLAN = b"ftrt" + bytes(range(64))


class Machine:
    """A bundle with a stored engine on a machine with the simulated GPU."""

    def __init__(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bundle = bundle
        self.cuda = SimulatedCuda()
        self.cpu = open_engine(bundle, "onnxruntime-cpu", "logits")
        self.context = SimulatedContext(self.cuda, lambda batch: self.cpu.infer(batch)["logits"])
        spec = bundle.manifest.input
        logits = bundle.graph("logits").outputs[0].shape(spec.size)
        self.module = SimulatedTensorRT(
            self.context, {"image": (-1, spec.height, spec.width, 3), "logits": (-1, *logits)}
        )
        self._monkeypatch = monkeypatch
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", self.cuda)
        monkeypatch.setattr(tensorrt_module, "this_gpu", lambda: GPU)

    def open(self, engine: str = "tensorrt") -> TensorRTEngine:
        spec = self.bundle.manifest.input
        least = Shape(1, spec.height, spec.width)
        most = msgspec.structs.replace(least, batch=3)
        record = PlanRecord(
            engine=engine,
            version=self.module.__version__,
            kind="logits",
            precision="fp32",
            files=graph_hashes(self.bundle, "logits"),
            gpu=GPU,
            options=BuildOptions(Profile(least, least, most)),
            sha256=digest(PLAN),
            bytes=len(PLAN),
            seconds=1.0,
            built="2026-01-01T00:00:00+00:00",
        )
        store_plan(self.bundle, PLAN, record)
        self._monkeypatch.setattr(tensorrt_module, "load_tensorrt", lambda _: self.module)
        return TensorRTEngine(self.bundle, engine, "logits")

    def images(self, size: int, seed: int) -> NDArray[np.uint8]:
        spec = self.bundle.manifest.input
        shape = (size, spec.height, spec.width, 3)
        return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)

    def check(self, loaded: TensorRTEngine, sizes: list[int]) -> None:
        """Every batch gives its own result, and earlier ones stay what they were."""
        batches = [self.images(size, seed) for seed, size in enumerate(sizes)]
        results = [loaded.infer(batch)["logits"] for batch in batches]
        for batch, result in zip(batches, results, strict=True):
            np.testing.assert_array_equal(result, self.cpu.infer(batch)["logits"])


@pytest.fixture
def machine(
    make_bundle: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Machine]:
    machine = Machine(make_bundle(), monkeypatch)
    yield machine
    assert machine.cuda.held == {}, "freed, all of it, once"


def test_two_batches_of_a_size_make_a_graph_that_computes_anew_each_time(machine: Machine) -> None:
    with machine.open() as loaded:
        machine.check(loaded, [1, 1, 1, 1, 1])
    calls = machine.cuda.calls
    assert calls.count("execute_async_v3") == 3  # plainly, plainly, and once to be captured
    assert calls.count("cudaGraphLaunch") == 3
    assert calls.count("cudaGraphDestroy") == calls.count("cudaGraphInstantiate") == 1


def test_batches_of_changing_size_never_meet_another_ones_graph(machine: Machine) -> None:
    with machine.open() as loaded:
        machine.check(loaded, [1, 2, 1, 1, 1, 2, 2, 2, 3, 1, 3, 3, 3, 1])
    assert machine.cuda.calls.count("cudaGraphLaunch") == 3


@pytest.mark.parametrize(
    "call", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"]
)
def test_without_a_graph_it_runs_plainly_and_says_so_once(
    machine: Machine, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    if call == "cudaStreamBeginCapture":
        # Nothing was begun, so nothing may be ended.
        machine.cuda.cudaStreamBeginCapture = lambda stream, mode: (1,)  # type: ignore[method-assign]
    else:
        machine.cuda.failing.add(call)
    with caplog.at_level(logging.INFO), machine.open() as loaded:
        machine.check(loaded, [1, 1, 1, 2, 2, 2])
    told = [text for text in caplog.messages if "without a CUDA graph" in text]
    assert len(told) == 1
    assert "operation not permitted" in told[0]
    assert machine.cuda.calls.count("cudaGraphLaunch") == 0


def test_a_network_that_cannot_be_captured_runs_plainly(machine: Machine) -> None:
    with machine.open() as loaded:
        begin = machine.cuda.cudaStreamBeginCapture

        def refuse(stream: int, mode: int) -> object:
            machine.context.refuses = True
            return begin(stream, mode)

        machine.cuda.cudaStreamBeginCapture = refuse  # type: ignore[method-assign,assignment]
        end = machine.cuda.cudaStreamEndCapture

        def recover(stream: int) -> object:
            machine.context.refuses = False
            return end(stream)

        machine.cuda.cudaStreamEndCapture = recover  # type: ignore[method-assign,assignment]
        machine.check(loaded, [1, 1, 1])
    assert "cudaGetLastError" in machine.cuda.calls


def test_an_engine_that_fails_in_the_middle_is_an_error_and_no_other_engine(
    machine: Machine,
) -> None:
    with machine.open() as loaded:
        machine.check(loaded, [1, 1])
        machine.cuda.failing.add("cudaGraphLaunch")
        with pytest.raises(EngineError, match="cudaGraphLaunch failed: operation not permitted"):
            loaded.infer(machine.images(1, 9))
        machine.context.refuses = True
        with pytest.raises(EngineError, match="failed on a batch of 2"):
            loaded.infer(machine.images(2, 9))
    with pytest.raises(EngineError, match="was closed"):
        loaded.infer(machine.images(1, 9))


def test_a_gpu_that_fails_midway_ends_the_run_and_no_other_engine_takes_over(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.open().close()
    images = tmp_path / "images"
    images.mkdir()
    for index, image in enumerate(machine.images(9, 0)):
        cv2.imwrite(str(images / f"{index}.png"), image)
    launch = machine.cuda.cudaGraphLaunch

    def tire(graph: int, stream: int) -> tuple[object, ...]:
        if machine.cuda.calls.count("cudaGraphLaunch") == 3:
            machine.cuda.failing.add("cudaGraphLaunch")
        return launch(graph, stream)

    machine.cuda.cudaGraphLaunch = tire  # type: ignore[method-assign,assignment]
    words = ["--bundle", str(machine.bundle.path), "--engine", "tensorrt", "--self-test", "off"]
    code = main(["run", str(images), *words, "--masks", str(tmp_path / "masks")])
    assert code == 1
    assert "error: CUDA: cudaGraphLaunch failed: operation not permitted" in capsys.readouterr().err
    # The warm-up and the first image ran plainly; the second to fourth were the graph's.
    assert len(list((tmp_path / "masks").glob("*.png"))) == 4
    assert (tmp_path / "masks" / "PARTIAL.txt").exists()


def test_tensorrt_rtx_is_told_to_make_graphs_itself(machine: Machine) -> None:
    machine.module.rtx()
    with machine.open("tensorrt-rtx") as loaded:
        machine.check(loaded, [1, 1, 1, 2, 2])
    assert machine.module.config.cuda_graph_strategy == "whole"
    assert "cudaStreamBeginCapture" not in machine.cuda.calls


def test_tensorrt_rtx_before_graphs_runs_plainly(machine: Machine) -> None:
    machine.module.rtx()
    del machine.module.config.cuda_graph_strategy
    with machine.open("tensorrt-rtx") as loaded:
        machine.check(loaded, [1, 1, 1, 2])
    assert not hasattr(machine.module.config, "cuda_graph_strategy")
    assert "cudaStreamBeginCapture" not in machine.cuda.calls


@pytest.mark.tensorrt
def test_what_is_asked_of_tensorrt_rtx_is_there() -> None:
    try:
        module = load_tensorrt("tensorrt-rtx")
    except EngineUnavailable as error:
        pytest.skip(str(error))
    assert hasattr(module.IRuntimeConfig, "cuda_graph_strategy")
    assert hasattr(module.CudaGraphStrategy, "WHOLE_GRAPH_CAPTURE")
    for name in ("set_input_shape", "infer_shapes", "set_tensor_address", "execute_async_v3"):
        assert hasattr(module.IExecutionContext, name)


def test_what_is_asked_of_cuda_is_there() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    simulated = {name for name in dir(SimulatedCuda) if name.startswith("cuda")}
    assert {name for name in simulated if not hasattr(runtime, name)} == set()
    for kind in ("cudaMemcpyKind", "cudaStreamCaptureMode", "cudaError_t"):
        for name in vars(getattr(SimulatedCuda, kind)):
            assert hasattr(getattr(runtime, kind), name)


@pytest.mark.gpu
def test_a_captured_copy_runs_on_the_gpu() -> None:
    if this_gpu() is None:
        pytest.skip("no NVIDIA GPU here")
    cuda = Cuda()
    try:
        there, back = (cuda.allocate((4, 8), np.dtype(np.uint8)) for _ in range(2))
        back = SimpleNamespace(host=back.host, device=there.device)  # type: ignore[assignment]

        def copy() -> None:
            cuda.upload(there, 4)
            cuda.download(back, 4)

        copy()
        cuda.wait()
        cuda.capture(copy)
        for value in (3, 7):
            there.host[:] = value
            cuda.launch()
            cuda.wait()
            assert (back.host == value).all()
    finally:
        cuda.close()
