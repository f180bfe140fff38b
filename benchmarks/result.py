"""How every benchmark here keeps its numbers: JSON with the machine, versions and commit in it."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from knet_deploy.bench.machine import commit_of
from knet_runtime.engines.hardware import cpu_budget, processor_name


def keep(report: Mapping[str, object], output: Path | None, packages: Sequence[str]) -> None:
    """Write the report, and where it was made, to ``output``, or to stdout without one."""
    made = {
        "processor": processor_name(),
        "cores": cpu_budget(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "commit": commit_of(Path(__file__).resolve().parent),
    }
    text = json.dumps({**report, **made}, indent=1, ensure_ascii=False) + "\n"
    if output is None:
        sys.stdout.write(text)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
