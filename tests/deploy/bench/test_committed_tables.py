"""The tables of benchmarks/README.md are those of the committed results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
RESULTS = [
    path
    for pattern in ("speed-*.json", "growth.json", "operators.json", "curve*.json")
    for path in sorted((BENCHMARKS / "results").glob(pattern))
]


def test_there_are_results() -> None:
    assert RESULTS


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_readme_shows_what_was_measured(path: Path) -> None:
    shown = subprocess.run(
        [sys.executable, BENCHMARKS / "tables.py", path], capture_output=True, text=True, check=True
    ).stdout
    assert shown.count("\n") > 3
    for table in shown.strip().split("\n\n"):
        assert table in (BENCHMARKS / "README.md").read_text("utf-8")
