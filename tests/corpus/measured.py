"""Bad files, read in a process that measures itself: what the readers of both corpora share."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import knet_runtime


def report(read: Callable[[Path], dict[str, Any]], limit: int) -> None:
    """What such a process does: a line of JSON for each file of its command line.

    It holds what ``read`` returns, the file's name, seconds, and the highest memory of the process
    so far in MiB. ``limit``, in bytes, keeps a fault from taking the machine's memory.
    """
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for path in map(Path, sys.argv[1:]):
        print(json.dumps({"begins": path.name}), flush=True)  # noqa: T201
        began = time.monotonic()
        line = {
            "name": path.name,
            **read(path),
            "seconds": round(time.monotonic() - began, 3),
            "peak_mib": _peak_mib(),
        }
        print(json.dumps(line), flush=True)  # noqa: T201


def _peak_mib() -> int:
    """Of this program only; what getrusage says includes the program that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def read_apart(reader: str, paths: Sequence[Path], timeout: float) -> list[dict[str, Any]]:
    """The lines that the script ``reader`` of this folder reports; a file at which it stays longer
    than ``timeout`` seconds is named."""
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name(reader)), *map(str, paths)],
        env={**os.environ, "PYTHONPATH": str(Path(knet_runtime.__file__).parent.parent)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            out, err = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            child.kill()
            out, err = child.communicate()
    lines = [json.loads(line) for line in out.splitlines()]
    assert child.returncode == 0, f"at {lines[-1] if lines else 'its start'}: {err[-2000:]}"
    assert err == ""
    return [line for line in lines if "name" in line]
