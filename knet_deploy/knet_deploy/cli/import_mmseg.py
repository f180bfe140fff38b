"""`knet-deploy import-mmseg`: a published mmsegmentation checkpoint becomes one of ours."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from knet_deploy.cli.console import needs_extra, say


def import_mmseg(
    source: Annotated[
        Path, typer.Argument(metavar="FILE", help="mmsegmentation's FILE.pth, or .safetensors.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The checkpoint: .safetensors.")],
    preset: Annotated[
        str | None,
        typer.Option(
            help="The preset that the file must be, such as r50-fcn, or a TOML file; without it, "
            "guessed from the keys (Swin-L: at 512)."
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="labels.json with the class names; without it, 150 are ADE20K's."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing checkpoint.")] = False,
) -> None:
    """Turn a K-Net of mmsegmentation 0.x or 1.x into a checkpoint that every command here takes.

    Every key is accounted for, and nothing in the file is executed.
    """
    with needs_extra("train", "knet-deploy import-mmseg"):
        from knet_train.mmseg import import_mmseg as import_file
    from knet_train.data.layouts import load_labels_json

    found = import_file(
        source,
        output,
        preset=preset,
        labels=None if labels is None else load_labels_json(labels),
        replace_output=force,
    )
    name = found.config.preset
    how = "guessed from the keys" if found.guessed else "and the keys agree"
    if found.guessed and name == "swin-l-upernet-512":
        how += "; one trained at 640 has the same: pass --preset swin-l-upernet-640"
    say("preset", f"{name}, {how}")
    classes = found.labels.num_classes
    say("classes", f"{classes} {'of ADE20K' if labels is None else f'from {labels}'}")
    say("mapped", f"{len(found.mapped)} of {len(found.mapped) + len(found.dropped)} keys")
    for (leaf, reason), count in Counter(
        (key.rpartition(".")[2], reason) for key, reason in found.dropped.items()
    ).items():
        say("dropped", f"{count} × *.{leaf}: {reason} (--verbose names each)")
    if found.absent:
        say("absent", f"{len(found.absent)} × *.num_batches_tracked: begin at 0")
    if not found.auxiliary:
        say("auxiliary", "no auxiliary_head in the file: training continues without its loss")
    say("wrote", output)
