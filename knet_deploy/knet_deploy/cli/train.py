"""`knet-deploy train`: a folder of labelled images becomes a checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knet_deploy.cli.console import needs_extra

if TYPE_CHECKING:
    from pytorch_lightning.callbacks import Callback


def train(
    data: Annotated[Path, typer.Option(help="Folder with images/, labels/ and labels.json.")],
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
    """Train a K-Net. Leaves best.safetensors (highest mIoU on the validation split),
    last.safetensors, and CSV and TensorBoard logs in the folder --out."""
    with needs_extra("train"):
        from knet_train.config import load_config
        from knet_train.fit import train as fit

    config = load_config(preset, settings or [])
    result = fit(
        config,
        data,
        out,
        backbone_weights=backbone_weights,
        init=init,
        resume=resume,
        callbacks=[_progress(config.optim.steps)],
    )
    if result.rank > 0:  # of many processes the first one speaks
        return
    typer.echo(
        f"best {result.best}  mIoU {100 * result.best_miou:.2f} % on {config.data.val_split}"
    )
    typer.echo(f"last {result.last}")


def _progress(steps: int) -> Callback:
    """A bar on a terminal, else a line for every hundredth of the run."""
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import RichProgressBar

    if sys.stdout.isatty():
        return RichProgressBar()

    class Lines(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
            step = trainer.global_step
            if trainer.is_global_zero and (step % max(1, steps // 100) == 0 or step == steps):
                loss = float(trainer.callback_metrics.get("loss", float("nan")))
                typer.echo(f"step {step}/{steps}  loss {loss:.3f}")

        def on_validation_end(self, trainer: pl.Trainer, *_: object) -> None:
            score = float(trainer.callback_metrics.get("val_miou", float("nan")))
            if not trainer.is_global_zero:
                return
            typer.echo(f"step {trainer.global_step}/{steps}  mIoU {100 * score:.2f} %")

    return Lines()
