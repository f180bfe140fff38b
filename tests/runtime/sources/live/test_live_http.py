"""Streams over HTTP, from real servers: what is live, what is finite, and what goes wrong."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
from waiting import wait_until

import knet_runtime.sources.live
from knet_runtime.errors import ConfigError, SourceError
from knet_runtime.sources import open_source
from knet_runtime.sources.base import Source, SourceOptions
from knet_runtime.types import Frame

QUICK = SourceOptions(connect_timeout=2, read_timeout=1)


def write_clip(path: Path, frames: int = 30, **options: str) -> Path:
    """A clip of 48 × 64 at 30 frames/s with a key frame every ten, ever brighter."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=30)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.gop_size = 10
        for index in range(frames):
            image = np.full((48, 64, 3), 20 + 200 * index // frames, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode(None))
    return path


def send_file(folder: Path) -> Callable[[Any, Any], None]:
    """An ``answer`` with the folder's files; ranges are not offered."""

    def answer(handler: Any, server: Any) -> None:
        path = folder / handler.path.split("?")[0].lstrip("/")
        if not path.is_file():
            handler.send_error(404)
            return
        data = path.read_bytes()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def take(source: Source, count: int) -> list[Frame]:
    return list(islice(source, count))


def chain_of(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def test_a_stream_of_jpegs_is_live_and_its_frames_bear_their_time(
    http_server: Callable[..., Any], mjpeg: Callable[..., None]
) -> None:
    with http_server(mjpeg) as server, open_source(server.url(), QUICK) as source:
        began = time.time()
        frames = take(source, 10)
        assert source.info.live
        assert source.info.kind == "stream"
        assert source.info.hw == (48, 64)
        assert source.info.frames is None
        assert source.status.connected
        assert source.status.down_seconds == 0
    times = [frame.pts for frame in frames]
    assert times[0] == 0
    assert times == sorted(set(times), key=lambda time: time or Fraction(0))
    assert [frame.index for frame in frames] == list(range(10))
    assert all(frame.wall is not None and abs(frame.wall - began) < 30 for frame in frames)


def test_every_takes_each_nth_frame_of_a_stream(
    http_server: Callable[..., Any], mjpeg: Callable[..., None]
) -> None:
    options = SourceOptions(every=5, connect_timeout=2, read_timeout=1)
    with http_server(mjpeg) as server, open_source(server.url(), options) as source:
        values = [int(frame.image[0, 0, 0]) for frame in take(source, 4)]
    assert [value - values[0] for value in values] == [0, 5, 10, 15]


def test_a_stream_that_ends_is_opened_again_and_the_counts_go_on(
    http_server: Callable[..., Any], mjpeg: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    def answer(handler: Any, server: Any) -> None:
        mjpeg(handler, server, frames=20, rate=200)

    with http_server(answer) as server, caplog.at_level(logging.INFO):
        address = server.url("/live?key=secret", "me:secret@")
        with open_source(address, QUICK) as source:
            frames = take(source, 50)
            assert source.status.reconnects == 2
    assert server.requests == 3
    assert [frame.index for frame in frames] == list(range(50))
    times = [frame.pts or Fraction(0) for frame in frames]
    assert times == sorted(set(times))
    assert times[20] - times[19] >= Fraction(1, 8)  # the wait is seen in the times
    assert f"http://***@127.0.0.1:{server.port}/live?***: lost after 20 frames" in caplog.text
    assert "back after" in caplog.text
    assert "secret" not in caplog.text


def test_a_stream_may_come_back_in_another_size(
    http_server: Callable[..., Any], mjpeg: Callable[..., None]
) -> None:
    def answer(handler: Any, server: Any) -> None:
        size = (48, 64) if server.requests == 1 else (32, 96)
        mjpeg(handler, server, frames=10, rate=200, size=size)

    with http_server(answer) as server, open_source(server.url(), QUICK) as source:
        shapes = [frame.image.shape[:2] for frame in take(source, 20)]
    assert shapes == [(48, 64)] * 10 + [(32, 96)] * 10


def test_a_stream_that_goes_silent_is_opened_again(
    http_server: Callable[..., Any], mjpeg: Callable[..., None]
) -> None:
    def answer(handler: Any, server: Any) -> None:
        mjpeg(handler, server, frames=10)
        server.gone.wait(30)

    with http_server(answer) as server, open_source(server.url(), QUICK) as source:
        began = time.monotonic()
        take(source, 15)
        assert source.status.reconnects == 1
        assert 1 < time.monotonic() - began < 6


def test_while_it_is_gone_the_status_says_so_and_stop_ends_it(
    http_server: Callable[..., Any], mjpeg: Callable[..., None], reading: Callable[..., Any]
) -> None:
    with http_server(mjpeg) as server:
        source = open_source(server.url(), QUICK)
        with reading(source) as seen:
            wait_until(lambda: len(seen) > 3)
            server.gone.set()
            wait_until(lambda: not source.status.connected)
            server.shutdown()
            server.server_close()
            wait_until(lambda: source.status.down_seconds > 0.5)
    source.close()
    assert list(source) == []


def test_a_source_that_stays_away_ends_after_max_downtime(
    http_server: Callable[..., Any], mjpeg: Callable[..., None]
) -> None:
    options = SourceOptions(connect_timeout=1, read_timeout=1, max_downtime=1)
    with http_server(mjpeg) as server:
        source = open_source(server.url(login="me:secret@"), options)
        take(source, 3)
    began = time.monotonic()
    with source, pytest.raises(SourceError, match=r"no frame for \d s .*; check the") as caught:
        list(source)
    assert 0.5 < time.monotonic() - began < 6
    assert not any("secret" in repr(error) for error in chain_of(caught.value))


def test_credentials_that_are_refused_later_are_not_tried_again_fast(
    http_server: Callable[..., Any], mjpeg: Callable[..., None], reading: Callable[..., Any]
) -> None:
    def answer(handler: Any, server: Any) -> None:
        if server.requests > 1:
            handler.send_response(401)
            handler.send_header("WWW-Authenticate", 'Basic realm="camera"')
            handler.send_header("Content-Length", "0")
            handler.end_headers()
        else:
            mjpeg(handler, server, frames=5)

    with http_server(answer) as server:
        source = open_source(server.url(login="me:secret@"), QUICK)
        with reading(source):
            wait_until(lambda: server.requests > 1)
            asked = server.requests
            wait_until(lambda: source.status.down_seconds > 2)
            assert server.requests <= asked + 1  # FFmpeg sends the password when it is asked to


def test_the_wall_clock_may_jump(
    http_server: Callable[..., Any], mjpeg: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with http_server(mjpeg) as server, open_source(server.url(), QUICK) as source:
        take(source, 5)
        monkeypatch.setattr(knet_runtime.sources.live, "time", lambda: time.time() - 86_400)
        frames = take(source, 5)
        assert source.status.reconnects == 0
    assert all((frame.wall or 0) < time.time() - 86_000 for frame in frames)
    assert (frames[-1].pts or 0) - (frames[0].pts or 0) < 5


def answer_401(handler: Any, server: Any) -> None:
    handler.send_response(401)
    handler.send_header("WWW-Authenticate", 'Basic realm="camera"')
    handler.end_headers()


def answer_text(handler: Any, server: Any) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b"<html>camera</html>\n" * 100)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (answer_401, "refuses the user name or password"),
        (lambda handler, server: handler.send_error(404), "nothing at this path"),
        (lambda handler, server: handler.send_error(503), "5XX|Service"),
        (lambda handler, server: server.gone.wait(30), "no answer in time"),
        (answer_text, "what it sends is no video"),
    ],
)
def test_what_cannot_be_opened_is_one_line_without_the_password(
    http_server: Callable[..., Any],
    answer: Callable[[Any, Any], None],
    complaint: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    options = SourceOptions(connect_timeout=0.5)
    with http_server(answer) as server:
        began = time.monotonic()
        with pytest.raises(SourceError, match=complaint) as caught:
            open_source(server.url("/live?key=secret", "me:secret@"), options)
        assert time.monotonic() - began < 5
    message = str(caught.value)
    assert message.startswith(f"http://***@127.0.0.1:{server.port}/live?***: ")
    assert "\n" not in message
    assert not any("secret" in repr(error) for error in chain_of(caught.value))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("scheme", ["http", "rtsp", "https", "rtsps"])
def test_a_port_that_accepts_and_says_nothing_is_given_up(silent_port: int, scheme: str) -> None:
    began = time.monotonic()
    with pytest.raises(SourceError, match="no answer in time") as caught:
        open_source(
            f"{scheme}://me:secret@127.0.0.1:{silent_port}/live", SourceOptions(connect_timeout=0.5)
        )
    assert time.monotonic() - began < 5
    assert not any("secret" in repr(error) for error in chain_of(caught.value))


@pytest.mark.parametrize("scheme", ["http", "rtsp"])
def test_nobody_listening_and_unknown_hosts_are_said(silent_port: int, scheme: str) -> None:
    with pytest.raises(SourceError, match=r"Connection refused; check the address"):
        open_source(f"{scheme}://127.0.0.1:1/live", QUICK)
    with pytest.raises(SourceError, match=r"camera.invalid/live: .*cannot be found"):
        open_source(f"{scheme}://me:secret@camera.invalid/live", QUICK)


def test_a_finite_file_over_http_is_a_video(
    http_server: Callable[..., Any], tmp_path: Path
) -> None:
    clip = write_clip(tmp_path / "clip.mp4", movflags="faststart")
    write_clip(tmp_path / "raw.h264")
    with open_source(clip) as source:
        expected = [frame.image for frame in source]
    with http_server(send_file(tmp_path)) as server:
        with open_source(server.url("/clip.mp4"), QUICK) as source:
            assert source.info.kind == "video"
            assert not source.info.live
            assert source.info.path is None
            frames = list(source)
        part = SourceOptions(start=0.5, end=0.7)
        with open_source(server.url("/clip.mp4"), part) as source:
            assert [frame.pts for frame in source] == [Fraction(i, 30) for i in range(15, 21)]
        with open_source(server.url("/raw.h264"), QUICK) as source:  # states no duration
            assert not source.info.live
            assert len(list(source)) == 30
    assert all(np.array_equal(f.image, e) for f, e in zip(frames, expected, strict=True))
    assert all(frame.wall is None for frame in frames)


def test_a_finite_file_that_breaks_off_says_so(
    http_server: Callable[..., Any], tmp_path: Path
) -> None:
    clip = write_clip(tmp_path / "clip.ts", 600)
    data = clip.read_bytes()

    def answer(handler: Any, server: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2])

    with http_server(answer) as server:
        address = server.url("/clip.ts", "me:secret@")
        with (
            pytest.raises(SourceError, match=r"broke off|no answer in time") as caught,
            open_source(address, QUICK) as source,
        ):
            list(source)
    assert not any("secret" in repr(error) for error in chain_of(caught.value))


def test_a_finished_playlist_is_a_video(http_server: Callable[..., Any], tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.m3u8", 60, hls_time="0.3", hls_list_size="0")
    with http_server(send_file(tmp_path)) as server:
        with open_source(server.url("/clip.m3u8"), QUICK) as source:
            assert not source.info.live
            assert [frame.pts for frame in source] == [Fraction(i, 30) for i in range(60)]
        with open_source(server.url("/clip.m3u8"), SourceOptions(start=1, end=1.2)) as source:
            assert [frame.pts for frame in source] == [Fraction(i, 30) for i in range(30, 36)]


def test_a_playlist_that_grows_is_live_and_comes_at_its_own_pace(
    http_server: Callable[..., Any], tmp_path: Path
) -> None:
    write_clip(tmp_path / "clip.m3u8", 120, hls_time="0.3", hls_list_size="0")
    lines = (tmp_path / "clip.m3u8").read_text().splitlines()
    lines.remove("#EXT-X-ENDLIST")
    head = [line for line in lines if line.startswith("#EXT") and "EXTINF" not in line]
    segments = [line for line in lines if line.startswith("#EXTINF") or not line.startswith("#")]
    began = time.monotonic()

    def answer(handler: Any, server: Any) -> None:
        ready = min(4 + int((time.monotonic() - began) / 0.333), len(segments) // 2)
        (tmp_path / "live.m3u8").write_text("\n".join([*head, *segments[: 2 * ready], ""]))
        send_file(tmp_path)(handler, server)

    with http_server(answer) as server, open_source(server.url("/live.m3u8"), QUICK) as source:
        assert source.info.live
        started = time.monotonic()
        frames = take(source, 46)
        assert 1.2 < time.monotonic() - started < 8
        assert source.status.reconnects == 0
    assert frames[-1].pts == Fraction(45, 30)


def test_a_playlist_that_stands_still_is_lost_and_its_end_does_not_come_twice(
    http_server: Callable[..., Any], tmp_path: Path, reading: Callable[..., Any]
) -> None:
    write_clip(tmp_path / "clip.m3u8", 60, hls_time="0.3", hls_list_size="0")
    playlist = (tmp_path / "clip.m3u8").read_text()
    (tmp_path / "live.m3u8").write_text(playlist.replace("#EXT-X-ENDLIST", ""))
    segments = []

    def answer(handler: Any, server: Any) -> None:
        segments.append(handler.path.endswith(".ts"))
        send_file(tmp_path)(handler, server)

    options = SourceOptions(connect_timeout=2, read_timeout=0.2)
    with http_server(answer) as server:
        source = open_source(server.url("/live.m3u8"), options)
        with reading(source) as seen:
            wait_until(lambda: not source.status.connected, seconds=15)
            count, asked = len(seen), sum(segments)
            wait_until(lambda: sum(segments) > asked + 2, seconds=15)  # they were fetched again
            wait_until(lambda: source.status.down_seconds > 3, seconds=15)
            assert len(seen) == count
            assert not source.status.connected


@pytest.mark.parametrize("inner", ["file://{}", "{}", "concat:{}", "data:video/mp4;base64,AAAA"])
def test_a_playlist_opens_no_local_file(
    http_server: Callable[..., Any], tmp_path: Path, inner: str
) -> None:
    secret = write_clip(tmp_path / "secret.ts")
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "list.m3u8").write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n"
        + inner.format(secret)
        + "\n#EXT-X-ENDLIST\n"
    )
    server = http_server(send_file(tmp_path / "www"))
    with server as running, pytest.raises(SourceError, match=r"list\.m3u8: "):
        open_source(running.url("/list.m3u8"), SourceOptions(connect_timeout=1))


def test_a_part_of_a_stream_cannot_be_chosen(
    http_server: Callable[..., Any], mjpeg: Callable[..., None]
) -> None:
    with http_server(mjpeg) as server, pytest.raises(ConfigError, match="leave them out here"):
        open_source(server.url(), SourceOptions(start=3))


def test_nothing_stays_open(http_server: Callable[..., Any], mjpeg: Callable[..., None]) -> None:
    process = psutil.Process()
    with http_server(mjpeg) as server, open_source(server.url(), QUICK) as source:
        take(source, 3)
    threads, handles = process.num_threads(), process.num_fds()
    for _ in range(3):
        five = http_server(lambda handler, server: mjpeg(handler, server, frames=5))
        with five as server, open_source(server.url(), QUICK) as source:
            take(source, 8)
        with pytest.raises(SourceError):
            open_source(server.url(), QUICK)
    # (The server's own threads need a moment.)
    wait_until(lambda: process.num_threads() <= threads and process.num_fds() <= handles)
