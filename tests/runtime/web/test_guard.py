"""Who may look: the token, the cookie, the Host header."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest

TOKEN = "correct-horse-battery"
ROUTES = (
    "/", "/page.js", "/page.css", "/live", "/stream.mjpg", "/snapshot.jpg", "/events", "/metrics",
    "/healthz", "/nothing",
)  # fmt: skip


@pytest.fixture
def guarded(make_site: Any) -> Any:
    site = make_site(token=TOKEN)
    site.gate.step()
    return site


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_needs_the_token(guarded: Any, route: str) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer wrong-token"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Cookie": f"knet_deploy_{guarded.port}={TOKEN}"},
        {"Cookie": "=;;=\x01"},
    ):
        status, answered, body = guarded.ask(route, **headers)
        assert status == 401
        assert TOKEN.encode() not in body
        assert ("WWW-Authenticate" in answered) == (route != "/")


def test_the_header_lets_in(guarded: Any) -> None:
    for kind in ("Bearer", "bearer"):
        assert guarded.ask("/healthz", Authorization=f"{kind} {TOKEN}")[0] == 200
        assert guarded.ask("/snapshot.jpg", Authorization=f"{kind} {TOKEN}")[0] == 200


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_login_sets_a_cookie_that_lets_in_and_is_not_the_token(guarded: Any, method: str) -> None:
    if method == "GET":
        status, headers, body = guarded.ask(f"/login?token={TOKEN}")
    else:
        status, headers, body = guarded.ask("/login", "POST", f"token={TOKEN}")
    assert status == 200
    assert b'http-equiv="refresh"' in body
    cookie = headers["Set-Cookie"]
    for part in ("HttpOnly", "SameSite=strict", "Path=/", f"knet_deploy_{guarded.port}="):
        assert part in cookie
    assert TOKEN not in cookie
    pair = cookie.partition(";")[0]
    for route in ("/", "/snapshot.jpg", "/metrics"):
        assert guarded.ask(route, Cookie=f"other=1; {pair}")[0] == 200
    assert guarded.ask("/", Cookie=pair[:-1])[0] == 401


def test_a_wrong_login_asks_again(guarded: Any) -> None:
    assert guarded.ask("/login")[0] == 200
    for answer in (
        guarded.ask("/login?token=wrong-token"),
        guarded.ask("/login", "POST", "token=wrong-token"),
        guarded.ask("/login", "POST", "x" * 100_000),
        guarded.ask("/login?token=%C3%A9%00%0d%0aSet-Cookie:x"),
    ):
        status, headers, body = answer
        assert status == 401
        assert "Set-Cookie" not in headers
        assert b"That is not the token." in body
        assert b"wrong-token" not in body


def test_without_a_token_login_leads_to_the_page(site: Any) -> None:
    status, headers, _ = site.ask("/login")
    assert (status, headers["Location"]) == (303, "/")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_a_foreign_host_name_is_refused_on_loopback(site: Any, host: str) -> None:
    site.gate.step()
    status, _, body = site.ask("/snapshot.jpg", Host=host)
    assert status == 421
    assert str(site.port).encode() in body


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:99", "127.0.0.1", "[::1]:80", "127.9.9.9"]
)
def test_this_machines_own_names_are_not(site: Any, host: str) -> None:
    site.gate.step()
    assert site.ask("/healthz", Host=host)[0] == 200


def test_the_token_is_never_logged(guarded: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        guarded.ask(f"/login?token={TOKEN}")
        guarded.ask(f"/snapshot.jpg?token={TOKEN}")
        guarded.ask("/healthz", Authorization=f"Bearer {TOKEN}")
        guarded.page.close()
    assert TOKEN not in caplog.text
    assert not re.search(r"GET|healthz", caplog.text)
