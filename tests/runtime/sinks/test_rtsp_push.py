"""The overlay pushed to RTSP servers: a real one, one that dies, and ones that say nothing."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import fakes
import numpy as np
import pytest
from waiting import wait_until

import knet_runtime
from knet_runtime.errors import ConfigError, OutputError
from knet_runtime.segmentation import Segmentation
from knet_runtime.sinks.rtsp import RtspPush
from knet_runtime.sources.base import SourceInfo
from knet_runtime.types import Frame

SYSTEM_PYTHON = "/usr/bin/python3"
HW = (96, 128)
FILE = SourceInfo("video", HW, Fraction(25), None, Fraction(1, 1000))
LIVE = SourceInfo("stream", HW, Fraction(25), None, Fraction(1, 90_000))


class Server:
    """GStreamer's RTSP server, which writes what is pushed to ``output``."""

    def __init__(self, output: Path, *options: str) -> None:
        self.output = output
        self._options = options
        self.port = 0
        self.start()

    def start(self) -> None:
        script = Path(__file__).parent / "rtsp_record_server.py"
        self.process = subprocess.Popen(
            [
                *(SYSTEM_PYTHON, str(script), "--port", str(self.port)),
                *("--output", str(self.output), *self._options),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def images(self) -> list[int]:
        """The mean grey of each frame that has arrived."""
        if not self.output.exists() or not self.output.stat().st_size:
            return []
        try:
            with av.open(str(self.output), format="h264") as container:
                frames = list(container.decode(video=0))
        except av.FFmpegError:  # the first frame is not whole yet
            return []
        return [round(float(frame.to_ndarray(format="rgb24").mean())) for frame in frames]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    program = (
        "import gi; gi.require_version('GstRtspServer', '1.0'); gi.require_version('Gst', '1.0')\n"
        "from gi.repository import Gst, GstRtspServer\n"
        "Gst.init(None)\n"
        "assert Gst.ElementFactory.find('rtph264depay') and Gst.ElementFactory.find('h264parse')\n"
    )
    try:
        subprocess.run([SYSTEM_PYTHON, "-c", program], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        pytest.skip(
            "needs GStreamer's RTSP server: apt install --no-install-recommends python3-gi "
            "gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-{base,good,bad}"
        )
    servers: list[Server] = []

    def start(*options: str) -> Server:
        servers.append(Server(tmp_path / "pushed.h264", *options))
        return servers[-1]

    yield start
    for each in servers:
        each.kill()


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that accepts, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"rtsp://me:secret@127.0.0.1:{listener.getsockname()[1]}/live"


def a_frame(index: int, noise: bool = False) -> tuple[Frame, Segmentation]:
    image = np.full((*HW, 3), 2 * index % 200, np.uint8)
    if noise:  # large enough to fill the buffers of a connection soon
        image = np.random.default_rng(index).integers(0, 256, (360, 480, 3), np.uint8)
    unlabelled = np.full(image.shape[:2], 11, np.uint8)  # nothing is drawn over it
    return fakes.a_frame(index, Fraction(index, 25), image=image, class_map=unlabelled)


def write_all(sink: RtspPush, count: int) -> None:
    for index in range(count):
        sink.write(*a_frame(index))


def children() -> set[int]:
    """Processes of ours that push."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes()
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        if b"knet_runtime.sinks.rtsp_child" in line and parent == os.getpid():
            found.add(int(entry.name))
    return found


def test_a_file_arrives_whole_in_order_and_at_its_own_speed(server: Callable[..., Server]) -> None:
    record = server()
    sink = RtspPush(f"rtsp://127.0.0.1:{record.port}/live", FILE)
    began = time.monotonic()
    write_all(sink, 30)
    # The server throws away what it still holds when the connection ends.
    wait_until(lambda: len(record.images()) >= 28, seconds=30)
    sink.close()
    sink.close()
    assert time.monotonic() - began > 29 / 25
    assert (sink.dropped, sink.reconnects, sink.connected) == (0, 0, False)
    seen = record.images()
    np.testing.assert_allclose(seen, [2 * index for index in range(len(seen))], atol=4)
    assert children() == set()


def test_a_killed_server_is_found_again_and_what_was_lost_is_counted(
    server: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    record = server("--user", "me", "--password", "s@cret")
    address = f"127.0.0.1:{record.port}/live"
    sink = RtspPush(f"rtsp://me:s%40cret@{address}", LIVE)
    assert sink.name == f"rtsp://***@{address}"
    index = 0

    def write() -> None:
        nonlocal index
        before = time.monotonic()
        sink.write(*a_frame(index))
        assert time.monotonic() - before < 1  # live never waits
        index += 1

    def pushes() -> bool:
        write()
        return sink.connected and bool(record.images())

    wait_until(pushes, seconds=30)
    record.kill()
    record.output.unlink()
    wait_until(lambda: (write(), not sink.connected)[1], seconds=30)
    record.start()
    wait_until(pushes, seconds=30)
    sink.close()
    assert sink.reconnects == 1
    assert sink.dropped > 0
    assert "s@cret" not in caplog.text
    assert "s%40cret" not in caplog.text
    assert f"***@{address}: connected again" in caplog.text
    assert children() == set()


def test_wrong_credentials_end_it_without_showing_them(server: Callable[..., Server]) -> None:
    record = server("--user", "me", "--password", "right")
    sink = RtspPush(f"rtsp://me:wr0ng@127.0.0.1:{record.port}/live", FILE)
    with pytest.raises(OutputError, match="401 Unauthorized") as caught:
        write_all(sink, 100)
    assert "wr0ng" not in str(caught.value)
    sink.close()


def test_a_server_that_freezes_costs_frames_and_nothing_else(server: Callable[..., Server]) -> None:
    record = server()
    sink = RtspPush(f"rtsp://127.0.0.1:{record.port}/live", LIVE, patience=0.5)
    index = 0

    def write() -> None:
        nonlocal index
        before = time.monotonic()
        sink.write(*a_frame(index, noise=True))
        assert time.monotonic() - before < 1
        index += 1

    wait_until(lambda: (write(), sink.connected)[1], seconds=30)
    record.process.send_signal(signal.SIGSTOP)
    try:
        wait_until(lambda: (write(), not sink.connected)[1], seconds=30)
        before = time.monotonic()
        sink.close()
        assert time.monotonic() - before < 5
    finally:
        record.process.send_signal(signal.SIGCONT)
    assert sink.dropped > 0
    assert children() == set()


def test_a_server_that_says_nothing_can_not_hold_the_run(silent: str) -> None:
    sink = RtspPush(silent, FILE, patience=0.5)
    began = time.monotonic()
    with pytest.raises(OutputError, match=r"takes nothing for 0\.5 s") as caught:
        write_all(sink, 1000)
    assert "secret" not in str(caught.value)
    sink.close()
    assert time.monotonic() - began < 25
    assert children() == set()


def test_closing_at_once_ends_within_seconds_and_says_what_is_wrong(silent: str) -> None:
    sink = RtspPush(silent, LIVE, patience=60)
    sink.write(*a_frame(0))
    wait_until(lambda: bool(children()), seconds=30)
    began = time.monotonic()
    sink.close()
    assert time.monotonic() - began < 5
    assert sink.dropped == 1
    assert children() == set()


def test_nothing_listens(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    sink = RtspPush(f"rtsp://me:secret@127.0.0.1:{port}/live", LIVE)
    sink.write(*a_frame(0))
    wait_until(lambda: sink._failure is not None, seconds=30)
    with caplog.at_level(logging.DEBUG), pytest.raises(OutputError, match="refused") as caught:
        sink.close()
    assert "secret" not in str(caught.value) + caplog.text


def test_other_addresses_are_refused_without_showing_the_password() -> None:
    with pytest.raises(ConfigError, match=r"http://\*\*\*@host/live: push to") as caught:
        RtspPush("http://me:secret@host/live", LIVE)
    assert "secret" not in str(caught.value)


ORPHAN = """
import sys, time
import msgspec
from knet_runtime.sinks.rtsp import PushProcess
from knet_runtime.sinks.rtsp_child import Push
import threading
push = Push(sys.argv[1], "tcp", "libx264", (96, 128), (1, 90000), (25, 1), 1.0)
process = PushProcess(push, threading.Event())
threading.Thread(target=process.__enter__, daemon=True).start()
while not hasattr(process, "_child"):
    time.sleep(0.01)
print(process._child.pid, flush=True)
time.sleep(60)
"""


def test_the_child_of_a_killed_process_ends_itself(silent: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(knet_runtime.__file__).parent.parent)}
    with subprocess.Popen(
        [sys.executable, "-c", ORPHAN, silent], env=environment, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()

    def gone() -> bool:
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        return state == "Z"  # nobody collects it in a container without an init

    wait_until(gone, seconds=30)
