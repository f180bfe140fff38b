"""What a power cut, a kill and a neighbour leave of files that are written for hours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic

import pytest
from waiting import wait_until

import knet_runtime
from knet_runtime import growing
from knet_runtime.errors import OutputError
from knet_runtime.growing import FileSeries, GrowingFile, abandoned, rescue
from knet_runtime.locks import FileLock

pytestmark = pytest.mark.skipif(os.name != "posix", reason="locks and syncs are POSIX's")
ROOM = str(Path(knet_runtime.__file__).parent.parent)


class Disk:
    """What a power cut would leave: contents that were synced, under names that were synced."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._contents: dict[int, bytes] = {}
        self.names: dict[str, bytes] = {}
        self.waits = 0
        self._real = os.fsync
        patch.setattr(os, "fsync", self._sync)
        patch.setattr(os, "fdatasync", self._sync)

    def _sync(self, handle: int) -> None:
        self.waits += 1
        state = os.fstat(handle)
        path = Path(f"/proc/self/fd/{handle}").readlink()
        if path.is_dir():
            if path == self._folder:
                entries = ((entry.name, entry.stat().st_ino) for entry in path.iterdir())
                self.names = {name: self._contents.get(node, b"") for name, node in entries}
            return
        self._contents[state.st_ino] = path.read_bytes()


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("names of handles are Linux's")
    return Disk(tmp_path, monkeypatch)


def test_a_growing_file_is_on_the_disk_while_it_grows(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growing, "SAVE_SECONDS", 0.02)
    file = GrowingFile(tmp_path / "a.txt")
    file.start()
    with file.temporary.open("ab", buffering=0) as writer:
        for text in (b"1", b"2", b"3"):
            writer.write(text)
            whole = file.temporary.read_bytes()
            wait_until(lambda whole=whole: disk.names.get(file.temporary.name) == whole)
    file.commit(complete=True)
    assert disk.names == {"a.txt": b"123"}
    waits = disk.waits
    file.discard()
    assert disk.waits == waits  # and nobody goes on with it


def test_a_disk_that_failed_meanwhile_makes_the_file_partial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(handle: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(growing, "SAVE_SECONDS", 0.01)
    file = GrowingFile(tmp_path / "a.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fdatasync", fails)
        file.start()
        wait_until(lambda: file._problem)
    file.temporary.write_bytes(b"perhaps")
    with pytest.raises(OutputError, match=r"Input/output error; .*kept in .*a\.partial\.txt"):
        file.commit(complete=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.partial.txt"]


def test_the_files_of_a_series_have_their_names_only_once_they_are_on_the_disk(
    tmp_path: Path, disk: Disk
) -> None:
    series = FileSeries()
    for number in range(30):
        series.add(tmp_path / f"{number}.png", f"mask {number}".encode())
    visible = {path.name for path in tmp_path.glob("[0-9]*.png")}
    assert visible == {"0.png"}  # it came alone; the others wait for one another
    series.close()
    assert disk.names == {f"{number}.png": f"mask {number}".encode() for number in range(30)}
    assert disk.waits == 30 + 2  # a file each, and the folder for the first one and for all


def test_a_file_that_comes_alone_does_not_wait_for_the_next(tmp_path: Path) -> None:
    series = FileSeries()
    series.add(tmp_path / "a.png", b"a")
    assert (tmp_path / "a.png").read_bytes() == b"a"
    series.add(tmp_path / "b.png", b"b")
    began = monotonic()
    wait_until((tmp_path / "b.png").exists, "the second")
    assert monotonic() - began < 3
    series.close()


def test_a_file_of_a_series_whose_name_is_taken_is_named_and_kept(tmp_path: Path) -> None:
    series = FileSeries()
    for name in "abc":
        series.add(tmp_path / name, b"whole")
    (tmp_path / "b").mkdir()
    with pytest.raises(OutputError, match=r"/b: .*kept in .*b\.partial"):
        series.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "b.partial", "c"]
    assert (tmp_path / "b.partial").read_bytes() == b"whole"
    with pytest.raises(OutputError, match="/b: "):
        series.add(tmp_path / "d", b"")


KILLED = """
import os, sys
from pathlib import Path
from knet_runtime.growing import GrowingFile
file = GrowingFile(Path(sys.argv[1]))
file.start()
file.temporary.write_text(sys.argv[2])
if sys.argv[3] == "killed":
    os.kill(os.getpid(), 9)
print("alive", flush=True)
sys.stdin.read()
"""


def test_what_a_killed_run_left_is_kept_and_that_of_a_living_one_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "a [1].b.txt"
    command = [sys.executable, "-c", KILLED, str(target)]
    env = {**os.environ, "PYTHONPATH": ROOM}
    for text in ("first", "second", ""):
        killed = subprocess.run([*command, text, "killed"], env=env, check=False, timeout=60)
        assert killed.returncode == -signal.SIGKILL
        if text == "first":
            (tmp_path / f".{target.name}.17.part").write_text("of an older version")
            (tmp_path / f".{target.name}x.17.part").write_text("of another file")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([*command, "alive", "waits"], env=env, **pipes) as living:  # type: ignore[call-overload]
        assert living.stdout.read(5) == b"alive"
        file = GrowingFile(target)
        assert len(list(abandoned(tmp_path, ".*"))) == 1
        living.communicate()
    # The living one has found and named them all when it started.
    kept = {path.name: path.read_text() for path in tmp_path.glob("a*")}
    assert set(kept) == {"a [1].b.partial.txt", "a [1].b.partial.2.txt", "a [1].b.partial.3.txt"}
    assert set(kept.values()) == {"first", "second", "of an older version"}
    assert file.rescued == []
    assert [path.read_text() for path in rescue(target)] == ["alive"]
    assert str(tmp_path / "a [1].b.partial.4.txt") in caplog.text
    assert [path.name for path in abandoned(tmp_path, ".*")] == [f".{target.name}x.17.part"]


def test_a_lock_is_one_holders_and_a_leftover_locks_nobody_out(tmp_path: Path) -> None:
    place = tmp_path / "lock"
    place.write_text("left by a killed process")
    with FileLock(place), pytest.raises(BlockingIOError):
        FileLock(place)
    assert not place.exists()
    FileLock(place).close()
