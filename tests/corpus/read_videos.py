"""Reads videos to their end, as the corpus' tests do in a process of its own.

    python tests/corpus/read_videos.py VIDEO... < /dev/null

Prints a line of JSON per video: name, frames, the SourceError's text, seconds, and the highest
memory of the process so far in MiB. Anything else that happens is a traceback.
"""

from __future__ import annotations

import logging
from pathlib import Path

from measured import report

from knet_runtime.errors import SourceError
from knet_runtime.sources import open_source


def read(path: Path) -> dict[str, int | str]:
    """Count its frames."""
    frames = 0
    try:
        with open_source(path) as source:
            for _ in source:
                frames += 1
    except SourceError as error:
        return {"frames": frames, "error": str(error)}
    return {"frames": frames, "error": ""}


if __name__ == "__main__":
    logging.disable()  # warnings of damaged frames are meant
    report(read, limit=6 * 2**30)  # the test's cap is lower
