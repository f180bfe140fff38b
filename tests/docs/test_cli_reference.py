"""The docs name every command and option that there is, and none that there is not."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from docs_pages import BENCHMARKS, DOCS, HOOKS, PAGES, relative, without_blocks

from knet_deploy.cli.main import app

COMMANDS: dict[str, Any] = HOOKS.commands()
GROUP: Any = typer.main.get_command(app)
ANYWHERE = {name for param in GROUP.params for name in param.opts}
# Options of other programs that sentences name: pip, pytest, docker and venv have them.
FOREIGN = {"--no-deps", "--soak", "--seed", "--runtime", "--build-arg", "--system-site-packages"}


def options_of(command: Any) -> set[str]:
    return {
        name
        for param in command.params
        if param.param_type_name == "option"
        for name in (*param.opts, *param.secondary_opts)
    }


def test_the_reference_has_a_section_for_each_command() -> None:
    page = without_blocks(DOCS / "reference" / "cli.md")
    assert re.findall(r"^## knet-deploy (.+)$", page, re.M) == list(COMMANDS)
    assert len(COMMANDS) > 10
    for option in ANYWHERE:
        assert f"`{option}`" in page


@pytest.mark.parametrize("name", COMMANDS)
def test_a_section_names_every_option_of_its_command_and_no_other(name: str) -> None:
    cells = re.findall(r"^\| <code>(.*?)</code>", HOOKS.section(name, COMMANDS[name]), re.M)
    named = {word for cell in cells for word in re.findall(r"(?<!\S)--?[a-z][\w-]*", cell)}
    assert named == options_of(COMMANDS[name])
    assert len(cells) == len(COMMANDS[name].params)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_guide_shows_every_command_at_work(name: str) -> None:
    guides = [*(DOCS / "guide").glob("*.md"), DOCS / "getting-started.md"]
    shown = [words for page in guides for words in calls(page)]
    assert any(words[: len(name.split())] == name.split() for words in shown)


def calls(page: Path) -> Iterator[list[str]]:
    """The words after each knet-deploy in a page's blocks of code."""
    text = re.sub(r"\\\n\s*", "", page.read_text("utf-8"))
    fenced = False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield from calls_in(line.strip())


def calls_in(line: str) -> Iterator[list[str]]:
    """The words after each knet-deploy of a shell line that calls a command."""
    for part in re.split(r"\s(?:\|\|?|&&|;|2?>|<)\s", re.split(r"\s#\s", line)[0]):
        for found in re.finditer(r"(?:^|[\s/])(?:knet-deploy|-m knet_deploy)\s+(\S.*)", part):
            words = shlex.split(found[1])
            if part.startswith("knet-deploy") or words[0] in GROUP.commands:
                yield words


def parse(words: list[str]) -> None:
    """As the program would, short of running it."""
    words = [word for word in words if word not in ANYWHERE]
    name = " ".join(words[:2]) if words[0] == "data" else words[0]
    assert name in COMMANDS, f"there is no command {name}"
    try:
        COMMANDS[name].make_context(name, words[len(name.split()) :])
    except Exception as error:
        text = getattr(error, "message", error)
        raise AssertionError(f"knet-deploy {shlex.join(words)}: {text}") from error


@pytest.mark.parametrize("page", [*PAGES, BENCHMARKS], ids=relative)
def test_every_command_line_on_a_page_parses(page: Path) -> None:
    for words in calls(page):
        parse(words)


def test_command_lines_are_found_and_wrong_ones_refused() -> None:
    assert sum(1 for page in PAGES for _ in calls(page)) > 60
    line = "~/knet/bin/knet-deploy run 0 --json - | your-program --fast   # not knet-deploy fly"
    assert list(calls_in(line)) == [["run", "0", "--json", "-"]]
    assert not list(calls_in("podman build -t knet-deploy ."))
    for wrong in ("fly", "run x.mp4 --colour red", "demo --frames many", "export -o x.knet"):
        with pytest.raises(AssertionError):
            parse(wrong.split())


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_command_and_option_in_a_sentence_exists(page: Path) -> None:
    everywhere = {name for command in COMMANDS.values() for name in options_of(command)}
    for code in re.findall(r"`([^`]+)`", without_blocks(page)):
        words, known = code.split(), everywhere | ANYWHERE | FOREIGN | {"--help"}
        if words[0] == "mkdocs":
            continue
        if words[0] == "knet-deploy" and words[1:] and re.match(r"[a-z]", words[1]):
            name = " ".join(words[1:3]) if words[1] == "data" else words[1]
            assert name in COMMANDS, f"there is no command {name}: {code}"
            known = options_of(COMMANDS[name]) | ANYWHERE
        for word in words:
            if re.match(r"--[a-z]", word):
                assert word.partition("=")[0] in known, f"there is no option {word}: {code}"
