"""An RTSP server killed and started again, twenty times during one run: do its frames come back?

    python benchmarks/reconnect.py --output benchmarks/results/reconnect.json

Needs GStreamer's RTSP server, as the tests in tests/runtime/sources/live do (rtsp_server.py there
names the packages). Ends with 1 if a round took longer than 2 s beyond the wait it was in, or if
anything was left behind.
"""

from __future__ import annotations

import logging
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median

import psutil
from result import parser_of, write_result

from knet_runtime.sources import open_source
from knet_runtime.sources.base import Source, SourceOptions

SERVER = Path(__file__).parent.parent / "tests" / "runtime" / "sources" / "live" / "rtsp_server.py"
WITHIN = 2.0  # seconds beyond the wait
GROWTH = 1.02


class Server:
    """GStreamer's server in a process of its own, always on the same port."""

    def __init__(self, python: str, size: str) -> None:
        self._command = [python, str(SERVER), "--size", size]
        self.port = 0

    def start(self) -> float:
        """The moment at which it listens."""
        self._process = subprocess.Popen(
            [*self._command, "--port", str(self.port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        return time.monotonic()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


class Reader(threading.Thread):
    """Takes every frame; remembers how many and when the last one came."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source
        self.frames = 0
        self.last = 0.0
        self.ordered = True

    def run(self) -> None:
        before = None
        for frame in self._source:
            self.ordered &= frame.pts is not None and (before is None or frame.pts > before)
            before = frame.pts
            self.last = time.monotonic()
            self.frames += 1


class Waits(logging.Handler):
    """The waits between tries, as the source logs them."""

    def __init__(self) -> None:
        super().__init__()
        self.last = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.INFO and isinstance(record.args, tuple):
            self.last = float(str(record.args[1]))


def wait_for(what: str, seconds: float, condition: object) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise SystemExit(f"{what} did not happen within {seconds:g} s")
        time.sleep(0.005)


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steady", type=float, default=5.5, help="seconds of frames per round")
    parser.add_argument("--size", default="320x240")
    parser.add_argument("--system-python", default="/usr/bin/python3")
    given = parser.parse_args()

    waits = Waits()
    logger = logging.getLogger("knet_runtime.sources.live")
    logger.setLevel(logging.INFO)
    logger.addHandler(waits)
    logger.propagate = False
    dice = random.Random(0)
    process = psutil.Process()
    begun_with = process.num_fds(), process.num_threads()

    server = Server(given.system_python, given.size)
    server.start()
    rounds = []
    try:
        source = open_source(
            f"rtsp://127.0.0.1:{server.port}/live", SourceOptions(connect_timeout=5, read_timeout=3)
        )
        reader = Reader(source)
        reader.start()
        for number in range(1, given.rounds + 1):
            time.sleep(given.steady)
            held = {
                "handles": process.num_fds(),
                "threads": process.num_threads(),
                "rss_mib": round(process.memory_info().rss / 2**20, 1),
            }
            server.kill()
            wait_for("the loss", 10, lambda: not source.status.connected)
            down = dice.uniform(0, 3)
            time.sleep(down)
            before = reader.frames
            ready = server.start()
            wait_for("a frame", 30, lambda before=before: reader.frames > before)
            row = {
                "round": number,
                "down_seconds": round(down, 2),
                "wait_seconds": round(waits.last, 2),
                "back_after_seconds": round(reader.last - ready, 2),
                **held,
            }
            rounds.append(row)
            print(row, flush=True)  # noqa: T201
        reconnects = source.status.reconnects
        source.stop()
        reader.join()
        source.close()
    finally:
        server.kill()

    warm = rounds[min(2, len(rounds) - 1)]
    last = rounds[-1]
    result = {
        "rounds": len(rounds),
        "reconnects": reconnects,
        "frames": reader.frames,
        "times_rise": reader.ordered,
        "back_after_seconds": {
            "median": median(row["back_after_seconds"] for row in rounds),
            "max": max(row["back_after_seconds"] for row in rounds),
            "max_beyond_wait": round(
                max(row["back_after_seconds"] - row["wait_seconds"] for row in rounds), 2
            ),
        },
        "handles": [warm["handles"], last["handles"]],
        "threads": [warm["threads"], last["threads"]],
        "rss_mib": [warm["rss_mib"], last["rss_mib"]],
        "handles_and_threads_before_and_after": [
            list(begun_with),
            [process.num_fds(), process.num_threads()],
        ],
        "each": rounds,
    }
    write_result(result, given.output)
    passed = (
        reconnects == len(rounds)
        and reader.ordered
        and result["back_after_seconds"]["max_beyond_wait"] <= WITHIN  # type: ignore[index]
        and last["handles"] <= warm["handles"]
        and last["threads"] <= warm["threads"]
        and last["rss_mib"] <= GROWTH * warm["rss_mib"]
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
