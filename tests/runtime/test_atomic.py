"""What is written appears whole: bytes on the disk, then the name, then the name on the disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from knet_runtime import atomic
from knet_runtime.atomic import AtomicFile, AtomicFolder, json_bytes, write_atomic, write_json
from knet_runtime.errors import OutputError


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the file system, in order: "sync" of a name, and names that are taken."""
    steps: list[str] = []
    fsync = os.fsync

    def sync(handle: int) -> None:
        steps.append(f"sync {Path(f'/proc/self/fd/{handle}').readlink().suffix or 'folder'}")
        fsync(handle)

    def step(name: str) -> Callable[[Path, Path], Path]:
        real = getattr(Path, name)

        def take(self: Path, target: Path) -> Path:
            steps.append(f"name {Path(target).name}")
            return Path(real(self, target))

        return take

    monkeypatch.setattr(os, "fsync", sync)
    for name in ("replace", "rename"):
        monkeypatch.setattr(Path, name, step(name))
    return steps


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, told: list[str]) -> None:
    once = ["sync .part", "name a.txt", "sync folder"]
    write_atomic(tmp_path / "a.txt", b"1")
    assert told == once
    AtomicFile(tmp_path / "a.txt").write(b"2")
    assert told == 2 * once
    write_json(tmp_path / "a.txt", {"b": [1]})
    assert told == 3 * once
    assert (tmp_path / "a.txt").read_bytes() == b'{\n  "b": [\n    1\n  ]\n}\n'
    write_atomic(tmp_path / "a.txt", b"4", durable=False)
    assert told == [*(3 * once), "name a.txt"]


def test_a_file_that_is_not_committed_vanishes(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.txt"
    for commit in (False, True):
        with AtomicFile(target) as file:
            file.temporary.write_bytes(b"whole")
            if commit:
                file.commit(complete=True)
        assert target.exists() == commit
        assert (tmp_path / "new").exists() == commit


def test_json_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a part of this path is a file"):
        write_json(tmp_path / "file" / "a.json", 1)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names of handles are Linux's")
def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, told: list[str]) -> None:
    with AtomicFolder(tmp_path / "out") as folder:
        (folder.path / "sub").mkdir()
        (folder.path / "sub" / "a.txt").write_text("whole")
        folder.commit()
    assert sorted(told[:3]) == ["sync .new", "sync .txt", "sync folder"]
    assert told[3:] == ["name out", "sync folder"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_many_files_waits_for_the_disk_once(
    tmp_path: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sync", lambda: told.append("sync all"))
    with AtomicFolder(tmp_path / "out") as folder:
        for number in range(atomic._MANY):
            (folder.path / f"{number}.txt").write_text("")
        folder.commit()
    assert told == ["sync all", "name out", "sync folder"]


def test_a_folder_that_is_not_committed_vanishes_and_the_old_one_stays(tmp_path: Path) -> None:
    def interrupted() -> None:
        with AtomicFolder(tmp_path / "new" / "out") as folder:
            (folder.path / "a.txt").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.txt").write_text("old")
    with AtomicFolder(tmp_path / "out") as folder:
        (folder.path / "b.txt").write_text("half")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_json_escapes_what_utf8_cannot_hold_wherever_it_stands():
    class Record(msgspec.Struct):
        name: str
        parts: dict[str, tuple[str, ...]]

    plain = Record("é", {"a": ("b",)})
    assert json_bytes(plain) == msgspec.json.encode(plain)
    odd = Record("caf\udce9", {"\udcff": ("x", "\ud800")})
    assert json_bytes(odd) == '{"name":"caf\\\\xe9","parts":{"\\\\xff":["x","\ufffd"]}}'.encode()
