"""The command line: which commands there are, and the entry point.

Each command is one module, which imports the packages it needs when it is called: ``--help``
answers at once, and the base install needs none of the packages that training needs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from knet_deploy.cli.batch import batch
from knet_deploy.cli.bench import bench
from knet_deploy.cli.build import build
from knet_deploy.cli.console import (
    exit_code_of,
    forgive_encodings,
    log_verbosely,
    logging_to_stderr,
    package_version,
)
from knet_deploy.cli.data import data
from knet_deploy.cli.demo import demo
from knet_deploy.cli.doctor import doctor
from knet_deploy.cli.ending import exit_past_hanging_threads
from knet_deploy.cli.evaluate import evaluate
from knet_deploy.cli.export import export
from knet_deploy.cli.import_knet import import_knet
from knet_deploy.cli.import_mmseg import import_mmseg
from knet_deploy.cli.inspect import inspect
from knet_deploy.cli.models import models
from knet_deploy.cli.run import run
from knet_deploy.cli.soft_labels import soft_labels
from knet_deploy.cli.train import train
from knet_deploy.cli.verify import verify


class _Command(TyperCommand):
    """Its plain help, too, shows options by their panels."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                title = f"{parameter.param_type_name}s".capitalize()
                title = getattr(parameter, "rich_help_panel", None) or title
                panels.setdefault(title, []).append(record)
        for title, records in panels.items():
            with formatter.section(title):
                formatter.write_dl(records)


# Plain help: no markup is read out of texts and file names, and no colour goes into a pipe.
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
commands = (
    *(demo, models, run, batch, inspect, doctor, bench),
    *(train, soft_labels, import_mmseg, import_knet, export, build, verify),
)
for command in commands:
    more = {"allow_extra_args": command is run}  # it says what to do with several files
    app.command(command.__name__.replace("_", "-"), cls=_Command, context_settings=more)(command)
app.command("eval")(evaluate)  # a function of that name would hide Python's
app.add_typer(data, name="data")

_ANYWHERE = ("--debug", "--verbose")


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"knet-deploy {package_version()}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Log what is done, not only warnings.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_say_version, is_eager=True
        ),
    ] = False,
) -> None:
    """K-Net image segmentation from a PyTorch checkpoint to an edge box, with measured parity."""
    if verbose:
        log_verbosely()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (``sys.argv`` by default) and return its exit code."""
    given = _flags_first(sys.argv[1:] if arguments is None else arguments)
    forgive_encodings()
    with logging_to_stderr():
        code = exit_code_of(lambda: _invoke(given), debug="--debug" in given)
    if arguments is None:
        exit_past_hanging_threads(code)
    return code


def _invoke(arguments: list[str]) -> None:
    # Not app(): that prints errors in its own way, and turns Ctrl-C into something else.
    group = typer.main.get_command(app)
    with group.make_context("knet-deploy", arguments) as context:
        group.invoke(context)


def _flags_first(arguments: Sequence[str]) -> list[str]:
    """``run x --debug`` means ``--debug run x``: nobody remembers where such a flag belongs."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    head = sorted(arguments[:end], key=lambda argument: argument not in _ANYWHERE)
    return [*head, *arguments[end:]]
