"""``knet-deploy build``: a bundle's graph becomes a plan for a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from knet_deploy.cli.choices import PlanEngineOption
from knet_deploy.cli.console import say, track
from knet_runtime.bundle.manifest import Kind
from knet_runtime.errors import ConfigError


def build(
    bundle: Annotated[Path, typer.Argument(help="The bundle, NAME.knet, on the device.")],
    engine: PlanEngineOption,
    graph: Annotated[
        Kind | None, typer.Option(help="classmap by default, where the bundle has it.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="Checked against the bundle's own; to change it, export again."),
    ] = None,
    smallest: Annotated[
        str | None, typer.Option("--min", help="Smallest BATCH or BATCHxHEIGHTxWIDTH.")
    ] = None,
    optimal: Annotated[
        str | None, typer.Option("--opt", help="The one that it is tuned for.")
    ] = None,
    largest: Annotated[
        str | None, typer.Option("--max", help="Largest; by default all that was exported.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="sm86,sm89,...: build TensorRT-RTX for these, without a GPU.")
    ] = None,
    workspace: Annotated[
        int | None, typer.Option(min=1, help="Most MiB of GPU memory for TensorRT's own use.")
    ] = None,
    optimization_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="0 builds fastest, 5 runs fastest.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Build even if the same plan is there.")
    ] = False,
) -> None:
    """Build a TensorRT plan for this machine's GPU, and keep it in the bundle.

    What was built never ran on a GPU by the hands of its authors: let verify decide. A plan
    belongs to one GPU, driver and release of TensorRT; run refuses it elsewhere.
    """
    from knet_export.tensorrt.build import build_plan
    from knet_export.tensorrt.profile import profile_of
    from knet_runtime.bundle.store import open_bundle
    from knet_runtime.engines import default_graph
    from knet_runtime.engines.plan_store import BuildOptions

    opened = open_bundle(bundle)
    own = opened.manifest.precision
    if precision not in (None, own):
        raise ConfigError(
            f"--precision {precision}: {bundle} is a bundle of {own}; the precision is in its "
            f"graph: knet-deploy export --precision {precision} makes one of {precision}"
        )
    kind = graph or default_graph(opened, engine)
    profile = profile_of(opened.manifest.input, smallest, optimal, largest)
    with track("building the plan", None) as advance:
        stored, fresh = build_plan(
            opened,
            engine,
            kind,
            BuildOptions(profile, workspace, optimization_level),
            targets=[part.strip() for part in (target or "").split(",") if part.strip()],
            force=force,
            on_progress=advance,
        )
    record = stored.record
    say("plan", stored.path)
    how = "built" if fresh else "was there already, built"
    say("", f"{record.bytes / 1e6:.1f} MB, {how} in {record.seconds:.1f} s")
    say("by", f"{record.engine} {record.version}")
    say("graph", f"{record.kind}, {record.precision}")
    say("shapes", f"{profile.min} to {profile.max}, tuned for {profile.opt}")
    if record.gpu is not None:
        say("for", f"{record.gpu.name} ({record.gpu.sm}), driver {record.gpu.driver}")
    else:
        say("for", f"{', '.join(record.targets)}; not run on a GPU yet")
    for index, (layer, number) in enumerate((record.layers or {}).items()):
        say("" if index else "layers", f"{number:4} {layer}")
