"""An engine is one file: all who choose, list, test and measure engines see it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

import knet_runtime.engines
from knet_deploy.bench.target import BundleTarget
from knet_deploy.cli import bench
from knet_runtime.bundle.manifest import Parity
from knet_runtime.bundle.store import Bundle, open_bundle, record_parity
from knet_runtime.engines import engine_specs, open_engine, probe_engines, waits_for_verify
from knet_runtime.segmenter import Segmenter

ABACUS = '''
"""The colour model by NumPy: its logits are the means of the channels over 4 × 4 pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from knet_runtime.bundle.manifest import Kind
from knet_runtime.bundle.store import Bundle
from knet_runtime.engines.base import EngineSpec, check_batch, check_outputs
from knet_runtime.engines.hardware import processor_name
from knet_runtime.types import Closeable


class Abacus(Closeable):
    def __init__(self, bundle: Bundle, name: str, kind: Kind) -> None:
        self.name, self.kind, self.device = name, kind, processor_name()
        self._manifest = bundle.manifest

    def infer(self, batch: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        images = check_batch(self.name, self._manifest.input, batch)
        count, height, width, _ = images.shape
        means = images.reshape(count, height // 4, 4, width // 4, 4, 3).mean((2, 4))
        outputs = {"logits": means.transpose(0, 3, 1, 2)}
        return check_outputs(self.name, self._manifest, self.kind, count, outputs)

    def close(self) -> None:
        pass


SPECS = (
    EngineSpec(
        name="abacus",
        device="cpu",
        open=Abacus,
        probe=lambda name: "ten beads a wire",
        libraries=("numpy",),
        install="carve one",
        refuses={"bf16": "its beads are whole"},
        computes={"fp32": "beads"},
        rank=1,
    ),
)
'''
COMMANDS = """
import sys
import knet_runtime.engines
knet_runtime.engines.__path__.append(sys.argv[1])
from knet_deploy.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "abacus.py").write_text(ABACUS, encoding="utf-8")
    return tmp_path / "engines"


@pytest.fixture
def _installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = [*knet_runtime.engines.__path__, str(folder)]
    monkeypatch.setattr(knet_runtime.engines, "__path__", path)
    monkeypatch.setitem(sys.modules, "knet_runtime.engines.abacus", None)
    monkeypatch.delitem(sys.modules, "knet_runtime.engines.abacus")  # and again, at the end


@pytest.mark.usefixtures("_installed")
def test_it_is_opened_chosen_tested_and_measured(
    make_bundle: Callable[..., Bundle],
    parity: Callable[..., Parity],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bundle = make_bundle()
    images = np.full((2, 16, 24, 3), (10, 200, 30), np.uint8)
    with open_engine(bundle, "abacus") as engine:
        np.testing.assert_allclose(engine.infer(images)["logits"][:, 1], 200)
    with open_engine(bundle) as engine:  # it was never verified
        assert engine.name == "onnxruntime-cpu"
    assert waits_for_verify(bundle, "onnxruntime-cpu") == "abacus"

    record_parity(bundle, "logits", parity("abacus"))
    with Segmenter(open_bundle(bundle.path)) as segment:
        assert segment.engine == "abacus"
        assert (segment(images[0]).class_map == 1).all()
        tested = segment.self_test()
    assert tested is not None
    assert tested.passed

    assert ("abacus", True, "ten beads a wire") in [
        (status.name, status.available, status.detail) for status in probe_engines()
    ]
    working = [status.name for status in probe_engines() if status.available]
    entries = {entry.name: entry for entry in bench._bundle_entries({"": bundle}, working)}
    assert not entries["abacus"].gpu
    assert BundleTarget(bundle.path, "abacus").facts.precision == "beads"
    precise = make_bundle(precision="bf16")
    with pytest.raises(Exception, match=r"abacus cannot run .* its beads are whole"):
        open_engine(precise, "abacus")


def test_commands_list_it_and_take_it(make_bundle: Callable[..., Bundle], folder: Path) -> None:
    def call(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", COMMANDS, str(folder), *words],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    for command in ("run", "verify", "bench", "batch", "demo"):
        assert "abacus" in call(command, "--help"), command
    assert "abacus" not in call("build", "--help")  # it runs no plans
    found = json.loads(call("doctor", "--json"))
    assert {"name": "abacus", "ok": True, "detail": "ten beads a wire"} in found["engines"]
    bundle = make_bundle().path
    assert "passed" in call("verify", str(bundle), "--engine", "abacus")
    (record,) = open_bundle(bundle).graph("logits").parity
    assert (record.engine, record.passed) == ("abacus", True)


def test_importing_engines_imports_no_library_of_theirs() -> None:
    code = """
import sys
import knet_runtime.engines
knet_runtime.engines.engine_specs()
heavy = {"onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "cuda"} & set(sys.modules)
sys.exit(", ".join(heavy) or 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_engine_says_what_is_asked_of_it() -> None:
    for name, spec in engine_specs().items():
        assert msgspec.structs.asdict(spec)["name"] == name
        assert spec.libraries
        assert "pip install" in spec.install
    ranks = [spec.rank for spec in engine_specs().values() if spec.rank is not None]
    assert len(set(ranks)) == len(ranks)
