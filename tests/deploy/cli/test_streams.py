"""stdout and stderr that are closed, full or left: outputs are written, and the exit code tells."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from knet_deploy.cli.console import exit_code_of, say

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")


def shell(line: str, *words: str | Path) -> subprocess.CompletedProcess[bytes]:
    """``knet-deploy`` with these words, and ``line`` after them."""
    command = f'"$@" {line}'
    program = [sys.executable, "-m", "knet_deploy", *map(str, words)]
    return subprocess.run(
        ["sh", "-c", command, "sh", *program], capture_output=True, check=False, timeout=60
    )


@pytest.mark.parametrize(
    ("line", "code", "error"),
    [
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        ("0<&- >&- 2>&-", 0, ""),
        (">/dev/full", 2, "stdout: No space left on device"),
        ("2>/dev/full", 0, ""),
        (">/dev/full 2>&1", 2, ""),
    ],
)
def test_outputs_are_whole_whatever_becomes_of_the_words(
    video: Path, tmp_path: Path, line: str, code: int, error: str
) -> None:
    outputs = ["--json", tmp_path / "o.jsonl", "-o", tmp_path / "o.mp4", "--masks", tmp_path / "m"]
    done = shell(line, "run", video, *outputs)
    assert (done.returncode, b"internal" in done.stderr) == (code, False), done.stderr
    assert done.stderr.count(b"\n") == bool(error)
    assert error.encode() in done.stderr
    assert (tmp_path / "o.jsonl").read_bytes().count(b"\n") == 4
    assert (tmp_path / "o.mp4").read_bytes()[4:8] == b"ftyp"  # nobody's words went into a file
    assert len(list((tmp_path / "m").iterdir())) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "o.jsonl", "o.mp4"]


@pytest.mark.parametrize(
    ("line", "words", "error"),
    [
        (">&-", ["--json", "-"], "JSON lines on stdout: stdout is closed; name a file"),
        (">&-", ["--rle", "-"], "JSON lines on stdout: stdout is closed; name a file"),
        (">&-", ["--raw", "-"], "raw masks on stdout: stdout is closed; name a file"),
        (">/dev/full", ["--json", "-"], "JSON lines on stdout: No space left on device"),
        (">/dev/full", ["--raw", "-"], "raw masks on stdout: No space left on device"),
    ],
)
def test_results_that_stdout_does_not_take_are_an_error(
    video: Path, line: str, words: list[str], error: str
) -> None:
    done = shell(line, "run", video, *words)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1].decode()
    assert last.startswith(f"knet-deploy: error: {error}")
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["inspect"], ["--version"], ["run", "--help"], ["doctor"]])
@pytest.mark.parametrize(
    ("line", "reason"), [(">/dev/full", "No space left on device"), (">&-", "closed")]
)
def test_an_answer_that_stdout_does_not_take_is_an_error(
    words: list[str], line: str, reason: str
) -> None:
    done = shell(line, *words)
    assert done.returncode == 2
    assert done.stderr.decode().splitlines()[-1] == (
        f"knet-deploy: error: stdout: {reason}; send what is said there elsewhere"
    )
    assert b"Traceback" not in done.stderr


def test_a_summary_that_is_all_there_is_is_an_answer(video: Path) -> None:
    assert shell(">&-", "run", video).returncode == 2


def test_a_pipe_that_nobody_reads_is_told_in_the_end() -> None:
    done = []

    def command() -> None:
        say("frames", 1)
        done.append(True)

    reading, writing = os.pipe()
    os.close(reading)
    with pytest.MonkeyPatch.context() as patch, os.fdopen(writing, "w") as nobody:
        patch.setattr(sys, "stdout", nobody)
        assert exit_code_of(lambda: None) == 0
        assert exit_code_of(command) == 141
    assert done == [True]
