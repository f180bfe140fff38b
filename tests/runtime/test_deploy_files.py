"""The unit and the container files say only what the command line and systemd know."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from knet_deploy.cli.main import app

DEPLOY = Path(__file__).resolve().parents[2] / "runtime" / "deploy"
UNIT = DEPLOY / "knet-deploy@.service"
CONTAINERS = ("Containerfile", "Containerfile.jetson")
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def check_words(words: list[str], where: str) -> None:
    """The first is a command of ours, and every option one of its own."""
    assert words[0] in COMMANDS, f"{where}: no command {words[0]}"
    known = {name for param in COMMANDS[words[0]].params for name in param.opts}
    known |= {name for param in COMMANDS[words[0]].params for name in param.secondary_opts}
    for word in words[1:]:
        if word.startswith("-"):
            assert word.partition("=")[0] in {*known, "--help"}, f"{where}: no option {word}"


def settings(section: str) -> dict[str, list[str]]:
    unit = configparser.RawConfigParser(strict=False, dict_type=Several)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNIT)
    return {key: value.split("\n") for key, value in unit.items(section)}


class Several(dict):  # type: ignore[type-arg]
    """A key that comes again adds a line, as in systemd's files."""

    def __setitem__(self, key: str, value: object) -> None:
        if isinstance(value, list) and key in self:
            self[key].extend(value)
        else:
            super().__setitem__(key, value)


def test_the_units_command_is_one_of_ours_with_its_options() -> None:
    (start,) = settings("Service")["ExecStart"]
    program, *words = shlex.split(start)
    assert Path(program).name == "knet-deploy"
    check_words(words, "ExecStart")
    example = dict(
        line.split("=", 1)
        for line in (DEPLOY / "camera.env.example").read_text().splitlines()
        if line and not line.startswith("#")
    )
    used = set(re.findall(r"\$\{?(KNET_\w+)", start))
    assert used == set(example)
    check_words(["run", *shlex.split(example["KNET_OPTIONS"])], "camera.env.example")


def test_the_unit_is_locked_in_and_restarts_what_fails() -> None:
    service = settings("Service")
    assert service["User"] == ["knet"]
    assert service["ProtectSystem"] == ["strict"]
    assert service["NoNewPrivileges"] == ["yes"]
    assert service["CapabilityBoundingSet"] == [""]
    assert service["Restart"] == ["on-failure"]
    assert "RestartPreventExitStatus" not in service  # 2 is also a camera that is off at boot
    assert "WatchdogSec" not in service  # the program notifies nobody


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "knet-deploy@.service"
    # It asks whether the program is there; on this machine that is another one.
    unit.write_text(UNIT.read_text().replace("/opt/knet-deploy/bin/knet-deploy", sys.executable))
    done = subprocess.run([verify, "verify", str(unit)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(unit.name) not in done.stderr, done.stderr  # a key that it does not know is a line


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_file_runs_as_nobody_and_calls_what_exists(name: str) -> None:
    text = re.sub(r"\\\n\s*", "", (DEPLOY / name).read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    steps = [(step, value) for step, _, value in (line.partition(" ") for line in lines)]
    known = {"FROM", "ARG", "COPY", "RUN", "ENV", "USER", "WORKDIR", "CMD"}
    known |= {"HEALTHCHECK", "STOPSIGNAL", "ENTRYPOINT"}
    assert {step for step, _ in steps} <= known
    last = dict(steps)  # the last of each is what counts
    assert last["USER"] == "10001"
    assert f"--uid {last['USER']} " in text
    assert json.loads(last["ENTRYPOINT"]) == ["knet-deploy"]
    check_words(json.loads(last["CMD"]), name)
    program, *words = json.loads(last["HEALTHCHECK"].partition("CMD ")[2])
    assert program == "knet-deploy"
    check_words(words, name)
    sources = [value.split()[0] for step, value in steps if step == "COPY"]
    assert all(source.startswith("--from=build") or source == "." for source in sources)


def test_every_command_of_the_compose_file_exists() -> None:
    found = re.findall(r"command: (\[.*\])", (DEPLOY / "compose.yaml").read_text())
    assert len(found) == 2
    for called in found:
        check_words(json.loads(called), "compose.yaml")
