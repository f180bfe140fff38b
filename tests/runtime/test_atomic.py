"""What is written appears whole: bytes on the disk, then the name, then the name on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from knet_runtime import atomic
from knet_runtime.atomic import (
    AtomicFile,
    AtomicFolder,
    json_bytes,
    partial_path,
    write_atomic,
    write_json,
)
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


def test_a_file_that_is_not_committed_vanishes(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.txt"
    for commit in (False, True):
        with AtomicFile(target) as file:
            file.temporary.write_bytes(b"whole")
            if commit:
                file.commit(complete=True)
        assert target.exists() == commit
        assert (tmp_path / "new").exists() == commit


@pytest.mark.skipif(os.name != "posix", reason="an open file cannot be removed there")
@pytest.mark.parametrize("complete", [True, False])
def test_a_target_that_is_taken_or_gone_at_the_end_loses_no_byte(
    tmp_path: Path, complete: bool
) -> None:
    def becomes_a_folder(target: Path) -> None:
        (target if complete else partial_path(target)).mkdir()

    def loses_its_folder(target: Path) -> None:
        shutil.rmtree(target.parent)

    def has_a_file_for_a_folder(target: Path) -> None:
        shutil.rmtree(target.parent)
        target.parent.write_text("somebody's")

    def is_moved_with_its_folder(target: Path) -> None:
        target.parent.rename(tmp_path / "moved")

    happenings = (
        becomes_a_folder,
        loses_its_folder,
        has_a_file_for_a_folder,
        is_moved_with_its_folder,
    )
    for number, happens in enumerate(happenings):
        file = AtomicFile(tmp_path / str(number) / "a.txt")
        file.start()
        file.temporary.write_bytes(b"an hour of work")
        happens(file.target)
        if happens is becomes_a_folder and not complete:  # there is another partial name
            assert file.commit(complete=complete).read_bytes() == b"an hour of work"
            continue
        with pytest.raises(OutputError, match="what was written is kept in ") as caught:
            file.commit(complete=complete)
        file.discard()  # as the end of a with block does
        stated = Path(str(caught.value).partition("is kept in ")[2].partition(";")[0])
        assert stated.read_bytes() == b"an hour of work"
        assert stated.name.startswith("a.partial")


def test_a_small_file_whose_name_is_taken_is_kept_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(OSError, match=r"kept in .*a\.partial\.txt"):
        write_atomic(tmp_path / "a.txt", b"whole")
    assert (tmp_path / "a.partial.txt").read_bytes() == b"whole"
    (tmp_path / "out").write_text("")

    def no_rename(self: Path, target: Path) -> Path:
        if self.name == "out":  # such as a mount point
            raise PermissionError(13, "Permission denied")
        return Path(os.rename(self, target) or target)  # noqa: PTH104

    def commit() -> None:
        with pytest.MonkeyPatch.context() as patch, AtomicFolder(tmp_path / "out") as folder:
            (folder.path / "b.txt").write_text("whole")
            patch.setattr(Path, "rename", no_rename)
            folder.commit()

    with pytest.raises(PermissionError, match=r"kept in .*out\.partial"):
        commit()
    assert (tmp_path / "out.partial" / "b.txt").read_text() == "whole"
    assert (tmp_path / "out").read_text() == ""


def test_a_partial_file_replaces_no_other(tmp_path: Path) -> None:
    for expected in ("a.partial.txt", "a.partial.2.txt", "a.partial.3.txt"):
        file = AtomicFile(tmp_path / "a.txt")
        file.start()
        assert file.commit(complete=False) == tmp_path / expected


def test_two_writers_of_one_target_have_files_of_their_own(tmp_path: Path) -> None:
    one, two = AtomicFile(tmp_path / "a.txt"), AtomicFile(tmp_path / "a.txt")
    for file, data in ((one, b"one"), (two, b"two")):
        file.start()
        file.temporary.write_bytes(data)
    one.commit(complete=True)
    assert (tmp_path / "a.txt").read_bytes() == b"one"
    two.commit(complete=True)
    assert (tmp_path / "a.txt").read_bytes() == b"two"


def test_new_folders_are_on_the_disk_with_what_is_in_them(tmp_path: Path, told: list[str]) -> None:
    AtomicFile(tmp_path / "b" / "c" / "a.txt").write(b"1")
    # The name of a.txt in c, that of c in b, and that of b.
    assert told == ["sync .part", "name a.txt", *(3 * ["sync folder"])]


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


@pytest.mark.skipif(os.name != "posix", reason="a folder cannot be locked there")
def test_what_a_killed_exchange_left_is_undone_and_a_living_one_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "x.knet"
    for name in (".x.knet.0123abcd.old", ".x.knet.0123abcd.new", ".x.knet.77777777.new", ".y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
    with AtomicFolder(target) as living:
        (living.path / "a.txt").write_text("new")
        assert (target / "a.txt").read_text() == ".x.knet.0123abcd.old"  # as it was
        with AtomicFolder(target):
            pass
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            living.path.name,
            ".y",
            target.name,
        ]
        living.commit()
    assert (target / "a.txt").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".y", "x.knet"]
