"""The page of a real run, whose source goes away and returns."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from waiting import wait_until

from knet_runtime.pipeline import Feed, RunStats, run
from knet_runtime.pipeline.stats import FeedSnapshot, RunSnapshot, StageSnapshot
from knet_runtime.segmentation import Segmentation
from knet_runtime.sources.base import SourceInfo, SourceStatus
from knet_runtime.types import Closeable, Frame
from knet_runtime.web import status
from knet_runtime.web.auth import listen
from knet_runtime.web.server import LivePage
from knet_runtime.web.streams import Latest
from knet_synthetic import CAMVID11


class Camera(Closeable):
    """A live source of 20 frames a second, without any while ``gone`` is set."""

    def __init__(self) -> None:
        self.info = SourceInfo("stream", (48, 64), None, None)
        self.gone = threading.Event()
        self._stopped = threading.Event()
        self._reconnects = 0

    @property
    def status(self) -> SourceStatus:
        return SourceStatus(not self.gone.is_set(), self._reconnects, 0.0)

    def __iter__(self) -> Iterator[Frame]:
        index, away = 0, False
        while not self._stopped.wait(0.05):
            if self.gone.is_set():
                away = True
                continue
            self._reconnects += away
            away = False
            image = np.full((48, 64, 3), 60, np.uint8)
            yield Frame(image, index, None, f"{index:06d}", wall=time.time())
            index += 1

    def stop(self) -> None:
        self._stopped.set()

    def close(self) -> None:
        self.stop()


def segment(image: NDArray[np.uint8]) -> Segmentation:
    return Segmentation(np.zeros(image.shape[:2], np.uint8), CAMVID11, {"infer": 1.0})


class Hanging(Closeable):
    """Frames of a file, source, engine and sink of a run at once: each goes on, until it hangs."""

    name, path = "disk", None

    def __init__(self, where: str) -> None:
        self.info = SourceInfo("video", (48, 64), None, None)
        self.status = SourceStatus(True, 0, 0.0)
        self.go = threading.Event()
        self._where = where

    def _step(self, where: str, index: int) -> None:
        if where == self._where and index == 5:
            self.go.wait(20)
        time.sleep(0.01)

    def __iter__(self) -> Iterator[Frame]:
        for index in range(12):
            self._step("decoder", index)
            yield Frame(np.full((48, 64, 3), index, np.uint8), index, None, f"{index}")

    def segment(self, image: NDArray[np.uint8]) -> Segmentation:
        self._step("engine", int(image[0, 0, 0]))
        return segment(image)

    def write(self, frame: Frame, result: Segmentation) -> None:
        self._step("output", frame.index)

    def stop(self) -> None:
        pass

    def close(self, *, complete: bool = True) -> None:
        pass


@pytest.mark.parametrize("where", ["decoder", "engine", "output"])
def test_a_file_of_which_no_frame_is_finished_is_not_healthy(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "STUCK_SECONDS", 0.5)
    listener, stats, hanging = listen("127.0.0.1:0"), RunStats(), Hanging(where)
    seen: list[tuple[int, bytes]] = []

    def health() -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", listener.port, timeout=10)
        connection.request("GET", "/healthz")
        answer = connection.getresponse()
        seen.append((answer.status, answer.read()))
        connection.close()
        return seen[-1]

    with LivePage(listener, CAMVID11, stats.snapshot, feeds=["gate"]) as page:
        feed = Feed(hanging, [page.sink("gate"), hanging], name="gate")
        work = threading.Thread(
            target=run, args=([feed], hanging.segment), kwargs={"stats": stats, "warm_up": False}
        )
        work.start()
        try:
            wait_until(lambda: health() == (503, b"gate: stale\n"), "the hang is told")
        finally:
            hanging.go.set()
            work.join(10)
        assert (200, b"gate: running\n") in seen
        wait_until(lambda: health() == (503, b"gate: ended\n"), "the end is told")
    assert stats.snapshot().feeds["gate"].frames == 12


def test_frames_that_take_long_are_not_taken_for_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    def state(since: float | None, read: float = 1, latency: float = 1) -> str:
        times = {"read": read, "latency": latency}
        stages = {name: StageSnapshot(value, value, value) for name, value in times.items()}
        feed = FeedSnapshot(9, 0, 0, 0, True, since, stages, since)
        shown = status.read_run_status(RunSnapshot({"gate": feed}), {"gate": latest}, 0, 0.0)
        return shown.feeds[0].state

    latest = Latest()
    image = np.zeros((4, 4, 3), np.uint8)
    latest.put(Frame(image, 0, None, "0"), segment(image))
    assert (state(9), state(11)) == ("running", "stale")
    assert (state(25, latency=15_000), state(31, latency=15_000)) == ("running", "stale")
    assert (state(25, read=15_000), state(31, read=15_000)) == ("running", "stale")
    assert state(None) == "running"
    monkeypatch.setattr(status, "STUCK_SECONDS", 0.0)
    assert state(None, 0, 0) == "stale"  # the first frame is shown, but another output hangs
    latest.end()
    assert state(99) == "ended"
    latest.end(complete=False)
    assert state(99) == "failed"


def test_health_and_frames_follow_the_run() -> None:
    listener = listen("127.0.0.1:0")

    def ask(path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", listener.port, timeout=10)
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer.status, body

    def health() -> str:
        status, body = ask("/healthz")
        state = body.decode().removeprefix("gate: ").strip()
        assert (status == 200) == (state == "running")
        return state

    def corner() -> NDArray[np.uint8]:
        image = cv2.imdecode(np.frombuffer(ask("/snapshot.jpg")[1], np.uint8), 1)
        return np.asarray(image[0, 0], np.uint8)

    stats, camera, stop = RunStats(), Camera(), threading.Event()
    with LivePage(listener, CAMVID11, stats.snapshot, feeds=["gate"]) as page:
        assert health() == "waiting"
        feed = Feed(camera, [page.sink("gate")], name="gate")
        work = threading.Thread(
            target=run, args=([feed], segment), kwargs={"stop": stop, "stats": stats}
        )
        work.start()
        try:
            wait_until(lambda: health() == "running", "frames")
            assert corner().max() < 120
            camera.gone.set()
            wait_until(lambda: health() in ("stale", "disconnected"), "the source is missed")
            wait_until(lambda: corner()[2] > 150, "the last frame is marked")
            wait_until(lambda: b'knet_frames_stale_total{feed="gate"} 1' in ask("/metrics")[1], "")
            camera.gone.clear()
            wait_until(lambda: health() == "running", "the source is back")
            wait_until(lambda: corner()[2] < 120, "new frames")
            assert b'knet_reconnects_total{feed="gate"} 1.0' in ask("/metrics")[1]
            assert b'stage="latency"' in ask("/metrics")[1]
        finally:
            stop.set()
            work.join(10)
        assert not work.is_alive()
        assert health() == "ended"
