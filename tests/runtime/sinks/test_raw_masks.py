"""Raw class maps for another process: through a pipe and through shared memory."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import fakes
import numpy as np
import pytest

import knet_runtime
from knet_runtime.errors import ConfigError, OutputClosed, OutputError, SourceError
from knet_runtime.segmentation import Segmentation
from knet_runtime.sinks.raw_masks import HEADER, RawMask, RawMasks, read_masks
from knet_runtime.sinks.shared_memory import SharedMaskReader, SharedMasks
from knet_runtime.types import Frame
from knet_synthetic import CAMVID11

SHARED = Path("/dev/shm")
linux = pytest.mark.skipif(not SHARED.is_dir(), reason="needs /dev/shm")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(knet_runtime.__file__).parent.parent)}


def a_frame(
    index: int, hw: tuple[int, int] = (48, 64), deep: bool = False, stale: bool = False
) -> tuple[Frame, Segmentation]:
    random = np.random.default_rng(index)
    class_map = random.integers(0, 300 if deep else 11, hw, np.uint16 if deep else np.uint8)
    pts = None if deep else Fraction(index, 25)
    wall = 1_700_000_000.25 if stale else None
    return fakes.a_frame(index, pts, hw, class_map=class_map, wall=wall, stale=stale)


def assert_same(read: RawMask, frame: Frame, mask: Segmentation) -> None:
    assert (read.index, read.wall, read.stale) == (frame.index, frame.wall, frame.stale)
    assert read.pts == (None if frame.pts is None else float(frame.pts))
    assert read.class_map.dtype == mask.class_map.dtype
    np.testing.assert_array_equal(read.class_map, mask.class_map)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    pairs = [a_frame(0), a_frame(1, (7, 9), deep=True), a_frame(2, (1, 1), stale=True)]
    with (tmp_path / "masks.raw").open("wb") as file:
        sink = RawMasks(file.fileno())
        for frame, mask in pairs:
            sink.write(frame, mask)
        sink.close()
    with (tmp_path / "masks.raw").open("rb") as file:
        read = list(read_masks(file))
    assert [mask.sequence for mask in read] == [0, 1, 2]
    for got, (frame, mask) in zip(read, pairs, strict=True):
        assert_same(got, frame, mask)


def test_foreign_and_broken_streams_are_refused() -> None:
    with pytest.raises(SourceError, match="no raw masks"):
        list(read_masks(io.BytesIO(b"\x89PNG" * 100)))
    reader, writer = os.pipe()
    RawMasks(writer).write(*a_frame(0))
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    with pytest.raises(SourceError, match="breaks off within mask 0"):
        list(read_masks(io.BytesIO(data[:-1])))
    with pytest.raises(SourceError, match="breaks off within mask 0"):
        list(read_masks(io.BytesIO(data[:-1] + b"\xff")))
    assert len(data) == HEADER.size + 48 * 64


def test_a_mask_larger_than_the_pipe_arrives_whole() -> None:
    reader, writer = os.pipe()
    frame, mask = a_frame(0, (720, 1280))
    got: list[RawMask] = []

    def read() -> None:
        with os.fdopen(reader, "rb", buffering=0) as pipe:
            got.extend(read_masks(pipe))

    thread = threading.Thread(target=read)
    thread.start()
    sink = RawMasks(writer)
    sink.write(frame, mask)
    sink.close()
    os.close(writer)
    thread.join(10)
    assert_same(got[0], frame, mask)


def test_a_reader_that_goes_is_a_quiet_end() -> None:
    reader, writer = os.pipe()
    sink = RawMasks(writer)
    sink.write(*a_frame(0))
    os.close(reader)
    with pytest.raises(OutputClosed, match="nobody reads it any more"):
        sink.write(*a_frame(1))
    sink.close()
    os.close(writer)


def test_a_reader_that_never_reads_cannot_hold_the_run() -> None:
    reader, writer = os.pipe()
    sink = RawMasks(writer, patience=0.2)
    began = time.monotonic()
    with pytest.raises(OutputError, match=r"has taken nothing for 0\.2 s"):
        sink.write(*a_frame(0, (720, 1280)))
    sink.close()
    assert time.monotonic() - began < 5
    os.close(reader)
    os.close(writer)


def test_a_terminal_is_refused() -> None:
    leader, follower = os.openpty()
    with pytest.raises(ConfigError, match="pipe them into a program"):
        RawMasks(follower)
    os.close(leader)
    os.close(follower)


@pytest.fixture
def name() -> Iterator[str]:
    name = f"knet_test_{uuid.uuid4().hex}"
    yield name
    assert not (SHARED / name).exists()


@linux
def test_readers_get_the_newest_mask_once(name: str) -> None:
    sink = SharedMasks(name)
    with pytest.raises(SourceError, match="start the run that writes them first"):
        SharedMaskReader(name)
    pairs = [a_frame(index, stale=index == 9) for index in range(10)]
    sink.write(*pairs[0])
    with SharedMaskReader(name) as reader, SharedMaskReader(name) as other:
        first = reader.latest()
        assert first is not None
        assert_same(first, *pairs[0])
        assert reader.latest(timeout=0.01) is None
        for frame, mask in pairs[1:]:
            sink.write(frame, mask)
        for each in (reader, other):
            last = each.latest()
            assert last is not None
            assert_same(last, *pairs[9])
        assert not reader.ended
        sink.close()
        assert reader.ended
        assert reader.latest(timeout=60) is None


@linux
def test_a_larger_frame_makes_a_larger_ring(name: str) -> None:
    sink = SharedMasks(name)
    sink.write(*a_frame(0))
    with SharedMaskReader(name) as reader:
        assert reader.latest() is not None
        for hw in ((100, 200), (10, 20)):
            pair = a_frame(1, hw)
            sink.write(*pair)
            read = reader.latest(timeout=5)
            assert read is not None
            assert_same(read, *pair)
        sink.close()
        assert reader.ended


@linux
def test_a_larger_ring_that_came_and_went_is_an_end(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("knet_runtime.sinks.shared_memory._REPLACING_SECONDS", 0.05)
    sink = SharedMasks(name)
    sink.write(*a_frame(0))
    with SharedMaskReader(name) as reader:
        assert reader.latest() is not None
        sink.write(*a_frame(1, (90, 120)))
        sink.close()
        assert reader.latest() is None
        assert not reader.ended  # the larger one may be coming
        assert reader.latest(timeout=5) is None
        assert reader.ended


@linux
def test_masks_are_whole_while_they_are_written_over(name: str) -> None:
    """A mask is of one value throughout, its frame's index: a torn one would show two."""
    sink = SharedMasks(name)
    stop = threading.Event()

    def write() -> None:
        index = 0
        while not stop.is_set():
            class_map = np.full((120, 160), index % 251, np.uint8)
            frame = Frame(np.zeros((1, 1, 3), np.uint8), index, None, "x")
            sink.write(frame, Segmentation(class_map, CAMVID11, {}))
            index += 1

    sink.write(*a_frame(0, (120, 160)))
    writer = threading.Thread(target=write)
    writer.start()
    try:
        with SharedMaskReader(name) as reader:
            reader.latest()
            last = -1
            for _ in range(200):
                read = reader.latest(timeout=5)
                assert read is not None
                assert read.sequence > last
                last = read.sequence
                assert (read.class_map == read.index % 251).all()
    finally:
        stop.set()
        writer.join()
        sink.close()


