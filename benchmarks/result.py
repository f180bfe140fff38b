"""How every benchmark here keeps its numbers: JSON with the machine, versions and commit in it."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from knet_runtime.backends.machine import cpu_budget, processor_name


def keep(report: Mapping[str, object], output: Path | None, packages: Sequence[str]) -> None:
    """Write the report, and where it was made, to ``output``, or to stdout without one."""
    repository = Path(__file__).resolve().parent.parent
    commit = subprocess.run(
        ["git", "-C", str(repository), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
    ).stdout.strip()
    made = {
        "processor": processor_name(),
        "cores": cpu_budget(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "commit": commit,
    }
    text = json.dumps({**report, **made}, indent=1, ensure_ascii=False) + "\n"
    if output is None:
        sys.stdout.write(text)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
