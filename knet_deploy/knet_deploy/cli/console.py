"""What every command shares: errors as one line and an exit code, log lines, progress.

Exit codes: 0 done; 1 it failed; 2 something the caller can fix (an input, an option, a missing
package); 129, 130, 143 ended by SIGHUP, Ctrl-C, SIGTERM; 141 nobody reads stdout any more.
Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from io import TextIOWrapper
from pathlib import Path
from typing import Literal

import typer

from knet_deploy.cli.ending import Terminated, ended_by_signals
from knet_deploy.cli.streams import unfailing_streams
from knet_runtime.atomic import AtomicFile
from knet_runtime.errors import (
    BundleError,
    CheckpointError,
    ConfigError,
    DataError,
    EngineUnavailable,
    KnetError,
    OutputError,
    SourceError,
)

Extra = Literal["train", "export", "serve", "ray", "wandb", "mlflow"]


class MissingExtra(KnetError):
    """A command needs packages that the base install does not have."""


_INPUTS = (BundleError, CheckpointError, ConfigError, DataError, SourceError)
_FIXABLE = (*_INPUTS, EngineUnavailable, MissingExtra, OutputError)


@contextmanager
def needs_extra(extra: Extra, command: str | None = None) -> Iterator[None]:
    """Imports of ``extra``'s packages stand inside; a missing one raises MissingExtra.

    ``command`` is what the user asked for; "knet-deploy EXTRA" by default.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "knet_").partition(".")[0]
        if package.startswith("knet_"):  # ours: a broken build, which no extra fixes
            raise
        name = "training" if extra == "train" else extra
        raise MissingExtra(
            f"{command or f'knet-deploy {extra}'} needs the {name} extra: "
            f'pip install "knet-deploy[{extra}]"'
        ) from error


def exit_code_of(command: Callable[[], object], *, debug: bool = False) -> int:
    """Run ``command``; whatever it raises becomes a line on stderr, and the exit code. What it
    could not say on stdout is a failure once it has done all else."""
    with unfailing_streams() as stdout:
        code = _code_of(command, debug)
        stdout.flush()
        if code or stdout.problem is None or (stdout.is_closed and stdout.may_be_closed):
            return code
        if isinstance(stdout.problem, BrokenPipeError):
            return 141
        reason = "closed" if stdout.is_closed else stdout.problem.strerror
        return _report(OutputError(f"stdout: {reason}; send what is said there elsewhere"))


def _code_of(command: Callable[[], object], debug: bool) -> int:
    try:
        with ended_by_signals():
            command()
    except typer.Exit as end:
        return int(end.exit_code)
    except Terminated as end:
        return end.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _report(error)
    return 0


def _report(error: Exception) -> int:
    # Typer's own usage errors have one base class, which sits in another module in each version.
    usage = getattr(error, "format_message", None)
    if usage is not None:
        say_error(str(usage()))
        return 2
    if isinstance(error, KnetError):
        say_error(str(error))
        for line in error.example.splitlines():
            typer.echo(f"    {line}", err=True)
        return 2 if isinstance(error, _FIXABLE) else 1
    say_error(f"internal error: {type(error).__name__}: {error}; run again with --debug")
    return 1


def say_error(text: str) -> None:
    """The one line on stderr that an error gets."""
    typer.echo(f"knet-deploy: error: {one_line(text)}", err=True)


def one_line(text: str) -> str:
    """``text`` on one line; what could steer a terminal (a file's name may hold it) shows as ?."""
    joined = re.sub(r"\s*[\r\n]\s*", " ", text.strip())
    return "".join(char if char.isprintable() else "?" for char in joined)


def say(label: str, value: object) -> None:
    """One line of a summary on stdout: a label, and its value in the second column."""
    typer.echo(f"{label:<12} {one_line(str(value))}")


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 9 -> 0:09, 4000 -> 1:06:40."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def say_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on stdout between empty lines: the first column is text, the others are numbers."""
    columns = list(zip(head, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    typer.echo()
    for first, *cells in zip(*columns, strict=True):
        numbers = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        typer.echo("  ".join([first.ljust(widths[0]), *numbers]))
    typer.echo()


def result_file(path: Path | None, suffix: str = "") -> AtomicFile | None:
    """Where a result goes that may take hours, tried beforehand; None for None. Raises ConfigError
    for a name that does not end in ``suffix``, OutputError where it cannot be written."""
    if path is None:
        return None
    if path.suffix.lower() != suffix and suffix:
        raise ConfigError(f"{path}: let its name end in {suffix}")
    return AtomicFile(path.absolute())


def parse_size(text: str, option: str = "--size") -> tuple[int, int]:
    """ "HEIGHTxWIDTH" of an option as two numbers; ConfigError when it is something else."""
    found = re.fullmatch(r"(\d{1,5})[x×](\d{1,5})", text.strip())
    if found is None:
        raise ConfigError(f"{option} is {text!r}: write HEIGHTxWIDTH, such as 512x1024")
    return int(found[1]), int(found[2])


def forgive_encodings() -> None:
    """A terminal that cannot show a character shows ? for it: no reason to stop."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def package_version() -> str:
    """The version of knet-deploy that is installed; of a source tree "unknown"."""
    return installed_version("knet-deploy") or "unknown"


def installed_version(distribution: str) -> str | None:
    """From the metadata: importing torch only to ask for its number takes seconds."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@contextmanager
def logging_to_stderr() -> Iterator[None]:
    """Warnings as lines on stderr, for as long as this lasts; see ``log_verbosely``."""
    handler = _Lines()
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        _set_level(logging.NOTSET)


def log_verbosely() -> None:
    """From now on our packages' progress is logged too, not only warnings."""
    _set_level(logging.INFO)


def _set_level(level: int) -> None:
    for package in ("knet_deploy", "knet_export", "knet_train", "knet_runtime"):
        logging.getLogger(package).setLevel(level)


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        # sys.stderr is looked up each time: a progress bar puts itself in its place.
        try:
            text = one_line(record.getMessage())
            sys.stderr.write(f"knet-deploy: {record.levelname.lower()}: {text}\n")
        except Exception:
            self.handleError(record)


@contextmanager
def track(what: str, total: int | None) -> Iterator[Callable[..., None]]:
    """A bar on stderr, on a terminal only; gives the function to call after each step, which may be
    told in words what comes next.

    ``total`` is a hint, as files state their length wrongly.
    """
    if not sys.stderr.isatty():
        yield lambda _="": None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(one_line(what), total=total)

        def advance(now: str = what) -> None:
            bar.update(task, advance=1, description=one_line(now))

        yield advance
