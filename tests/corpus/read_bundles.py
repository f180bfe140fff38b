"""Opens bundles and runs their golden pictures, as the corpus' tests do in a process of its own.

    python tests/corpus/read_bundles.py BUNDLE... < /dev/null

Prints a line of JSON per bundle: name, the KnetError's type and text, seconds, and the highest
memory of the process so far in MiB. Anything else that happens is a traceback.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

from knet_runtime.bundle.store import open_bundle
from knet_runtime.engines import open_engine
from knet_runtime.errors import KnetError, ParityError
from knet_runtime.golden import replay

LIMIT = 4 * 2**30  # so that a fault cannot take the machine's memory; the test's cap is lower


def peak_mib() -> int:
    """Of this program only; what getrusage says includes the program that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    for path in map(Path, sys.argv[1:]):
        print(json.dumps({"begins": path.name}), flush=True)  # noqa: T201
        began, kind, message = time.monotonic(), "", ""
        try:
            bundle = open_bundle(path)
            with open_engine(bundle, "onnxruntime-cpu") as backend:
                report = replay(bundle, backend)
            if not report.passed:
                raise ParityError(f"{path}: the golden check fails: {report}")
        except KnetError as error:
            kind, message = type(error).__name__, str(error)
        line = {
            "name": path.name,
            "kind": kind,
            "error": message,
            "seconds": round(time.monotonic() - began, 3),
            "peak_mib": peak_mib(),
        }
        print(json.dumps(line), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
