"""The examples in Python, each run as a user runs it, but in this process."""

from __future__ import annotations

import json
import runpy
import signal
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from knet_deploy import ConfigError, Segmenter
from knet_runtime.bundle.store import Bundle
from knet_runtime.engines import open_engine
from knet_runtime.sinks.encoder import ENCODERS, VideoWriter, working_encoder
from knet_runtime.types import Task

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def example(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., str]]:
    """Run one with these words; what it printed. Signals are as before afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(name: str, *words: object) -> str:
        monkeypatch.setattr("sys.argv", [name, *map(str, words)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    yield run
    for number, handler in kept.items():
        signal.signal(number, handler)


def write_video(path: Path, frames: NDArray[np.uint8]) -> None:
    """RGB frames [N, H, W, 3], ten a second."""
    size = (frames.shape[1], frames.shape[2])
    encoder = working_encoder(ENCODERS["h264"], size)
    writer = VideoWriter(path, size, Fraction(1, 10), Fraction(10), encoder)
    for tick, frame in enumerate(frames):
        writer.write(frame, tick)
    writer.close()


@pytest.fixture
def red(tmp_path: Path) -> Path:
    """A picture that is red on the left and blue on the right."""
    pixels = np.zeros((60, 80, 3), np.uint8)
    pixels[:, :40, 2] = pixels[:, 40:, 0] = 255
    cv2.imwrite(str(tmp_path / "red.png"), pixels)
    return tmp_path / "red.png"


def test_one_image(
    example: Callable[..., str],
    red: Path,
    make_bundle: Callable[..., Bundle],
    make_segment_bundle: Callable[[Task], Bundle],
) -> None:
    said = example("one_image.py", red, "--bundle", make_bundle().path)
    assert "red" in said
    assert "50.0% of the picture" in said
    drawn = cv2.imread("overlay.png")
    assert drawn is not None
    assert drawn.shape == (60, 80, 3)
    said = example("one_image.py", red, "--bundle", make_segment_bundle("panoptic").path)
    assert "car          0.88 at 0, 0: 40×60 pixels" in said


def test_an_example_says_what_is_wrong_in_one_line(example: Callable[..., str]) -> None:
    with pytest.raises(SystemExit, match=r"^nothing\.png.*"):
        example("one_image.py", "nothing.png")


def test_own_sink(
    example: Callable[..., str], make_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    """Red comes at frame 4 and goes at 12; two frames of it before are no alarm."""
    frames = np.zeros((20, 48, 64, 3), np.uint8)
    frames[..., 2] = 255
    for first, last in ((1, 3), (4, 12)):
        frames[first:last] = (255, 0, 0)
    write_video(tmp_path / "red.mp4", frames)
    words = ["--bundle", make_bundle().path, "--class", "red", "--area", "0.5,0.5,1,1"]
    said = example("own_sink.py", "red.mp4", *words).splitlines()
    assert [line.split(": ")[1] for line in said[:-1]] == ["red in the area", "red out of the area"]
    assert said[-1].startswith("20 frames")
    with pytest.raises(SystemExit, match=r"no class 'ghost': choose of .*red"):
        example("own_sink.py", "red.mp4", *words[:2], "--class", "ghost")


def test_own_engine(example: Callable[..., str], red: Path, small_bundle: Bundle) -> None:
    said = example("own_engine.py", red, "--bundle", small_bundle.path)
    assert said.startswith("own-CPUExecutionProvider: ")
    assert "Segmentation(semantic, 60×80" in said
    with pytest.raises(SystemExit, match=r"Nonsense"):
        example("own_engine.py", red, "--bundle", small_bundle.path, "--provider", "Nonsense")


def test_an_engine_of_ones_own_has_to_give_what_is_asked_of_it(
    make_bundle: Callable[..., Bundle],
) -> None:
    bundle = make_bundle()
    with open_engine(bundle, "onnxruntime-cpu") as engine:
        engine.kind = "class_map"
        with pytest.raises(ConfigError, match="onnxruntime-cpu gives a class map"):
            Segmenter(bundle, engine, uncertainty=True)


def test_camera_to_json(
    example: Callable[..., str],
    make_bundle: Callable[..., Bundle],
    make_segment_bundle: Callable[[Task], Bundle],
    tmp_path: Path,
) -> None:
    frames = np.zeros((6, 48, 64, 3), np.uint8)
    frames[:, :, :32, 0] = frames[:, :, 32:, 2] = 255
    write_video(tmp_path / "both.mp4", frames)
    panoptic = make_segment_bundle("panoptic").path
    said = example("camera_to_json.py", "both.mp4", "--bundle", panoptic)
    lines = [json.loads(line) for line in said.splitlines()]
    assert [line["frame"] for line in lines] == list(range(6))
    assert [line["objects"][0]["id"] for line in lines] == [1] * 6
    assert lines[0]["objects"][0]["class"] == "car"
    words = ["--bundle", make_bundle().path, "--frames", 2]
    said = example("camera_to_json.py", "both.mp4", *words)
    lines = [json.loads(line) for line in said.splitlines()]
    assert len(lines) == 2
    assert lines[1]["time"] > 0
    assert sum(lines[0]["shares"].values()) == pytest.approx(1, abs=0.01)
