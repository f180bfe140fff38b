"""What takes long in a benchmark, and is proven once."""

from __future__ import annotations

import shutil
from functools import partialmethod
from pathlib import Path

import pytest
from made_once import made_once

from knet_deploy.bench.benchmark import Benchmark
from knet_deploy.bench.machine import Limits

PLAIN_FRAME = (90, 130)


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark that does not measure the machine, and does not pause."""
    monkeypatch.setattr(Benchmark, "limits", lambda _: Limits(1e10, 1e10))
    monkeypatch.setattr(Benchmark, "run", partialmethod(Benchmark.run, pause=0))


@pytest.fixture(scope="session")
def plain_graph(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``export_naive`` writes for frames of ``PLAIN_FRAME``."""
    from knet_deploy.bench.torch_baselines import export_naive
    from knet_train.checkpoint import read_checkpoint

    def make(folder: Path) -> None:
        loaded = read_checkpoint(checkpoint)
        export_naive(loaded.model, loaded.config.data.eval_size, PLAIN_FRAME, folder / "plain.onnx")

    return made_once(tmp_path_factory, "plain", make) / "plain.onnx"


@pytest.fixture
def _plain_before(plain_graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small network's plain graph is not exported anew."""

    def copy(_model: object, size: object, frame: object, path: Path) -> None:
        assert (size, frame) == ((64, 96), PLAIN_FRAME)
        for file in plain_graph.parent.glob("plain.onnx*"):  # weights may stand beside it
            shutil.copy(file, path.with_name(file.name))
        path.with_name("plain.onnx").rename(path)

    monkeypatch.setattr("knet_deploy.bench.torch_baselines.export_naive", copy)
