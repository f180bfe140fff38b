"""RTSP from GStreamer's server: transports, credentials, a server that is killed."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from waiting import wait_until

from knet_runtime.errors import SourceError
from knet_runtime.sources import open_source
from knet_runtime.sources.base import SourceOptions

if TYPE_CHECKING:
    from conftest import RtspServer  # type: ignore[import-not-found]

QUICK = SourceOptions(connect_timeout=5, read_timeout=1)


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_frames_come_over_both_transports(
    rtsp_server: Callable[..., RtspServer], transport: str
) -> None:
    options = SourceOptions(transport=transport)  # type: ignore[arg-type]
    with open_source(rtsp_server().url(), options) as source:
        assert source.info.live
        assert source.info.hw == (120, 160)
        frames = list(islice(source, 20))
    assert frames[0].pts == 0
    times = [frame.pts or 0 for frame in frames]
    assert times == sorted(set(times))
    assert all(frame.wall is not None and abs(frame.wall - time.time()) < 30 for frame in frames)
    assert max(frame.image.max() for frame in frames) > 200  # the ball


def test_credentials_are_used_and_wrong_ones_named_without_showing_them(
    rtsp_server: Callable[..., RtspServer],
) -> None:
    server = rtsp_server("--user", "me", "--password", "secret")
    with open_source(server.url("me:secret@"), QUICK) as source:
        assert next(iter(source)).image.shape == (120, 160, 3)
    for login in ("me:wrong-secret@", ""):
        with pytest.raises(SourceError, match="refuses the user name or password") as caught:
            open_source(server.url(login), QUICK)
        error: BaseException | None = caught.value
        while error is not None:
            assert "secret" not in repr(error)
            error = error.__cause__ or error.__context__


def test_an_unknown_path_is_said(rtsp_server: Callable[..., RtspServer]) -> None:
    with pytest.raises(SourceError, match="nothing at this path"):
        open_source(rtsp_server().url() + "x", QUICK)


def test_rtsps_is_read_though_the_camera_signs_for_itself(
    rtsp_server: Callable[..., RtspServer], tmp_path: Path
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    try:
        subprocess.run(
            f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=camera -keyout {key} "
            f"-out {certificate}".split(),
            check=True,
            capture_output=True,
        )
    except OSError:
        pytest.skip("needs openssl to make a certificate")
    both = tmp_path / "both.pem"
    both.write_bytes(key.read_bytes() + certificate.read_bytes())
    try:
        server = rtsp_server("--certificate", str(both))
    except (AssertionError, ValueError):
        pytest.skip("GStreamer's server needs glib-networking for TLS")
    with open_source(server.url(scheme="rtsps"), QUICK) as source:
        assert len(list(islice(source, 5))) == 5


def test_a_server_that_freezes_is_noticed_and_found_again(
    rtsp_server: Callable[..., RtspServer], reading: Callable[..., Any]
) -> None:
    server = rtsp_server()
    source = open_source(server.url(), SourceOptions(connect_timeout=2, read_timeout=1))
    with reading(source) as seen:
        wait_until(lambda: len(seen) > 5)
        server.freeze()
        began = time.monotonic()
        wait_until(lambda: not source.status.connected)
        assert time.monotonic() - began < 5
        server.thaw()
        wait_until(lambda: source.status.reconnects == 1)
        assert source.status.connected


def test_a_server_killed_and_started_again_is_found_again(
    rtsp_server: Callable[..., RtspServer], reading: Callable[..., Any]
) -> None:
    server = rtsp_server()
    process = psutil.Process()
    source = open_source(server.url(), QUICK)
    with reading(source) as seen:
        wait_until(lambda: len(seen) > 5)
        handles = process.num_fds()
        for rounds in (1, 2):
            server.kill()
            wait_until(lambda: not source.status.connected)
            count = len(seen)
            server.start()
            began = time.monotonic()
            wait_until(lambda rounds=rounds: source.status.reconnects == rounds)
            wait_until(lambda count=count: len(seen) > count + 5)
            assert time.monotonic() - began < 2 + 5
            assert process.num_fds() <= handles
    assert [frame.index for frame in seen] == list(range(len(seen)))
    times = [frame.pts or 0 for frame in seen]
    assert times == sorted(set(times))
