"""What the tests of all packages share: where the real data is, and fixtures of models."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

pytest_plugins = [
    *("colour_model", "narrow_knet", "segment_model"),
    *("small_knet", "small_segments"),
]

REPOSITORY = Path(__file__).resolve().parent.parent

# A shell ignores Ctrl-C for what it starts in the background, as nohup does hang-ups, and what that
# starts inherits it: without this, tests of signals would depend on how they were started.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


# M_TRIM_THRESHOLD and M_MMAP_MAX of <malloc.h>, and what glibc begins with.
_MALLOC_DEFAULTS = {-1: 128 << 10, -4: 1 << 16}


@cache
def _has_glibc() -> bool:
    return platform.system() == "Linux" and platform.libc_ver()[0] == "glibc"


@pytest.fixture(autouse=True)
def _freed_memory_is_returned() -> Iterator[None]:
    """A training run lets its process keep the most memory that it ever held; this one trains
    many."""
    yield
    if "knet_train.devices" in sys.modules and _has_glibc():
        libc = ctypes.CDLL(None)
        for setting, value in _MALLOC_DEFAULTS.items():
            libc.mallopt(setting, value)
        libc.malloc_trim(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data (CamVid, videos, a backbone); skips where it is absent."""
    default = REPOSITORY.parent / "shared" / "data"
    folder = Path(os.environ.get("KNET_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"real data is not at {folder}: set KNET_SHARED_DATA to its folder")
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--soak`` runs the tests that take an hour; no ``-m`` given elsewhere can bring them in."""
    parser.addoption("--soak", action="store_true", help="run the tests marked soak too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what is marked soak without ``--soak``."""
    if config.getoption("--soak"):
        return
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.skip(reason="takes long: run it with --soak"))
