"""`knet-deploy verify`: the proof that a bundle is the model that was trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knet_deploy.console import needs_extra, track
from knet_deploy.run import check_engine
from knet_runtime.backends import Backend, open_backend
from knet_runtime.bundle import Bundle, open_bundle
from knet_runtime.errors import ConfigError, ParityError
from knet_runtime.golden import replay

if TYPE_CHECKING:
    from knet_export.verify import VerifyReport


def verify(
    bundle: Annotated[Path, typer.Argument(help="The bundle: NAME.knet.")],
    against: Annotated[
        Path | None, typer.Option(help="The PyTorch checkpoint that it was exported from.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Labelled pictures, with --against.")] = None,
    split: Annotated[str, typer.Option(help="Split of --data.")] = "val",
    engine: Annotated[str, typer.Option(help="The engine that is to be trusted.")] = "auto",
    json: Annotated[
        Path | None, typer.Option(help="Write the whole report as JSON, with --against.")
    ] = None,
) -> None:
    """Compare a bundle with its checkpoint on labelled pictures, or, alone, replay its golden
    tensors (which needs no torch). The exit status is 1 outside the tolerance."""
    if (against is None) != (data is None):
        raise ConfigError("--against and --data go together: a checkpoint, and pictures to compare")
    if json is not None and against is None:
        raise ConfigError("--json goes with --against and --data")
    check_engine(engine)
    opened = open_bundle(bundle)
    with open_backend(opened, engine) as backend:
        if against is None or data is None:
            _golden(opened, backend)
        else:
            _compare(opened, backend, against, data, split, json)


def _golden(bundle: Bundle, backend: Backend) -> None:
    report = replay(bundle, backend)
    typer.echo(f"{bundle.model_id} on {backend.name}: {report.images} golden pictures")
    typer.echo(
        f"agreement {100 * report.agreement:.4f} % (at least {100 * report.tolerance.agreement} %)"
    )
    typer.echo(
        f"largest logit difference {report.max_logit_diff:.1e} "
        f"(at most {report.tolerance.max_logit_diff:.0e})"
    )
    if not report.passed:
        raise ParityError(
            f"{bundle.path} on {backend.name} does not give its golden results: "
            "do not trust its masks; try another --engine, or copy the bundle again"
        )
    typer.echo("passed")


def _compare(
    bundle: Bundle, backend: Backend, against: Path, data: Path, split: str, json: Path | None
) -> None:
    with needs_extra("export", "knet-deploy verify --against"):
        from knet_export import verify as parity
        from knet_train.checkpoint import read_checkpoint
        from knet_train.dataset import open_folder
    checkpoint, folder = read_checkpoint(against), open_folder(data, split)
    parity.check_labels(bundle, folder)
    name = f"{folder.root.name}, split {split}"
    with track("comparing", len(folder)) as advance:
        report = parity.verify(
            bundle, backend, checkpoint, parity.pictures(folder), name, on_image=advance
        )
    if json is not None:
        parity.write_report(report, json)
    _show(report)
    if not report.passed:
        raise ParityError("; ".join(report.failures))
    typer.echo("passed")


def _show(report: VerifyReport) -> None:
    typer.echo(f"{report.model_id} on {report.engine}, {report.images} pictures of {report.data}")
    if not report.same_checkpoint:
        typer.echo("note: the bundle was not exported from this very checkpoint file")
    for row in report.classes:
        if row.reference is not None and row.artefact is not None:
            delta = row.artefact - row.reference
            typer.echo(f"  {row.name:<20} {row.reference:7.2f} {row.artefact:7.2f} {delta:+9.4f}")
    if report.delta_miou is not None and report.delta_miou_interval is not None:
        low, high = report.delta_miou_interval
        typer.echo(f"mIoU PyTorch        {report.miou_reference:.3f} %")
        typer.echo(f"mIoU bundle         {report.miou_artefact:.3f} %")
        typer.echo(
            f"ΔmIoU               {report.delta_miou:+.4f} points (95 % {low:+.4f} … {high:+.4f})"
        )
        typer.echo(
            f"worst class ΔIoU    {report.worst_class_delta_iou:+.4f} ({report.worst_class})"
        )
    typer.echo(
        f"pixel agreement     {100 * report.agreement:.4f} % "
        f"({100 * report.agreement_confident:.4f} % where PyTorch is sure)"
    )
    typer.echo(
        f"logit difference    largest {report.max_logit_diff:.1e}, "
        f"mean {report.mean_logit_diff:.1e}"
    )
