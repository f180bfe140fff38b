"""One image at an HTTP address: read once, or polled as a live source; whatever the server does."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import knet_runtime.sources.container
from knet_runtime.errors import ConfigError, SourceError
from knet_runtime.pipeline import Feed, run
from knet_runtime.segmentation import Segmentation
from knet_runtime.sources import open_source
from knet_runtime.sources.base import SourceOptions
from knet_runtime.sources.images import decode_image, read_image
from knet_runtime.types import Frame, Rgb
from knet_synthetic import CAMVID11

QUICK = SourceOptions(connect_timeout=2, read_timeout=0.5)
POLLED = SourceOptions(connect_timeout=2, read_timeout=0.5, every_seconds=0.05)


def encoded(value: int = 90, suffix: str = ".jpg") -> bytes:
    """A ramp of 48 × 64 whose corner has ``value``."""
    image = np.dstack([np.mgrid[:48, :64].sum(0)] * 3).astype(np.uint8)
    image[:8, :8] = value
    return bytes(cv2.imencode(suffix, image)[1])


def send(handler: Any, data: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    headers = {"Content_Type": "image/jpeg", "Content_Length": str(len(data))} | headers
    for name, value in headers.items():
        if value:
            handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


def test_any_image_is_read_by_its_content(http_server: Callable[..., Any], tmp_path: Path) -> None:
    sent: list[bytes] = []

    def answer(handler: Any, server: Any) -> None:
        send(handler, sent[-1], Content_Type="text/plain")

    with http_server(answer) as server:
        for suffix in (".jpg", ".png", ".bmp", ".tif", ".webp"):
            sent.append(encoded(suffix=suffix))
            path = tmp_path / f"a{suffix}"
            path.write_bytes(sent[-1])
            address = server.url("/cgi/snapshot.cgi?user=me&key=secret", "me:secret@")
            with open_source(address, QUICK) as source:
                assert (source.info.kind, source.info.hw) == ("image", (48, 64))
                assert (source.info.frames, source.info.live) == (1, False)
                (frame,) = source
                assert list(source) == []
            np.testing.assert_array_equal(frame.image, read_image(path))
            assert (frame.name, frame.index, frame.pts, frame.wall) == ("snapshot", 0, None, None)


def test_a_polled_image_is_a_live_source(http_server: Callable[..., Any]) -> None:
    def answer(handler: Any, server: Any) -> None:
        send(handler, encoded(min(250, 10 * server.requests)))

    began = time.time()
    with http_server(answer) as server, open_source(server.url("/a.jpg"), POLLED) as source:
        assert (source.info.kind, source.info.rate, source.info.frames) == ("stream", 20, None)
        assert source.info.live
        frames = list(islice(source, 6))
        assert server.requests == 6
        assert source.status.connected
    assert [frame.index for frame in frames] == list(range(6))
    values = [int(frame.image[0, 0, 0]) for frame in frames]
    np.testing.assert_allclose(values, [10, 20, 30, 40, 50, 60], atol=4)
    times = [float(frame.pts or 0) for frame in frames]
    assert times[0] == 0
    assert all(b - a > 0.03 for a, b in pairwise(times))
    assert all(frame.wall is not None and abs(frame.wall - began) < 30 for frame in frames)


def test_every_takes_each_nth_image(http_server: Callable[..., Any]) -> None:
    def answer(handler: Any, server: Any) -> None:
        send(handler, encoded(10 * server.requests))

    options = SourceOptions(every_seconds=0.01, every=3)
    with http_server(answer) as server, open_source(server.url(), options) as source:
        values = [int(frame.image[0, 0, 0]) for frame in islice(source, 3)]
    np.testing.assert_allclose(values, [10, 40, 70], atol=4)


@pytest.mark.parametrize("fault", ["error", "half", "page", "empty", "short"])
def test_a_poll_that_fails_is_tried_again_and_counted(
    http_server: Callable[..., Any], caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    data = encoded()

    def answer(handler: Any, server: Any) -> None:
        if server.requests != 3:
            send(handler, data)
            return
        match fault:
            case "error":
                send(handler, b"", 503)
            case "half":
                send(handler, data[: len(data) // 2] + b"\xff\xd9")
            case "page":
                send(handler, b"<html>please log in</html>")
            case "empty":
                send(handler, b"")
            case "short":
                send(handler, data[:100], Content_Length=str(len(data)))

    with http_server(answer) as server, caplog.at_level(logging.INFO):
        address = server.url("/a?key=secret", "me:secret@")
        with open_source(address, POLLED) as source:
            frames = list(islice(source, 4))
            assert source.status.reconnects == 1
            assert source.status.connected
    assert [frame.index for frame in frames] == [0, 1, 2, 3]
    assert server.requests == 5
    assert "lost after 2 frames (" in caplog.text
    assert "back after" in caplog.text
    assert "secret" not in caplog.text


def test_a_camera_that_stays_away_ends_it_after_max_downtime(
    http_server: Callable[..., Any],
) -> None:
    def answer(handler: Any, server: Any) -> None:
        send(handler, encoded(), 200 if server.requests < 3 else 404)

    options = SourceOptions(every_seconds=0.02, max_downtime=0.6)
    frames: list[Frame] = []
    with http_server(answer) as server, open_source(server.url(), options) as source:
        with pytest.raises(SourceError, match=r"no frame for [01] s \(the server has nothing at"):
            frames.extend(source)
        assert not source.status.connected
    assert len(frames) == 2


def test_a_stopped_poll_ends_at_once(
    http_server: Callable[..., Any], reading: Callable[..., Any]
) -> None:
    def answer(handler: Any, server: Any) -> None:
        send(handler, encoded())

    with http_server(answer) as server:
        source = open_source(server.url(), SourceOptions(every_seconds=3600))
        began = time.monotonic()
        with reading(source):
            time.sleep(0.1)
        assert time.monotonic() - began < 2


def test_a_slow_poll_is_not_stale(http_server: Callable[..., Any]) -> None:
    def answer(handler: Any, server: Any) -> None:
        send(handler, encoded())

    class Black:
        max_batch = 1

        def batch(self, images: list[Rgb]) -> list[Segmentation]:
            return [Segmentation(np.zeros(image.shape[:2], np.uint8), CAMVID11) for image in images]

        def warm_up(self, largest: int) -> None:
            pass

    seen: list[bool] = []

    class Sink:
        name, path = "sink", None

        def write(self, frame: Frame, result: Segmentation) -> None:
            seen.append(frame.stale)

        def close(self, *, complete: bool = True) -> None:
            pass

    options = SourceOptions(every_seconds=0.4)
    with http_server(answer) as server, open_source(server.url(), options) as source:
        run([Feed(source, [Sink()])], Black(), max_frames=3, stale_after=0.1)
    assert seen == [False] * 3


@pytest.mark.parametrize(
    ("status", "body", "complaint"),
    [
        (401, b"no", "refuses the user name or password"),
        (403, b"no", "refuses the user name or password"),
        (404, b"no", "has nothing at this path"),
        (
            200,
            b"<html><body>please log in</body></html>" * 30,
            "what comes is no (video and no )?image",
        ),
        (200, b"", r"live\?\*\*\*: (what comes is no video and no image|nothing comes).*; "),
    ],
)
@pytest.mark.parametrize("options", [QUICK, POLLED])
def test_what_is_no_image_is_one_line_without_secrets(
    http_server: Callable[..., Any], status: int, body: bytes, complaint: str, options: Any
) -> None:
    def answer(handler: Any, server: Any) -> None:
        send(handler, body, status, Content_Type="text/html")

    with http_server(answer) as server, pytest.raises(SourceError, match=complaint) as caught:
        open_source(server.url("/live?key=secret", "me:secret@"), options)
    seen: BaseException | None = caught.value
    while seen is not None:
        assert "secret" not in str(seen)
        assert "\n" not in str(seen)
        seen = seen.__cause__ or seen.__context__


@pytest.mark.parametrize("length", ["", "999999999999", "100"])
def test_the_length_that_a_server_states_is_not_trusted(
    http_server: Callable[..., Any], length: str
) -> None:
    data = encoded()

    def answer(handler: Any, server: Any) -> None:
        send(handler, data, Content_Length=length)

    with http_server(answer) as server:
        try:
            with open_source(server.url(), QUICK) as source:
                (frame,) = source
            np.testing.assert_array_equal(frame.image, decode_image(data, "sent"))
        except SourceError as error:
            assert (length, "is cut off" in str(error)) == ("100", True)  # noqa: PT017


@pytest.mark.parametrize("pause", [0, 0.1])
def test_an_endless_image_is_given_up(
    http_server: Callable[..., Any], pause: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knet_runtime.sources.container, "_LARGEST_IMAGE", 3_000_000)

    def answer(handler: Any, server: Any) -> None:
        send(handler, encoded()[:600], Content_Length="")
        while not server.gone.wait(pause):
            handler.wfile.write(bytes(2000 if pause else 200_000))

    options = SourceOptions(connect_timeout=1, read_timeout=0.2, every_seconds=1)
    complaint = "takes too long" if pause else "more comes than an image can hold"
    began = time.monotonic()
    with http_server(answer) as server, pytest.raises(SourceError, match=complaint):
        open_source(server.url(), options)
    assert time.monotonic() - began < 10


def test_redirects_go_to_http_only(http_server: Callable[..., Any], tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(encoded())
    target = ["/real.jpg"]

    def answer(handler: Any, server: Any) -> None:
        if handler.path == "/real.jpg":
            send(handler, encoded())
        else:
            send(handler, b"", 302, Location=target[0])

    with http_server(answer) as server:
        with open_source(server.url("/moved"), QUICK) as source:
            assert source.info.hw == (48, 64)
        for target[0] in (f"file://{secret}", f"file:{secret}", str(secret), "concat:a", "/loop"):
            for options in (QUICK, POLLED):
                with pytest.raises(SourceError, match=r"moved: ") as caught:
                    open_source(server.url("/moved"), options)
                assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["a.mp4", "photos", "camera:0", "rtsp://me:secret@host/live"])
def test_every_seconds_is_for_http_addresses(source: str) -> None:
    with pytest.raises(ConfigError, match="every_seconds asks an HTTP address") as caught:
        open_source(source, POLLED)
    assert "secret" not in str(caught.value)


def test_a_stream_is_not_polled(
    http_server: Callable[..., Any], mjpeg: Callable[..., None]
) -> None:
    with (
        http_server(mjpeg) as server,
        pytest.raises(SourceError, match="is no image; leave every_sec"),
    ):
        open_source(server.url(), POLLED)


def test_one_image_has_no_parts(http_server: Callable[..., Any]) -> None:
    def answer(handler: Any, server: Any) -> None:
        send(handler, encoded())

    with http_server(answer) as server:
        for options in (SourceOptions(start=1), SourceOptions(end=1, every_seconds=1)):
            with pytest.raises(ConfigError, match="leave them out here"):
                open_source(server.url(), options)
