from __future__ import annotations

import platform

import pytest
import torch

from knet_train.fit import keep_freed_memory


def test_it_holds_with_glibc_and_large_tensors_still_come_and_go() -> None:
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
    for _ in range(3):
        assert float(torch.ones(10_000_000).sum()) == 10_000_000


@pytest.mark.parametrize(("system", "libc"), [("Darwin", ""), ("Linux", "musl")])
def test_elsewhere_it_does_nothing(system: str, libc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "libc_ver", lambda: (libc, ""))
    assert keep_freed_memory() is False
