"""Reads videos to their end, as the corpus' tests do in a process of its own.

    python tests/corpus/read_videos.py VIDEO... < /dev/null

Prints a line of JSON per video: name, frames, the SourceError's text, seconds, and the highest
memory of the process so far in MiB. Anything else that happens is a traceback.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from pathlib import Path

from knet_runtime.errors import SourceError
from knet_runtime.sources.open import open_source

LIMIT = 6 * 2**30  # so that a fault can not take the machine's memory; the test's cap is lower


def peak_mib() -> int:
    """Of this program only; what getrusage says includes the program that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def main() -> None:
    logging.disable()  # warnings of damaged frames are meant
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    for path in map(Path, sys.argv[1:]):
        print(json.dumps({"begins": path.name}), flush=True)  # noqa: T201
        began, frames, message = time.monotonic(), 0, ""
        try:
            with open_source(path) as source:
                for _ in source:
                    frames += 1
        except SourceError as error:
            message = str(error)
        line = {
            "name": path.name,
            "frames": frames,
            "error": message,
            "seconds": round(time.monotonic() - began, 3),
            "peak_mib": peak_mib(),
        }
        print(json.dumps(line), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
