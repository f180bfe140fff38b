"""Signals: those of a terminal that is closed, and those that native code keeps from being seen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from time import monotonic

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from waiting import wait_until

from knet_deploy.cli.console import exit_code_of
from knet_runtime.bundle.store import Bundle
from knet_runtime.sinks.encoder import ENCODERS, VideoWriter, working_encoder

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")


@pytest.fixture
def hanging_bundle(
    make_bundle: Callable[..., Bundle], colour_model: Callable[..., bytes]
) -> Bundle:
    """The colour model, in which an image with a bright pixel keeps a loop going for years."""
    model = onnx.load_from_string(colour_model())
    graph = model.graph
    cast = next(node for node in graph.node if node.output[0] == "logits")
    cast.output[0] = "quick"
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_in"], ["go_out"]),
            helper.make_node("Neg", ["x_in"], ["x_out"]),
        ],
        "body",
        [
            value("i", TensorProto.INT64, []),
            value("go_in", TensorProto.BOOL, []),
            value("x_in", TensorProto.FLOAT, None),
        ],
        [value("go_out", TensorProto.BOOL, []), value("x_out", TensorProto.FLOAT, None)],
    )
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.float32(160), "dark"),
            numpy_helper.from_array(np.int64(2**44), "years"),
            numpy_helper.from_array(np.bool_(True), "go"),
        ]
    )
    graph.node.extend(
        [
            helper.make_node("ReduceMax", ["float"], ["brightest"], keepdims=0),
            helper.make_node("Sub", ["brightest", "dark"], ["above"]),
            helper.make_node("Relu", ["above"], ["bright"]),
            helper.make_node("Cast", ["bright"], ["whole"], to=TensorProto.INT64),
            helper.make_node("Mul", ["whole", "years"], ["trips"]),
            helper.make_node("Loop", ["trips", "go", "quick"], ["logits"], body=body),
        ]
    )
    return make_bundle(model.SerializeToString())


@pytest.fixture
def darkness(tmp_path: Path) -> Path:
    """A video of five dark frames and then bright ones."""
    path = tmp_path / "drive.mp4"
    encoder = working_encoder(ENCODERS["h264"], (96, 128))
    writer = VideoWriter(path, (96, 128), Fraction(1, 10), Fraction(10), encoder)
    for tick in range(8):
        writer.write(np.full((96, 128, 3), 40 if tick < 5 else 250, np.uint8), tick)
    writer.close()
    return path


@contextmanager
def started(*words: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does not outlive the test."""
    with subprocess.Popen(
        [sys.executable, "-m", "knet_deploy", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def seconds_computed(process: subprocess.Popen[bytes]) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / os.sysconf("SC_CLK_TCK")


@pytest.mark.slow
def test_an_engine_that_never_returns_ends_within_ten_seconds_of_sigterm(
    hanging_bundle: Bundle, darkness: Path, tmp_path: Path
) -> None:
    words = ["run", darkness, "--bundle", hanging_bundle.path, "--self-test", "off"]
    outputs = ["--json", tmp_path / "o.jsonl", "-o", tmp_path / "o.mp4"]
    with started(*words, *outputs) as process:
        wait_until(
            lambda: any(p.read_bytes().count(b"\n") == 5 for p in tmp_path.glob(".o.jsonl.*")),
            "the dark frames",
            seconds=60,
        )
        process.send_signal(signal.SIGTERM)
        began = monotonic()
        out, err = process.communicate(timeout=20)
    assert monotonic() - began < 10
    assert process.returncode == 143, err
    assert b"Traceback" not in err
    written = (tmp_path / "o.partial.jsonl").read_text().splitlines()
    assert [json.loads(line)["frame"] for line in written] == [0, 1, 2, 3, 4]
    for name in ("o.partial.jsonl", "o.partial.mp4"):
        assert f"written      {tmp_path / name}\n".encode() in out
        assert (tmp_path / name).is_file()


@pytest.mark.slow
def test_a_self_test_that_never_returns_ends_within_ten_seconds_of_sighup(
    hanging_bundle: Bundle, darkness: Path, tmp_path: Path
) -> None:
    words = ["run", darkness, "--bundle", hanging_bundle.path, "--json", tmp_path / "o.jsonl"]
    with started(*words) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"engine")  # the last thing before it
        before = seconds_computed(process)
        wait_until(lambda: seconds_computed(process) > before + 0.5, "the self-test", seconds=60)
        process.send_signal(signal.SIGHUP)
        began = monotonic()
        _, err = process.communicate(timeout=20)
    assert monotonic() - began < 10
    assert process.returncode == 129, err
    assert err.splitlines()[-1].endswith(b"a call that cannot be interrupted hangs: ended by force")
    assert not list(tmp_path.glob("*o.jsonl*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_sighup_ends_a_command_as_sigterm_does(number: signal.Signals, code: int) -> None:
    closed = []

    def command() -> None:
        try:
            os.kill(os.getpid(), number)
            threading.Event().wait(10)
        finally:
            closed.append(True)

    assert exit_code_of(command) == code
    assert closed == [True]


def test_sighup_goes_to_whoever_handles_sigterm_meanwhile() -> None:
    asked: list[int] = []

    def command() -> None:
        before = signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
        os.kill(os.getpid(), signal.SIGHUP)
        signal.signal(signal.SIGTERM, before)

    assert exit_code_of(command) == 0
    assert asked == [signal.SIGTERM]


def test_a_sighup_that_nohup_switched_off_stays_off() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert exit_code_of(lambda: os.kill(os.getpid(), signal.SIGHUP)) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
