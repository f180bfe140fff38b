"""Whoever connects and asks nothing takes neither the run's descriptors nor others' places."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import subprocess
import sys
import time
from typing import Any

import pytest
from waiting import wait_until

from knet_runtime.web import auth, connections, server
from knet_runtime.web.connections import Sparing, neighbourhood, room

TOKEN = "correct-horse-battery"
ASKS_LIVE = b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(autouse=True)
def fresh_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """What earlier tests logged keeps no line out."""
    monkeypatch.setattr(connections._log, "filters", [Sparing()])


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for eight connections."""
    monkeypatch.setattr(server, "room", lambda: 8)


def connect(site: Any, sent: bytes = b"", address: str = "127.0.0.1") -> socket.socket:
    """A connection from that address of this machine, which the site closes at its end."""
    one = socket.create_connection(("127.0.0.1", site.port), 10, (address, 0))
    site._opened.append(one)
    one.sendall(sent)
    return one


def is_closed(one: socket.socket) -> bool:
    """Whether the page has closed it; what it has sent is passed over."""
    one.setblocking(False)
    try:
        while one.recv(1 << 16):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    return True


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: local", b"POST / HTT"])
def test_health_and_metrics_answer_however_many_connect_and_say_nothing(
    site: Any, caplog: pytest.LogCaptureFixture, sent: bytes
) -> None:
    site.gate.step()
    opened = []
    for _ in range(5):
        opened += [connect(site, sent) for _ in range(8)]
        assert site.ask("/healthz")[::2] == (200, b"gate: running\n")
        assert site.ask("/metrics")[0] == 200
    wait_until(lambda: sum(map(is_closed, opened)) >= 32, "the oldest are closed")
    assert not all(map(is_closed, opened[-6:]))
    assert [record.message for record in caplog.records] == [
        "the live page has 8 connections, its limit: the oldest idle ones are closed for new ones"
    ]


@pytest.mark.parametrize(
    ("sent", "drips"),
    [
        (b"", False),
        (b"GET / HTTP/1.1\r\nX: ", True),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", False),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /", True),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n", True),
    ],
    ids=["nothing", "header", "no further", "further", "body"],
)
def test_who_sends_no_whole_request_in_time_is_closed_and_viewers_are_not(
    site: Any, monkeypatch: pytest.MonkeyPatch, sent: bytes, drips: bool
) -> None:
    site.gate.step()
    viewer = connect(site, ASKS_LIVE)
    assert viewer.recv(15) == b"HTTP/1.1 200 OK"
    monkeypatch.setattr(connections, "PATIENCE", 0.5)
    one = connect(site, sent)
    began = time.monotonic()
    while not is_closed(one):
        assert time.monotonic() - began < 5
        time.sleep(0.02)
        if drips:
            try:
                one.sendall(b"x")
            except ConnectionError:
                break
    assert time.monotonic() - began > 0.3
    site.gate.step()
    assert not is_closed(viewer)


@pytest.mark.usefixtures("eight")
def test_viewers_leave_room_for_those_that_only_ask(site: Any) -> None:
    site.gate.step()
    viewers = [connect(site, ASKS_LIVE) for _ in range(6)]
    wait_until(lambda: b"\nknet_viewers 6.0" in site.ask("/metrics")[2], "six viewers")
    status, _, body = site.ask("/stream.mjpg")
    assert (status, body) == (503, b"There are too many viewers; try again later.\n")
    assert site.ask("/healthz")[0] == 200
    assert not any(map(is_closed, viewers))
    # An address with fewer takes the place of one of an address with many.
    other = connect(site, ASKS_LIVE, "127.0.0.2")
    assert other.recv(15) == b"HTTP/1.1 200 OK"
    wait_until(lambda: is_closed(viewers[0]), "the oldest had to go")
    assert not any(map(is_closed, (*viewers[1:], other)))


@pytest.mark.usefixtures("eight")
def test_an_address_with_many_idle_connections_loses_its_own(site: Any) -> None:
    mine = connect(site, address="127.0.0.2")
    others = [connect(site) for _ in range(30)]
    wait_until(lambda: sum(map(is_closed, others)) >= 22, "theirs are closed")
    assert not is_closed(mine)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(64, range(8, 49)), (1024, range(200, 257)), (1 << 20, [256]), (20, [8]),
     (resource.RLIM_INFINITY, [256])],
)  # fmt: skip
def test_there_is_room_below_the_limit_of_descriptors(
    monkeypatch: pytest.MonkeyPatch, limit: int, expected: Any
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    assert room() in expected


_RUN = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (96, 96))
from knet_runtime.pipeline.stats import RunSnapshot
from knet_runtime.web.auth import listen
from knet_runtime.web.server import LivePage
from knet_synthetic import CAMVID11

