"""What the scripts here share: a parser with ``--output``, and JSON with the machine in it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from knet_deploy.bench.machine import this_machine
from knet_runtime.engines.hardware import cpu_budget


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser for the script with this docstring."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, help="JSON; without it, to stdout")
    return parser


def write_result(report: Mapping[str, object], output: Path | None) -> None:
    """Write the report, and where it was made, to ``output``, or to stdout without one."""
    machine = msgspec.to_builtins(this_machine(cpu_budget()))
    text = json.dumps({**report, "machine": machine}, indent=1, ensure_ascii=False) + "\n"
    if output is None:
        sys.stdout.write(text)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
