"""Opens bundles and runs their golden images, as the corpus' tests do in a process of its own.

    python tests/corpus/read_bundles.py BUNDLE... < /dev/null

Prints a line of JSON per bundle: name, the KnetError's type and text, seconds, and the highest
memory of the process so far in MiB. Anything else that happens is a traceback.
"""

from __future__ import annotations

from pathlib import Path

from measured import report

from knet_runtime.bundle.store import open_bundle
from knet_runtime.engines import open_engine
from knet_runtime.errors import KnetError, ParityError
from knet_runtime.golden import replay


def read(path: Path) -> dict[str, str]:
    """Open it and replay its golden tensors."""
    try:
        bundle = open_bundle(path)
        with open_engine(bundle, "onnxruntime-cpu") as engine:
            result = replay(bundle, engine)
        if not result.passed:
            raise ParityError(f"{path}: the golden check fails: {result}")
    except KnetError as error:
        return {"kind": type(error).__name__, "error": str(error)}
    return {"kind": "", "error": ""}


if __name__ == "__main__":
    report(read, limit=4 * 2**30)  # the test's cap is lower
