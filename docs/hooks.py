"""What the docs say about the code, taken from the code each time the site is built.

A page asks for it by a comment on a line of its own, such as ``<!-- commands -->``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from knet_deploy.cli.main import app

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = {  # where each lies
    "knet_runtime": "runtime",
    "knet_synthetic": "train",
    "knet_train": "train",
    "knet_export": "export",
    "knet_deploy": "knet_deploy",
}


def on_page_markdown(markdown: str, **_: object) -> str:
    """mkdocs calls this for every page."""
    for comment, make in (
        ("<!-- commands -->", commands_page),
        ("<!-- settings -->", settings_page),
        ("<!-- manifest -->", manifest_page),
        ("<!-- files -->", files_page),
    ):
        if comment in markdown:
            markdown = markdown.replace(comment, make())
    return markdown


def commands() -> dict[str, Any]:
    """Every command by the words that call it: "run", "data check"."""
    group: Any = typer.main.get_command(app)
    return dict(_leaves("", group))


def _leaves(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        yield name, command
        return
    for word, inner in command.commands.items():
        yield from _leaves(f"{name} {word}".strip(), inner)


def commands_page() -> str:
    """A section per command: what it does, its arguments and its options, by their groups."""
    return "\n\n".join(section(name, command) for name, command in commands().items())


def section(name: str, command: Any) -> str:
    """One command."""
    context = typer.Context(command, info_name=f"knet-deploy {name}")
    lines = [f"## knet-deploy {name}", "", _paragraphs(command.help or ""), ""]
    usage = " ".join(command.collect_usage_pieces(context))
    lines += ["```text", f"knet-deploy {name} {usage}", "```"]
    groups: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is not None:
            title = "Options" if parameter.param_type_name == "option" else "Arguments"
            title = getattr(parameter, "rich_help_panel", None) or title
            groups.setdefault(title, []).append(record)
    for title, records in groups.items():
        lines += ["", f"| {title} | |", "|---|---|"]
        lines += [f"| {_code(names)} | {_text(what)} |" for names, what in records]
    return "\n".join(lines)


def _paragraphs(text: str) -> str:
    return "\n\n".join(_text(part) for part in text.split("\n\n"))


def _code(text: str) -> str:
    """Text as code, also in a table's cell, where backticks and | do not go together."""
    return f"<code>{re.sub(r'[^A-Za-z0-9 ./,-]', _entity, text)}</code>"


def _text(text: str) -> str:
    """Plain text as one line, with its ``code`` and its options as code, and nothing as markup."""
    known = r"``(.+?)``|(?<![\w/-])(--?[a-z][a-z0-9-]*\w)|[^\w\s.,:;()'/-]|_"
    return re.sub(
        known,
        lambda found: _code(code) if (code := found[1] or found[2]) else _entity(found),
        " ".join(text.split()),
    )


def _entity(found: re.Match[str]) -> str:
    return f"&#{ord(found[0])};"


def settings_page() -> str:
    """Every key of a preset, with its value in knet-edge and what it means."""
    import msgspec

    from knet_train.config import accepted, load_config

    source = (REPOSITORY / "train/knet_train/config.py").read_text("utf-8")
    values = msgspec.to_builtins(load_config("knet-edge"))
    tables = []
    sections = re.findall(r"^class (\w+)Config\(_Section.*?\n(.*?)\n\n\n", source, re.S | re.M)
    for name, body in sections:
        section = name.lower()
        lines = [f"## {section}", "", re.findall(r'"""(.+?)"""', body)[0], ""]
        lines += ["| key | in knet-edge | what it is | what it takes |", "|---|---|---|---|"]
        for key, note in re.findall(r"^    (\w+): [^#\n]+?(?:  # (.+))?$", body, re.M):
            value = msgspec.json.encode(values[section][key]).decode()
            cells = _code(f"{section}.{key}"), _code(value), _text(note), accepted(section, key)
            lines.append(f"| {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def manifest_page() -> str:
    """The objects of a manifest with their fields, the whole first."""
    source = (REPOSITORY / "runtime/knet_runtime/bundle/manifest.py").read_text("utf-8")
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    public = [node for node in classes if not node.name.startswith("_")]
    sections = []
    for node in sorted(public, key=lambda node: node.name != "Manifest"):
        text = ast.get_docstring(node) or ""
        lines = [f"### {node.name}", "", text.replace("``", "`"), ""]
        lines += ["| key | type | default |", "|---|---|---|"]
        for field in node.body:
            if isinstance(field, ast.AnnAssign):
                default = "" if field.value is None else _code(ast.unparse(field.value))
                kind = _code(ast.unparse(field.annotation))
                lines.append(f"| {_code(ast.unparse(field.target))} | {kind} | {default} |")
        sections.append("\n".join(lines))
    return "\n\n".join(sections)


def files_page() -> str:
    """Every module of every package, with the first sentence of its docstring."""
    tables = []
    for package, folder in PACKAGES.items():
        root = REPOSITORY / folder / package
        lines = [f"## {package}", "", "| file | what it is |", "|---|---|"]
        for path in sorted(root.rglob("*.py"), key=lambda path: (path.parent, path.name)):
            text = ast.get_docstring(ast.parse(path.read_text("utf-8")))
            if text is not None:
                first = _text(text.split("\n\n")[0])
                lines.append(f"| {_code(str(path.relative_to(root)))} | {first} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)
