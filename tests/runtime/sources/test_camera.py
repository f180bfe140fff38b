"""Sources named otherwise than by a file: cameras and addresses."""

from __future__ import annotations

from pathlib import Path

import pytest

from knet_runtime.errors import SourceError
from knet_runtime.sources import open_source


@pytest.mark.parametrize("scheme", ["rtmp", "ftp", "file", "concat", "udp"])
def test_other_protocols_are_refused_without_their_password(scheme: str) -> None:
    with pytest.raises(SourceError, match=f"{scheme} addresses cannot be read, only") as caught:
        open_source(f"{scheme}://user:secret@host/stream")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["97", "camera:97", "/dev/video97"])
def test_an_absent_camera_says_how_to_find_one(name: str) -> None:
    with pytest.raises(SourceError, match=r"/dev/video97: .*(plug it in|Linux only)"):
        open_source(name)


def test_a_path_named_like_a_camera_is_a_path(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="0: No such file"):
        open_source(tmp_path / "0")
