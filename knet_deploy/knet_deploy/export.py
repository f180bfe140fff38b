"""`knet-deploy export`: a checkpoint becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from knet_deploy.console import needs_extra


def export(
    checkpoint: Annotated[Path, typer.Argument(help="RUN/best.safetensors, written by train.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The bundle: NAME.knet.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Labelled pictures to prove it on; without it, synthetic streets."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of --data.")] = "val",
    card: Annotated[
        Path | None, typer.Option(help="Your MODEL_CARD.md, instead of a generated one.")
    ] = None,
    weights_licence: Annotated[
        str, typer.Option(help="Licence of the weights, for the manifest.")
    ] = "unstated",
    data_licence: Annotated[
        str, typer.Option(help="Licence of the training data, for the manifest.")
    ] = "unstated",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
) -> None:
    """Export a checkpoint to a bundle, prove that nothing was lost, and write it.

    Golden inputs for the device come from --data too: mind its licence when you share the bundle.
    """
    with needs_extra("export"):
        from knet_export.export import export_bundle
    from knet_runtime.manifest import Licence

    bundle = export_bundle(
        checkpoint,
        output,
        data=data,
        split=split,
        card=card,
        licence=Licence("Apache-2.0", weights_licence, data_licence),
        replace=force,
        on_step=typer.echo,
    )
    parity = bundle.artefact.parity
    assert parity is not None  # export_bundle records it
    typer.echo(f"{bundle.path}  {bundle.model_id}")
    if parity.delta_miou is not None:
        typer.echo(f"ΔmIoU {parity.delta_miou:+.4f} points over {parity.images} pictures")
    typer.echo(
        f"agreement {100 * parity.agreement:.4f} %, largest logit difference "
        f"{parity.max_logit_diff:.1e} ({parity.data})"
    )
