"""``run`` between other programs: ffmpeg and GStreamer before and behind it, and recordings."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numbered import number_of, numbered
from ros_bags import SECOND, START, record

from knet_runtime.bundle.store import Bundle
from knet_runtime.sources import open_source
from knet_runtime.sources.base import SourceOptions

Call = Callable[..., Any]
COUNT = 1000


@cache
def has(tool: str, *elements: str) -> bool:
    if shutil.which(tool) is None:
        return False
    inspect = ["gst-inspect-1.0", "--exists"]
    return all(subprocess.run([*inspect, name], check=False).returncode == 0 for name in elements)


needs_ffmpeg = pytest.mark.skipif(not has("ffmpeg"), reason="needs Debian's ffmpeg")
needs_gst = pytest.mark.skipif(
    not has("gst-launch-1.0", "rawvideoparse", "y4menc"),
    reason="needs Debian's gstreamer1.0-tools and gstreamer1.0-plugins-base, -good",
)
needs_y4mdec = pytest.mark.skipif(
    not has("gst-launch-1.0", "y4mdec"), reason="needs Debian's gstreamer1.0-plugins-bad"
)


@pytest.fixture
def bundle(make_bundle: Callable[..., Bundle]) -> str:
    """A bundle of three classes, red, green and blue, whose engine takes no time."""
    return f"--bundle {shlex.quote(str(make_bundle().path))} --self-test off"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A thousand numbered frames of rgb24, 32×24."""
    path = tmp_path / "in.rgb"
    path.write_bytes(b"".join(numbered(index).tobytes() for index in range(COUNT)))
    return path


def pipeline(line: str, folder: Path) -> str:
    """Run a line of bash in which KNET is ``knet-deploy run``; what it says on stderr."""
    knet = f"{shlex.quote(sys.executable)} -m knet_deploy run"
    line = f"set -euo pipefail; {line.replace('KNET', knet)}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return done.stderr


def numbers_of(path: Path) -> list[int]:
    frames = np.fromfile(path, np.uint8).reshape(-1, 24, 32, 3)
    return [number_of(frame) for frame in frames]


@needs_ffmpeg
def test_ffmpeg_on_both_sides_loses_none_of_a_thousand_raw_frames(
    tmp_path: Path, bundle: str, raw: Path
) -> None:
    said = pipeline(
        "ffmpeg -v error -f rawvideo -video_size 32x24 -pixel_format rgb24 -i in.rgb "
        "-f rawvideo -pix_fmt bgr24 - "
        f"| KNET - --raw-input 32x24:bgr24@30 -o - --raw-output rgb24 --alpha 0 {bundle} "
        "| ffmpeg -v error -f rawvideo -video_size 32x24 -pixel_format rgb24 -i - "
        "-f rawvideo out.rgb",
        tmp_path,
    )
    assert f"frames       {COUNT}\n" in said
    assert (tmp_path / "out.rgb").read_bytes() == raw.read_bytes()


@needs_ffmpeg
def test_ffmpeg_on_both_sides_keeps_number_and_time_of_a_thousand_y4m_frames(
    tmp_path: Path, bundle: str, raw: Path
) -> None:
    pipeline(
        "ffmpeg -v error -f rawvideo -video_size 32x24 -pixel_format rgb24 "
        "-framerate 30000/1001 -i in.rgb -f yuv4mpegpipe -pix_fmt yuv420p - "
        f"| KNET - -o - --alpha 0 --json o.jsonl {bundle} "
        "| ffmpeg -v error -i - -c:v ffv1 out.mkv",
        tmp_path,
    )
    with open_source(tmp_path / "out.mkv") as source:
        frames = list(source)
    assert [number_of(frame.image) for frame in frames] == list(range(COUNT))
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    for line, frame in zip(lines, frames, strict=True):
        assert line["pts"] == pytest.approx(line["frame"] * 1001 / 30000, abs=1e-9)
        assert frame.pts == pytest.approx(line["pts"], abs=0.001)  # Matroska's milliseconds


@needs_gst
def test_gstreamer_on_both_sides_loses_none_of_a_thousand_raw_frames(
    tmp_path: Path, bundle: str, raw: Path
) -> None:
    parse = "rawvideoparse format=rgb width=32 height=24 framerate=30/1"
    pipeline(
        f"gst-launch-1.0 -q filesrc location=in.rgb ! {parse} ! videoconvert "
        "! video/x-raw,format=BGRx ! fdsink "
        f"| KNET - --raw-input 32x24:BGRx@30 -o - --raw-output RGB --alpha 0 {bundle} "
        f"| gst-launch-1.0 -q fdsrc fd=0 ! {parse} ! filesink location=out.rgb",
        tmp_path,
    )
    assert numbers_of(tmp_path / "out.rgb") == list(range(COUNT))


@needs_gst
@needs_y4mdec
def test_gstreamer_on_both_sides_keeps_a_thousand_y4m_frames(
    tmp_path: Path, bundle: str, raw: Path
) -> None:
    pipeline(
        "gst-launch-1.0 -q filesrc location=in.rgb "
        "! rawvideoparse format=rgb width=32 height=24 framerate=30/1 ! videoconvert "
        "! video/x-raw,format=I420 ! y4menc ! fdsink "
        f"| KNET - -o - --alpha 0 {bundle} "
        "| gst-launch-1.0 -q fdsrc fd=0 ! y4mdec ! videoconvert ! video/x-raw,format=RGB "
        "! filesink location=out.rgb",
        tmp_path,
    )
    assert numbers_of(tmp_path / "out.rgb") == list(range(COUNT))


