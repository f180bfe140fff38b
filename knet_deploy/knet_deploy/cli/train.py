"""`knet-deploy train`: a folder of labelled images becomes a checkpoint."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from knet_deploy.cli.console import needs_extra, one_line


def train(
    data: Annotated[Path, typer.Option(help="Folder of labelled images, or of objects.")],
    out: Annotated[Path, typer.Option(help="Folder of the run: checkpoints and logs.")],
    preset: Annotated[str, typer.Option(help="Name of a preset, or a TOML file.")] = "knet-edge",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Override, such as optim.lr=1e-4.")
    ] = None,
    backbone_weights: Annotated[
        Path | None,
        typer.Option(help="ImageNet weights (safetensors); without it, from timm's hub."),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(help="Checkpoint of the same architecture to start from; classes may differ."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in --out, or begin it.")
    ] = False,
) -> None:
    """Train a K-Net. Leaves best.safetensors (highest mIoU, PQ or AP on the validation
    split), last.safetensors, and CSV and TensorBoard logs in the folder --out."""
    with needs_extra("train"):
        from pytorch_lightning.utilities import rank_zero_only

        from knet_deploy.cli.training import Lines
        from knet_train.config import load_config
        from knet_train.fit import train as fit
        from knet_train.run_folder import STATE, Stopped, causes

    config, lines = load_config(preset, settings or []), Lines()
    try:
        result = fit(
            config,
            data,
            out,
            backbone_weights=backbone_weights,
            init=init,
            resume=resume,
            callbacks=[lines],
        )
    except KeyboardInterrupt as stop:
        if getattr(rank_zero_only, "rank", 0) == 0:  # of many processes the first one speaks
            # SIGTERM arrives again, as an interrupt of its own, while the first is on its way.
            step = next((cause.step for cause in causes(stop) if isinstance(cause, Stopped)), None)
            what = "stopped without saving"
            if step is not None:
                what = f"stopped at {lines.standing(step, config.optim.steps)}"
            if (out / STATE).exists():
                what += f"; resume with: {_resuming(data, out, preset, settings or [])}"
            typer.echo(f"knet-deploy: {one_line(what)}", err=True)
        raise
    if result.rank > 0:
        return
    score = f"{result.metric} {100 * result.best_score:.2f} %"
    over = f"over {result.scored_classes} of {result.classes} classes"
    typer.echo(f"best {result.best}  {score} {over} on {config.data.val_split}")
    typer.echo(f"last {result.last}")


def _resuming(data: Path, out: Path, preset: str, settings: list[str]) -> str:
    words = ["knet-deploy", "train", "--data", str(data), "--out", str(out), "--preset", preset]
    for setting in settings:
        words += ["--set", setting]
    return shlex.join([*words, "--resume"])