with LivePage(listen("127.0.0.1:0"), CAMVID11, lambda: RunSnapshot({}), feeds=["a"]) as page:
    print(page.url, flush=True)
    sys.stdin.readline()
    files = [open(__import__("os").devnull) for _ in range(20)]
    print(len(files), flush=True)
"""


def test_a_run_has_descriptors_left_for_its_files() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _RUN],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        port = int(child.stdout.readline().rpartition(":")[2].strip("/\n"))
        idle = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(150)]
        wait_until(lambda: sum(map(is_closed, idle)) >= 50, "some are closed")
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == "20\n"
        assert child.stderr.read().count("\n") <= 1
    for one in idle:
        one.close()
    assert child.returncode == 0


def test_a_flood_of_nonsense_is_a_line_and_a_count(
    make_site: Any, caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site()
    for _ in range(100):
        with socket.create_connection(("127.0.0.1", site.port), 5) as one:
            one.sendall(b"\x16\x03\x01\n\n")
            assert one.recv(12) == b"HTTP/1.1 400"
    assert [record.message for record in caplog.records] == ["Invalid HTTP request received."]


def test_lines_that_were_left_out_are_counted(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(connections, "monotonic", lambda: now)
    log = logging.getLogger("test.sparing")
    monkeypatch.setattr(log, "filters", [Sparing(10)])
    for at, text in ((100, "a %d"), (101, "a %d"), (102, "b %d"), (109, "a %d"), (111, "a %d")):
        now = at
        log.warning(text, at)
    assert [record.getMessage() for record in caplog.records] == [
        "a 100",
        "b 102",
        "a 111 (and 2 times since the last such line)",
    ]


def test_wrong_tokens_are_slow_and_the_right_one_is_not(
    make_site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "monotonic", lambda: 100.0)  # however slow this machine is
    site = make_site(token=TOKEN)
    site.gate.step()

    def asked(token: str | None) -> tuple[int, float]:
        began = time.monotonic()
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return site.ask("/healthz", **headers)[0], time.monotonic() - began

    for _ in range(8):
        assert asked("wrong-token")[0] == 401
    status, seconds = asked("wrong-token")
    assert status == 401
    assert seconds >= 0.5
    waiting = connect(
        site, b"GET / HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer wrong\r\n\r\n"
    )
    status, seconds = asked(TOKEN)
    assert status == 200
    assert seconds < 2
    assert asked(None)[0] == 401  # how a browser begins
    waiting.close()


def test_the_wait_is_of_an_address_and_bounded_as_what_is_remembered_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(auth, "monotonic", lambda: now)
    failures = auth._Failures()
    assert [failures.wait("a") for _ in range(8)] == [0] * 8
    assert [failures.wait("a") for _ in range(12)] == [min(n / 2, 5) for n in range(1, 13)]
    assert failures.wait("b") == 0
    now += 10
    assert [failures.wait("a") for _ in range(2)] == [0, 0]
    for number in range(2000):
        failures.wait(f"{number}")
    assert len(failures._of) == 1000
    assert failures.wait("c") == pytest.approx(5)  # of all addresses together


@pytest.mark.parametrize(
    ("host", "same"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8:0:7::1", "20010db800000007::/64"),
        ("2001:db8:0:7:ffff::9%eth0", "20010db800000007::/64"),
        ("", ""),
    ],
)
def test_a_network_of_one_machine_counts_as_one_address(host: str, same: str) -> None:
    assert neighbourhood(host) == same


def test_no_descriptor_left_is_a_line_and_not_the_end(
    make_site: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    accept, failed = asyncio.SelectorEventLoop.sock_accept, []

    async def exhausted(self: Any, sock: socket.socket) -> Any:
        if len(failed) < 2:
            failed.append(sock)
            raise OSError(24, "Too many open files")
        return await accept(self, sock)

    monkeypatch.setattr(asyncio.SelectorEventLoop, "sock_accept", exhausted)
    monkeypatch.setattr(server, "_RETRY", 0.01)
    site = make_site()
    site.gate.step()
    assert site.ask("/healthz")[0] == 200
    assert len(failed) == 2
    assert "the live page lets nobody in: Too many open files" in caplog.text
