"""What every room's tests share: where the real data is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data (CamVid, videos, a backbone); skips where it is absent."""
    default = REPOSITORY.parent / "shared" / "data"
    folder = Path(os.environ.get("KNET_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"real data is not at {folder}: set KNET_SHARED_DATA to its folder")
    return folder
