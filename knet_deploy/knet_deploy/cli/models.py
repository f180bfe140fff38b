"""``knet-deploy models``: the models that are packaged with knet-deploy."""

from __future__ import annotations

import typer

from knet_deploy.cli.console import say


def models() -> None:
    """List the packaged models, which every option and argument for a bundle takes by name.

    Task, classes, input, size on disk, what it scores and whose licence its weights have. Figures
    per class, training data and known failures are in the MODEL_CARD.md of each.
    """
    from knet_runtime.bundle.store import open_bundle, packaged_models
    from knet_runtime.types import METRICS

    found = packaged_models()
    for name in sorted(found, key=lambda name: (name != "default", name)):
        manifest = open_bundle(found[name]).manifest
        height, width = manifest.input.size
        size = sum(record.bytes for record in manifest.files.values())
        say("model", name)
        say("task", f"{manifest.task}, {manifest.labels.num_classes} classes")
        say("input", f"{width}×{height}, {manifest.precision}, {size / 1e6:.1f} MB")
        for parity in manifest.graphs[0].parity:
            if parity.passed and parity.miou_measured is not None:
                score = f"{METRICS[manifest.task]} {parity.miou_measured:.2f} %"
                say("score", f"{score} on {parity.data}")
        say("licence", f"of the weights: {manifest.licence.weights}")
        say("card", found[name] / "MODEL_CARD.md")
        typer.echo()
    if not found:
        typer.echo("this build of knet-deploy carries no models: name a bundle, NAME.knet")
