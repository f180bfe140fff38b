"""Where the page may listen, and the one line that says why not."""

from __future__ import annotations

import socket

import pytest

from knet_runtime.errors import ConfigError
from knet_runtime.web.auth import listen

TOKEN = "correct-horse-battery"


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("127.0.0.1:0", "http://127.0.0.1:{}/"),
        ("localhost:0", "http://localhost:{}/"),
        ("0", "http://127.0.0.1:{}/"),
        (":0", "http://127.0.0.1:{}/"),
    ],
)
def test_loopback_needs_no_token(address: str, url: str) -> None:
    listener = listen(address)
    try:
        assert listener.loopback
        assert listener.port > 0
        assert listener.url == url.format(listener.port)
    finally:
        listener.close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", listener.port), 1)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "host",
        "127.0.0.1:",
        "127.0.0.1:99999",
        "a b:80",
        "http://127.0.0.1:80",
        "::1:80",
        "[::1]",
    ],
)
def test_a_misspelt_address_is_refused_with_an_example(address: str) -> None:
    with pytest.raises(ConfigError, match=r"write HOST:PORT, such as 127\.0\.0\.1:8000"):
        listen(address)


def test_a_taken_port_is_named() -> None:
    first = listen("127.0.0.1:0")
    try:
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{first.port}: the port is taken"):
            listen(f"127.0.0.1:{first.port}")
    finally:
        first.close()


def test_a_host_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"there is no host 'no-such-host\.invalid'"):
        listen("no-such-host.invalid:0")
    with pytest.raises(ConfigError, match="does not have that address"):
        listen("192.0.2.1:0", token=TOKEN)  # kept for documentation: nobody has it


def test_an_address_that_others_reach_needs_a_token_or_insecure() -> None:
    with pytest.raises(ConfigError, match="add --token TOKEN, or --insecure"):
        listen("0.0.0.0:0")
    for allowed in ({"token": TOKEN}, {"insecure": True}):
        listener = listen("0.0.0.0:0", **allowed)
        listener.close()
        assert not listener.loopback
        assert TOKEN not in listener.url
        assert "0.0.0.0" not in listener.url


@pytest.mark.parametrize(
    "token", ["short", "with space in it", "plus+and/slash", "ключ-из-букв", ""]
)
def test_a_token_that_is_weak_or_breaks_a_url_is_refused_unseen(token: str) -> None:
    with pytest.raises(ConfigError, match="the token must be 8 to 200") as caught:
        listen("127.0.0.1:0", token=token)
    assert not token or token not in str(caught.value)


def test_insecure_with_a_token_contradicts_itself() -> None:
    with pytest.raises(ConfigError, match="leave out --token or --insecure"):
        listen("0.0.0.0:0", token=TOKEN, insecure=True)
