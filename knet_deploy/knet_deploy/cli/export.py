"""`knet-deploy export`: a checkpoint becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from knet_deploy.cli.console import needs_extra, parse_size
from knet_export.int8 import Calibrator
from knet_runtime.bundle.manifest import Precision
from knet_runtime.errors import ConfigError
from knet_runtime.types import Size


def export(
    checkpoint: Annotated[Path, typer.Argument(help="RUN/best.safetensors, written by train.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The bundle: NAME.knet.")],
    precision: Annotated[
        Precision, typer.Option(help="fp16 and bf16 are for GPUs, int8 needs --calibration.")
    ] = "fp32",
    size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH of the input; the checkpoint's own by default.")
    ] = None,
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="Free height and width; not for Swin.")
    ] = False,
    smallest: Annotated[
        str | None, typer.Option("--min", help="Smallest HEIGHTxWIDTH of --dynamic (128x128).")
    ] = None,
    largest: Annotated[
        str | None, typer.Option("--max", help="Largest HEIGHTxWIDTH of --dynamic (1024x2048).")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="The largest batch that the graphs take.")] = 16,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Images for int8: a folder, or a data set (its split train)."),
    ] = None,
    calibrator: Annotated[
        Calibrator, typer.Option(help="How int8 finds ranges; auto measures which is best.")
    ] = "auto",
    keep_fp32: Annotated[
        list[str] | None,
        typer.Option(help="Nodes, blocks or operators that int8 leaves alone, as 'head.*'."),
    ] = None,
    keep_fp16: Annotated[
        list[str] | None, typer.Option(help="Those that compute in fp16 where the rest is int8.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Labelled images to prove it on; without it, synthetic streets."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of --data.")] = "val",
    card: Annotated[
        Path | None, typer.Option(help="Your MODEL_CARD.md, instead of a generated one.")
    ] = None,
    palette: Annotated[
        str,
        typer.Option(
            metavar="model|distinct|cityscapes|FILE",
            help="Colours of the classes, as for run; the checkpoint's by default.",
        ),
    ] = "model",
    weights_licence: Annotated[
        str, typer.Option(help="Licence of the weights, for the manifest.")
    ] = "unstated",
    data_licence: Annotated[
        str, typer.Option(help="Licence of the training data, for the manifest.")
    ] = "unstated",
    triton: Annotated[
        Path | None,
        typer.Option(help="Write a Triton model repository of it into this folder, too."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
) -> None:
    """Export a checkpoint to a bundle, prove that nothing was lost, and write it.

    Golden inputs for the device come from --data too: mind its licence when you share the bundle.
    """
    if (smallest or largest) and not dynamic:
        raise ConfigError("--min and --max are for --dynamic: pass it too, or --size alone")
    with needs_extra("export"):
        from knet_export.export import export_bundle
        from knet_export.spec import MAX_SIZE, MIN_SIZE, size_range
        from knet_export.triton import check_triton, write_triton
    from knet_runtime.bundle.manifest import Licence, name_for

    if triton is not None:
        check_triton(triton, name_for(output), replace=force)
    sizes = None
    if dynamic:
        sizes = size_range(
            _size("--min", smallest) or MIN_SIZE, _size("--max", largest) or MAX_SIZE
        )
    bundle = export_bundle(
        checkpoint,
        output,
        precision=precision,
        size=_size("--size", size),
        sizes=sizes,
        max_batch=max_batch,
        calibration=calibration,
        calibrator=calibrator,
        keep_fp32=keep_fp32 or (),
        keep_fp16=keep_fp16 or (),
        data=data,
        split=split,
        card=card,
        palette=palette,
        licence=Licence("Apache-2.0", weights_licence, data_licence),
        replace=force,
        on_step=typer.echo,
    )
    typer.echo(f"{bundle.path}  {bundle.model_id}")
    if triton is not None:
        typer.echo(f"{write_triton(bundle, triton, replace=force)}  Triton model")
    for parity in bundle.graph("logits").parity:
        if parity.delta_miou is not None:
            typer.echo(f"ΔmIoU {parity.delta_miou:+.4f} points over {parity.images} images")
        typer.echo(
            f"agreement {100 * parity.agreement:.4f} %, largest logit difference "
            f"{parity.max_logit_diff:.1e} of the largest logit ({parity.data})"
        )


def _size(option: str, text: str | None) -> Size | None:
    return None if text is None else parse_size(text, option)
