"""Who may look: the token, as a header or as a browser's password, and the Host header."""

from __future__ import annotations

import logging
import re
from base64 import b64encode
from typing import Any

import pytest

TOKEN = "correct-horse-battery"
ROUTES = (
    "/", "/page.js", "/page.css", "/live", "/stream.mjpg", "/snapshot.jpg", "/events", "/metrics",
    "/healthz", "/nothing",
)  # fmt: skip


def basic(user: str, password: str) -> str:
    return f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}"


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
        {"Authorization": basic("anybody", f"{TOKEN}x")},
        {"Authorization": basic(TOKEN, "")},
        {"Authorization": "Basic //8="},
        {"Authorization": f"Digest {TOKEN}"},
        {"Cookie": f"knet_deploy_{guarded.port}={TOKEN}"},
    ):
        status, answered, body = guarded.ask(route, **headers)
        assert status == 401
        assert TOKEN.encode() not in body
        assert answered["WWW-Authenticate"].startswith('Basic realm="')


def test_the_header_lets_in(guarded: Any) -> None:
    for kind in ("Bearer", "bearer"):
        assert guarded.ask("/healthz", Authorization=f"{kind} {TOKEN}")[0] == 200
        assert guarded.ask("/snapshot.jpg", Authorization=f"{kind} {TOKEN}")[0] == 200


@pytest.mark.parametrize("user", ["", "anybody", "jos\u00e9"])
def test_the_token_as_a_password_lets_in(guarded: Any, user: str) -> None:
    for route in ("/", "/snapshot.jpg", "/metrics"):
        assert guarded.ask(route, Authorization=basic(user, TOKEN))[0] == 200


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
        guarded.ask(f"/snapshot.jpg?token={TOKEN}")
        guarded.ask("/healthz", Authorization=f"Bearer {TOKEN}")
        guarded.page.close()
    assert TOKEN not in caplog.text
    assert not re.search(r"GET|healthz", caplog.text)
