"""One batch on Ray, of which a worker is killed; what happened as JSON.

python on_ray.py BUNDLE OUT VIDEO...
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path

from knet_deploy.cli.main import main as call


def kill_first(out: Path, killed: list[int], stop: threading.Event) -> None:
    """Kill the first worker that has a chunk in hand, whose folder bears its number."""
    while not stop.wait(0.002):
        for folder in out.glob(".work/*/.0*.part"):
            number = int(folder.name.split(".")[-2])
            os.kill(number, signal.SIGKILL)
            killed.append(number)
            return


def main() -> None:
    bundle, out, *videos = sys.argv[1:]
    killed: list[int] = []
    stop = threading.Event()
    killer = threading.Thread(target=kill_first, args=(Path(out), killed, stop))
    killer.start()
    before = set(Path(tempfile.gettempdir()).glob("knet-ray-*"))
    options = ["--bundle", bundle, "--engine", "onnxruntime-cpu", "--workers", "2"]
    try:
        code = call(["batch", *videos, "--out", out, "--chunk-seconds", "0.5", *options])
    finally:
        stop.set()
        killer.join()
    left = set(Path(tempfile.gettempdir()).glob("knet-ray-*")) - before
    report = {
        "code": code,
        "killed": killed,
        "outside": [name for _, name in socket.if_nameindex() if name != "lo"],
        "left": [str(path) for path in left],
    }
    print(json.dumps(report))  # noqa: T201


if __name__ == "__main__":
    main()
