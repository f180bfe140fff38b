"""Engines that are built on this machine's GPU and run there, against the processor's results."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from knet_export.tensorrt.build import build_plan
from knet_export.tensorrt.profile import profile_of
from knet_runtime.bundle.manifest import Kind
from knet_runtime.bundle.store import Bundle, open_bundle
from knet_runtime.engines import open_engine
from knet_runtime.engines.hardware import gpu_name
from knet_runtime.engines.plan_store import BuildOptions
from knet_runtime.errors import EngineUnavailable
from knet_synthetic import Street

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(gpu_name() is None, reason="there is no NVIDIA GPU"),
]


@pytest.mark.parametrize("kind", ["logits", "classmap"])
@pytest.mark.parametrize("engine", ["tensorrt", "tensorrt-rtx"])
def test_an_engine_built_here_gives_the_results_of_the_processor(
    small_bundle: Bundle, tmp_path: Path, engine: str, kind: Kind
) -> None:
    pytest.importorskip("cuda.bindings.runtime")
    bundle = open_bundle(shutil.copytree(small_bundle.path, tmp_path / "copy.knet"))
    spec = bundle.manifest.input
    try:
        build_plan(bundle, engine, kind, BuildOptions(profile_of(spec)))
    except EngineUnavailable as error:
        pytest.skip(str(error))
    limits = bundle.graph(kind).tolerance
    with (
        open_engine(bundle, engine, kind) as gpu,
        open_engine(bundle, "onnxruntime-cpu", kind) as cpu,
    ):
        # Runs of one size, whose later batches are launches of a graph, and sizes that alternate.
        for turn, size in enumerate((1, 1, 1, 1, 2, 2, 2, 1, spec.max_batch, 2, 1, 1, 1)):
            size = min(size, spec.max_batch)
            shape = (spec.height, spec.width)
            images = np.stack([Street(turn, shape).frame(index)[0] for index in range(size)])
            got, expected = gpu.infer(images)[kind], cpu.infer(images)[kind]
            assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
            if kind == "classmap":
                assert (got == expected).mean() >= limits.agreement
            else:
                worst = np.abs(got - expected).max() / np.abs(expected).max()
                assert worst <= limits.max_logit_diff