READER = """
import os, signal, sys
from knet_runtime.sinks.shared_memory import SharedMaskReader
reader = SharedMaskReader(sys.argv[1])
assert reader.latest(timeout=10) is not None
print("read", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
WRITER = """
import sys, time
import numpy as np
from knet_runtime.types import Frame
from knet_runtime.labels import LabelMap
from knet_runtime.segmentation import Segmentation
from knet_runtime.sinks.shared_memory import SharedMasks
sink = SharedMasks(sys.argv[1])
mask = Segmentation(np.zeros((4, 4), np.uint8), LabelMap(("Road",), ((9, 9, 9),), 255), {})
sink.write(Frame(np.zeros((4, 4, 3), np.uint8), 0, None, "0"), mask)
print("written", flush=True)
time.sleep(60)
"""
FULL = """
import resource, sys
import numpy as np
from knet_runtime.errors import OutputError
from knet_runtime.types import Frame
from knet_runtime.labels import LabelMap
from knet_runtime.segmentation import Segmentation
from knet_runtime.sinks.shared_memory import SharedMasks
sink = SharedMasks(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
mask = Segmentation(np.zeros((2000, 2000), np.uint8), LabelMap(("Road",), ((9, 9, 9),), 255), {})
try:
    sink.write(Frame(np.zeros((1, 1, 3), np.uint8), 0, None, "0"), mask)
    sys.exit("there was room")
except OutputError as error:
    assert "free some of /dev/shm" in str(error), error
sink.close()
"""


@linux
def test_a_killed_reader_leaves_the_memory_to_the_writer(name: str) -> None:
    sink = SharedMasks(name)
    sink.write(*a_frame(0))
    done = subprocess.run(
        [sys.executable, "-c", READER, name],
        env=ENVIRONMENT,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == b"read\n"
    pair = a_frame(1)
    sink.write(*pair)
    with SharedMaskReader(name) as reader:
        read = reader.latest()
        assert read is not None
        assert_same(read, *pair)
    sink.close()


@linux
def test_the_memory_of_a_killed_writer_goes_and_its_readers_are_told(name: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, name], env=ENVIRONMENT, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"written\n"
        with SharedMaskReader(name) as reader:
            assert not reader.ended
            with pytest.raises(OutputError, match="choose another name"):
                SharedMasks(name)
            writer.kill()
            writer.wait()
            deadline = time.monotonic() + 20
            while not reader.ended:
                assert time.monotonic() < deadline
                time.sleep(0.01)


@linux
def test_what_a_dead_process_left_is_replaced_and_what_is_foreign_is_not(name: str) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = b"KNR1" + dead.pid.to_bytes(4, "little") + bytes(200)
    (SHARED / name).write_bytes(left)
    sink = SharedMasks(name)
    assert not (SHARED / name).exists()
    sink.close()
    (SHARED / name).write_bytes(b"something else")
    try:
        with pytest.raises(OutputError, match="holds no masks"):
            SharedMasks(name)
    finally:
        (SHARED / name).unlink()


@linux
def test_names_that_cannot_be_are_refused() -> None:
    for wrong in ("", "../x", "a/b", ".hidden"):
        with pytest.raises(ConfigError, match="cannot be called"):
            SharedMasks(wrong)


@linux
def test_more_memory_than_there_is_is_an_error_and_no_crash(name: str) -> None:
    subprocess.run([sys.executable, "-c", FULL, name], env=ENVIRONMENT, check=True, timeout=60)
