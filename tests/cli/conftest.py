"""A short video, and the command line called in this process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest

from knet_deploy.cli import main
from knet_runtime.bundle import default_bundle_path
from knet_runtime.mp4 import ENCODERS, Mp4Writer, working_encoder
from knet_runtime.synthetic import Street

RATE = 10


@dataclass(frozen=True)
class Answer:
    """What a command gave back."""

    code: int
    out: str
    err: str


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Call ``knet-deploy`` with these words."""

    def run(*words: str | Path) -> Answer:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def make_video(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """An MP4 of so many frames of a street, 96×128."""

    def make(frames: int) -> Path:
        path = tmp_path_factory.mktemp("video") / "drive.mp4"
        encoder = working_encoder(ENCODERS, (96, 128))
        writer = Mp4Writer(path, (96, 128), Fraction(1, RATE), Fraction(RATE), encoder)
        street = Street(1, (96, 128))
        pictures = [street.frame(index)[0] for index in range(min(frames, 4))]
        for tick in range(frames):
            writer.write(pictures[tick % len(pictures)], tick)
        writer.close()
        return path

    return make


@pytest.fixture(scope="session")
def video(make_video: Callable[[int], Path]) -> Path:
    """An MP4 of four frames."""
    return make_video(4)


@pytest.fixture
def copied_bundle(tmp_path: Path) -> Path:
    """The packaged model, where it can be damaged."""
    return Path(shutil.copytree(default_bundle_path(), tmp_path / "copy.knet"))
