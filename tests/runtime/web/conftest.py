"""A page on 127.0.0.1 with a feed that the test moves, stalls and ends."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from knet_runtime.pipeline.stats import FeedSnapshot, RunSnapshot, StageSnapshot
from knet_runtime.segmentation import Segmentation
from knet_runtime.types import Frame
from knet_runtime.web.auth import listen
from knet_runtime.web.server import LivePage
from knet_synthetic import CAMVID11

HEIGHT, WIDTH = 90, 160
STAGES = {"read": 1.5, "infer": 20.0, "latency": 31.0}


class Gate:
    """A feed named ``name``: ``step`` shows a next frame, and what a run would count of it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.frames = 0
        self.stale_frames = 0
        self.reconnects = 0
        self.connected = True
        self.sink: Any = None
        self._shown = 0.0

    def step(self, *, stale: bool = False) -> None:
        """Pole and sky on the left, road on the right; a bright bar moves on by 4 pixels."""
        if stale:
            self.stale_frames += 1
        else:
            self.frames += 1
            self._shown = time.time()
        image = np.full((HEIGHT, WIDTH, 3), 60, np.uint8)
        at = self.frames * 4 % WIDTH
        image[:, at : at + 8] = 250
        class_map = np.full((HEIGHT, WIDTH), CAMVID11.names.index("Road"), np.uint8)
        class_map[:, : WIDTH // 2] = CAMVID11.names.index("Sky")
        class_map[-5:] = 255
        frame = Frame(image, self.frames, None, f"{self.frames:06d}", self._shown, stale)
        self.sink.write(frame, Segmentation(class_map, CAMVID11, {}))

    def snapshot(self) -> FeedSnapshot:
        return FeedSnapshot(
            frames=self.frames,
            dropped=2,
            stale_frames=self.stale_frames,
            reconnects=self.reconnects,
            connected=self.connected,
            last_frame_age=time.time() - self._shown if self._shown else None,
            stages={name: StageSnapshot(v, 2 * v, 3 * v) for name, v in STAGES.items()},
        )


class Site:
    """The page, its feeds, and a way to ask it."""

    def __init__(self, page: LivePage, gates: list[Gate], port: int) -> None:
        self.page = page
        self.gates = gates
        self.port = port
        self._opened: list[socket.socket | http.client.HTTPConnection] = []

    @property
    def gate(self) -> Gate:
        return self.gates[0]

    def ask(
        self, path: str, method: str = "GET", body: str | None = None, **headers: str
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Status, headers and body; header names are written with _ for -."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def open(self, path: str) -> http.client.HTTPResponse:
        """A stream, its headers read, that stays open as long as the page."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        self._opened.append(connection)
        connection.request("GET", path)
        return connection.getresponse()

    def connect(self, sent: bytes) -> socket.socket:
        """A viewer that has sent this and never reads, with as little buffer as there can be."""
        viewer = socket.socket()
        self._opened.append(viewer)
        viewer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        viewer.connect(("127.0.0.1", self.port))
        viewer.sendall(sent)
        return viewer

    def close(self) -> None:
        self.page.close()
        for one in self._opened:
            one.close()


class Mover(threading.Thread):
    """Steps a gate 20 times a second; while ``gone`` is set it behaves as a run without source."""

    def __init__(self, gate: Gate) -> None:
        super().__init__(daemon=True)
        self.gate = gate
        self.gone = threading.Event()
        self.done = threading.Event()

    def run(self) -> None:
        away = False
        while not self.done.wait(1 if away else 0.05):
            away = self.gone.is_set()
            if away:
                self.gate.connected = False
            elif not self.gate.connected:
                self.gate.connected = True
                self.gate.reconnects += 1
            self.gate.step(stale=away)


@pytest.fixture
def make_site() -> Iterator[Callable[..., Site]]:
    """Start a page; keywords go to ``listen``, ``feeds`` are the names of its feeds, which the
    run knows of once it has ``begun``."""
    sites: list[Site] = []

    def make(
        *,
        feeds: tuple[str, ...] = ("gate",),
        port: int = 0,
        classes: tuple[str, ...] = (),
        begun: bool = True,
        **options: Any,
    ) -> Site:
        gates = [Gate(name) for name in feeds]

        def snapshot() -> RunSnapshot:
            return RunSnapshot({gate.name: gate.snapshot() for gate in gates if begun})

        listener = listen(f"127.0.0.1:{port}", **options)
        page = LivePage(
            listener,
            CAMVID11,
            snapshot,
            feeds=list(feeds),
            classes=classes,
            model="street@0123456789ab",
            engine="openvino",
        )
        for gate in gates:
            gate.sink = page.sink(gate.name)
        page.start()
        sites.append(Site(page, gates, listener.port))
        return sites[-1]

    yield make
    for site in sites:
        site.close()


@pytest.fixture
def site(make_site: Callable[..., Site]) -> Site:
    return make_site()


@pytest.fixture
def move() -> Iterator[Callable[[Gate], Mover]]:
    """Set a gate in motion until the test ends."""
    movers: list[Mover] = []

    def begin(gate: Gate) -> Mover:
        movers.append(Mover(gate))
        movers[-1].start()
        return movers[-1]

    yield begin
    for mover in movers:
        mover.done.set()
        mover.join()
