"""`knet-deploy import-knet`: a published K-Net for instances or panoptic segmentation becomes one
of our checkpoints."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from knet_deploy.cli.console import needs_extra, say


def import_knet(
    source: Annotated[
        Path, typer.Argument(metavar="FILE", help="The authors' FILE.pth, or .safetensors.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The checkpoint: .safetensors.")],
    preset: Annotated[
        str | None,
        typer.Option(
            help="The preset that the file must be, such as knet-r50-fpn-panoptic, or a TOML file; "
            "without it, read from the keys."
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="labels.json with the class names and which are things; without it, 80 classes "
            "are COCO's instances, 133 its panoptic ones."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing checkpoint.")] = False,
) -> None:
    """Turn a K-Net of the authors' own code (instance, panoptic) into a checkpoint of ours.

    Every key is accounted for, and nothing in the file is executed.
    """
    with needs_extra("train", "knet-deploy import-knet"):
        from knet_train.published import import_published
    from knet_train.data.layouts import load_labels_json

    found = import_published(
        source,
        output,
        preset=preset,
        labels=None if labels is None else load_labels_json(labels),
        replace_output=force,
    )
    config, classes = found.config, found.labels
    say("preset", config.preset)
    say("task", f"{config.model.task}, {config.model.kernels} objects at once")
    of = "COCO" if labels is None else labels
    say("classes", f"{classes.num_classes} of {of}, {len(classes.things)} of them things")
    say("mapped", f"{len(found.mapped)} of {len(found.mapped) + len(found.dropped)} keys")
    for (leaf, reason), count in Counter(
        (key.rpartition(".")[2], reason) for key, reason in found.dropped.items()
    ).items():
        say("dropped", f"{count} × *.{leaf}: {reason}")
    say("wrote", output)
