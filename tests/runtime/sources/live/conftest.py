"""Real servers on 127.0.0.1: RTSP by GStreamer, HTTP by the standard library."""

from __future__ import annotations

import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from knet_runtime.sources.base import Source
from knet_runtime.types import Frame

SYSTEM_PYTHON = "/usr/bin/python3"


class RtspServer:
    """GStreamer's RTSP server in a process of its own, that can be killed and started again."""

    def __init__(self, *options: str) -> None:
        self._options = options
        self._process: subprocess.Popen[str] | None = None
        self.port = 0
        self.start()

    def start(self) -> None:
        """Start it on the port of the first time."""
        script = Path(__file__).parent / "rtsp_server.py"
        self._process = subprocess.Popen(
            [SYSTEM_PYTHON, str(script), "--port", str(self.port), *self._options],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        assert self.port > 0

    def kill(self) -> None:
        """As a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None

    def freeze(self) -> None:
        """As a camera that hangs; until ``thaw``."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def url(self, login: str = "", scheme: str = "rtsp") -> str:
        return f"{scheme}://{login}127.0.0.1:{self.port}/live"


@pytest.fixture(scope="session")
def has_rtsp_server() -> None:
    """Skips where GStreamer's RTSP server is not installed."""
    program = (
        "import gi; gi.require_version('GstRtspServer', '1.0'); gi.require_version('Gst', '1.0')\n"
        "from gi.repository import Gst, GstRtspServer\n"
        "Gst.init(None)\n"
        "assert Gst.ElementFactory.find('x264enc') and Gst.ElementFactory.find('rtph264pay')\n"
    )
    try:
        subprocess.run([SYSTEM_PYTHON, "-c", program], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        pytest.skip(
            "needs GStreamer's RTSP server: apt install --no-install-recommends python3-gi "
            "gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-{base,good,bad,ugly}"
        )


@pytest.fixture
def rtsp_server(has_rtsp_server: None) -> Iterator[Callable[..., RtspServer]]:
    """Start a server, with options of rtsp_server.py; killed after the test."""
    servers: list[RtspServer] = []

    def start(*options: str) -> RtspServer:
        servers.append(RtspServer(*options))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


class HttpServer(ThreadingHTTPServer):
    """Answers every GET by ``answer``; ``gone`` is set when it shuts down."""

    def __init__(self, answer: Callable[[Any, HttpServer], None], port: int) -> None:
        self.answer = answer
        self.gone = threading.Event()
        self.requests = 0
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def port(self) -> int:
        return self.server_address[1]

    def url(self, path: str = "/live", login: str = "") -> str:
        return f"http://{login}127.0.0.1:{self.port}{path}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Readers that leave are no error."""


class _Handler(BaseHTTPRequestHandler):
    server: HttpServer

    def do_GET(self) -> None:
        self.server.requests += 1
        self.server.answer(self, self.server)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def http_running(answer: Callable[[Any, HttpServer], None], port: int = 0) -> Iterator[HttpServer]:
    server = HttpServer(answer, port)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.gone.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def http_server() -> Iterator[Callable[..., Any]]:
    """A context manager that serves by a function ``answer(handler, server)``."""
    return http_running


def send_mjpeg(
    handler: Any,
    server: HttpServer,
    frames: int = 10**6,
    rate: float = 50,
    size: tuple[int, int] = (48, 64),
) -> None:
    """Answer with a stream of JPEGs, as many cameras do."""
    handler.send_response(200)
    handler.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
    handler.end_headers()
    for number in range(frames):
        grey = np.full((*size, 3), number % 250, np.uint8)
        data = cv2.imencode(".jpg", grey)[1].tobytes()
        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
        handler.wfile.write(head.encode() + data + b"\r\n")
        if server.gone.wait(1 / rate):
            return


@pytest.fixture
def mjpeg() -> Callable[..., None]:
    """An ``answer`` that streams JPEGs: ``frames`` of them, ``rate`` a second, ever brighter."""
    return send_mjpeg


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@contextmanager
def _reading(source: Source) -> Iterator[list[Frame]]:
    seen: list[Frame] = []
    failed: list[BaseException] = []

    def read() -> None:
        try:
            for frame in source:
                seen.append(frame)
        except BaseException as error:
            failed.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield seen
    finally:
        source.stop()
        began = time.monotonic()
        reader.join(20)
        waited = time.monotonic() - began
    assert not reader.is_alive()
    assert waited < 3
    source.close()
    assert not failed


@pytest.fixture
def reading() -> Callable[[Source], Any]:
    """A context manager: a thread collects the frames; at the end it must stop in time."""
    return _reading
