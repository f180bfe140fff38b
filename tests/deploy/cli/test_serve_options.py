"""--serve, --token and --insecure: what they refuse before anything is loaded."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from knet_deploy.cli.console import MissingExtra
from knet_deploy.cli.run import page_listener
from knet_runtime.errors import ConfigError


def test_without_serve_there_is_no_page_and_a_token_of_the_environment_does_no_harm() -> None:
    with page_listener(None, "correct-horse", False) as listener:
        assert listener is None


def test_the_port_is_held_as_long_as_it_lasts() -> None:
    with page_listener("127.0.0.1:0", None, False) as listener:
        assert listener is not None
        with pytest.raises(ConfigError, match="the port is taken"):
            page_listener(f"127.0.0.1:{listener.port}", None, False).__enter__()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", listener.port), 1)


@pytest.mark.parametrize(
    ("serve", "insecure", "reason"),
    [
        (None, True, "add --serve HOST:PORT"),
        ("somewhere", False, "write HOST:PORT"),
        ("0.0.0.0:0", False, "add --token TOKEN, or --insecure"),
    ],
)
def test_what_makes_no_sense_is_one_line(serve: str | None, insecure: bool, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught, page_listener(serve, None, insecure):
        pass
    assert "\n" not in str(caught.value)


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("knet_runtime.web")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    wanted = r'--serve needs the serve extra: pip install "knet-deploy\[serve\]"'
    with pytest.raises(MissingExtra, match=wanted), page_listener("127.0.0.1:0", None, False):
        pass


def test_a_run_says_where_its_page_is_and_ends_with_it(
    call: Callable[..., Any], video: Path
) -> None:
    words = ("--serve", "127.0.0.1:0", "--engine", "onnxruntime-cpu")
    answer = call("run", video, *words)
    assert answer.code == 0
    found = re.fullmatch(r"knet-deploy: the page is at http://127\.0\.0\.1:(\d+)/\n", answer.err)
    assert found is not None, answer.err
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", int(found[1])), 1)


def test_a_run_refuses_an_open_page_in_one_line(
    call: Callable[..., Any], video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = call("run", video, "--serve", "0.0.0.0:0")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "add --token TOKEN, or --insecure" in answer.err
    monkeypatch.setenv("KNET_DEPLOY_TOKEN", "short")
    answer = call("run", video, "--serve", "0.0.0.0:0")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "the token must be 8 to 200" in answer.err
    assert "short" not in answer.err