@needs_ffmpeg
def test_masks_go_to_stdout_as_grey_frames(tmp_path: Path, bundle: str) -> None:
    pipeline(
        "ffmpeg -v error -f lavfi -i color=red:s=48x32:d=1:r=5,format=rgb24 -f rawvideo - "
        f"| KNET - --raw-input 48x32:rgb24 --masks - --raw-output gray {bundle} "
        "| ffmpeg -v error -f rawvideo -video_size 48x32 -pixel_format gray -i - "
        "-f rawvideo out.gray",
        tmp_path,
    )
    masks = np.fromfile(tmp_path / "out.gray", np.uint8)
    assert (len(masks), masks.max()) == (5 * 48 * 32, 0)  # class 0 is red


def test_a_cut_off_end_is_a_warning_and_the_rest_is_written(
    tmp_path: Path, bundle: str, raw: Path
) -> None:
    said = pipeline(
        f"head -c 23000 in.rgb | KNET - --raw-input 32x24:rgb24 --json o.jsonl {bundle} >words.txt",
        tmp_path,
    )
    assert said.endswith(
        "warning: stdin: ends within a frame; the 9 whole frames before it are kept, 2264 bytes "
        "are left out (do 32x24:rgb24 frames come?)\n"
    )
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 9


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["-", "--source", "-"], "stdin (-) is one source: name it once"),
        (["-o", "-", "--raw", "-"], "-o and --raw would mix on stdout"),
        (["-o", "-", "--masks", "-"], "-o and --masks would mix on stdout"),
        (["--raw-output", "rgb24"], "add -o - or --masks -, or leave it out"),
        (["-o", "o.mp4", "--raw-output", "rgb24"], "add -o - or --masks -, or leave it out"),
        (["--raw-input", "8x8:gray"], "--raw-input says what comes on stdin"),
        (["--topic", "/image"], "--topic is of recordings of ROS"),
        (["-o", "-", "--source", "x.mp4"], "-o - is for one source"),
        (["--masks", "-", "--overwrite"], "add -o FOLDER, --masks FOLDER"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    call: Call, video: Path, words: list[str], text: str
) -> None:
    answer = call("run", *([] if words[0] == "-" else [video]), *words)
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert text in answer.err


def test_a_recording_goes_in_and_out(
    call: Call, tmp_path: Path, make_bundle: Callable[..., Bundle]
) -> None:
    stamps = [START + index * SECOND // 10 for index in range(5)]
    record(tmp_path / "drive.bag", "bag", stamps, "lz4")
    places = tmp_path / "o.mcap", tmp_path / "o.jsonl", tmp_path / "o.mp4"
    bundle = ["--bundle", make_bundle().path, "--self-test", "off"]
    topic = ["--topic", "/camera/image_raw"]
    answer = call(
        "run", tmp_path / "drive.bag", *topic, "-o", places[0], "--json", places[1], *bundle
    )
    assert answer.code == 0, answer.err
    assert f"written      {places[0]}\n" in answer.out
    options = SourceOptions(topic="/camera/segmentation/classes")
    with open_source(places[0], options) as source:
        assert [frame.ros.stamp for frame in source if frame.ros] == stamps
    lines = [json.loads(line) for line in places[1].read_text().splitlines()]
    assert [line["stamp"] for line in lines] == [list(divmod(stamp, SECOND)) for stamp in stamps]
    assert [line["pts"] for line in lines] == [0, 0.1, 0.2, 0.3, 0.4]
    assert call("run", tmp_path / "drive.bag", "-o", places[2], *bundle).code == 0
    with open_source(places[2]) as source:
        assert [float(frame.pts or 0) for frame in source] == [0, 0.1, 0.2, 0.3, 0.4]
    assert call("run", tmp_path / "drive.bag", "-o", tmp_path / "drive.bag", *bundle).code == 2


def test_ctrl_c_leaves_a_whole_recording_while_stdin_is_silent(tmp_path: Path, bundle: str) -> None:
    words = f"run - --raw-input 32x24:rgb24@10 -o o.mcap --json - {bundle}"
    run = subprocess.Popen(
        [sys.executable, "-m", "knet_deploy", *shlex.split(words)],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert run.stdin is not None
    assert run.stdout is not None
    run.stdin.write(b"".join(numbered(index).tobytes() for index in range(50)))
    run.stdin.flush()
    for _ in range(50):
        run.stdout.readline()
    run.send_signal(signal.SIGINT)
    lines = 50 + run.stdout.read().count(b"\n")
    assert run.wait(60) == 130
    run.stdin.close()
    run.stdout.close()
    options = SourceOptions(topic="/segmentation/classes")
    with open_source(tmp_path / "o.mcap", options) as source:
        times = [frame.pts for frame in source]
    assert len(times) == lines
    assert times == [Fraction(index, 10) for index in range(lines)]
