"""A long run: memory, file handles and threads stay where they were after the first frames."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from knet_runtime.bundle.store import Bundle

SCRIPT = Path(__file__).parents[3] / "benchmarks/soak.py"


@pytest.mark.parametrize(
    "frames", [3_000, pytest.param(200_000, marks=[pytest.mark.soak, pytest.mark.timeout(7200)])]
)
def test_a_long_run_takes_no_more_memory_than_its_beginning(
    frames: int, tmp_path: Path, make_bundle: Callable[..., Bundle]
) -> None:
    if not SCRIPT.exists():
        pytest.skip("benchmarks/ is not beside the tests")
    report = tmp_path / "soak.json"
    given = ["--bundle", make_bundle().path, "--frames", str(frames), "--output", report]
    done = subprocess.run([sys.executable, SCRIPT, *given], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    numbers = json.loads(report.read_text())
    assert numbers["frames"] == frames
    assert numbers["passed"], {key: numbers[key] for key in ("rss_mib", "before", "after")}
