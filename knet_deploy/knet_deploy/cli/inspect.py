"""``knet-deploy inspect``: what a bundle says about itself, after every file was checked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knet_deploy.cli.choices import BUNDLE
from knet_deploy.cli.console import say

if TYPE_CHECKING:
    from knet_runtime.bundle.store import Bundle


def inspect(
    bundle: Annotated[
        Path | None,
        typer.Argument(metavar="[BUNDLE]", help=f"{BUNDLE}; the one called default if left out."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Check every file of a bundle and show what it holds.

    Model, input and outputs, classes and colours, files and hashes, parity with PyTorch by engine,
    origin and licences, and the plans that were built in it.
    """
    from knet_runtime.bundle.describe import rows
    from knet_runtime.bundle.manifest import encode_manifest
    from knet_runtime.bundle.store import open_bundle

    opened = open_bundle(bundle)
    if json:
        typer.echo(encode_manifest(opened.manifest).decode(), nl=False)
        return
    for label, value in (*rows(opened), *_plan_rows(opened)):
        say(label, value)


def _plan_rows(bundle: Bundle) -> Iterator[tuple[str, str]]:
    """The plans that were built in the bundle; the manifest does not list them."""
    from knet_runtime.engines.plan_store import read_record, stored_plans
    from knet_runtime.errors import EngineError

    for path in stored_plans(bundle):
        try:
            record = read_record(path)
        except EngineError as error:
            yield "plan", f"{path.name}: {error}"
            continue
        made_for = record.gpu.name if record.gpu else ", ".join(record.targets)
        profile = record.options.profile
        yield (
            "plan",
            f"{path.name}: {record.engine} {record.version}, {record.kind}, {record.precision}, "
            f"for {made_for}, {profile.min} to {profile.max}, {record.bytes:,} bytes",
        )
