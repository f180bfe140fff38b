"""`knet-deploy train`: a folder of labelled images becomes a checkpoint."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knet_deploy.cli.console import needs_extra, one_line

if TYPE_CHECKING:
    from pytorch_lightning.callbacks import Callback


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

        from knet_train.config import load_config
        from knet_train.fit import train as fit
        from knet_train.run_folder import STATE, Stopped, causes

    config = load_config(preset, settings or [])
    try:
        result = fit(
            config,
            data,
            out,
            backbone_weights=backbone_weights,
            init=init,
            resume=resume,
            callbacks=[_progress(config.optim.steps)],
        )
    except KeyboardInterrupt as stop:
        if getattr(rank_zero_only, "rank", 0) == 0:  # of many processes the first one speaks
            # SIGTERM arrives again, as an interrupt of its own, while the first is on its way.
            step = next((cause.step for cause in causes(stop) if isinstance(cause, Stopped)), None)
            what = "stopped without saving" if step is None else f"stopped at step {step}"
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


def _progress(steps: int) -> Callback:
    """A bar on a terminal, else a line for every hundredth of the run; a line for each score."""
    import pytorch_lightning as pl
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from knet_train.module import TrainingModule

    class Lines(pl.Callback):
        def __init__(self) -> None:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}", markup=False),
                TimeRemainingColumn(),
            )
            console = Console()
            self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
            self.task = self.bar.add_task("", total=steps)

        def say(self, line: str) -> None:
            if self.bar.disable:
                typer.echo(line)
            else:  # above the bar
                self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

        def on_train_start(self, trainer: pl.Trainer, *_: object) -> None:
            if trainer.is_global_zero:
                self.bar.start()

        def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
            step = trainer.global_step
            if not trainer.is_global_zero:
                return
            self.bar.update(self.task, completed=step)
            if step % (max(1, steps // 100) if self.bar.disable else 10) and step != steps:
                return
            loss = float(trainer.callback_metrics.get("loss", float("nan")))
            rate = max(float(group["lr"]) for group in trainer.optimizers[0].param_groups)
            if self.bar.disable:
                self.say(f"step {step}/{steps}  loss {loss:.3f}")
            self.bar.update(self.task, description=f"loss {loss:.3f}  learning rate {rate:.2g}")

        def on_validation_end(self, trainer: pl.Trainer, *_: object) -> None:
            metrics = trainer.callback_metrics
            module = trainer.lightning_module
            assert isinstance(module, TrainingModule)
            name = f"val_{module.metric.lower()}"
            if not trainer.is_global_zero or name not in metrics:
                return
            score, scored = float(metrics[name]), int(metrics["val_classes"])
            over = f"over {scored} of {module.label_map.num_classes} classes"
            line = f"step {trainer.global_step}/{steps}  {module.metric} {100 * score:.2f} % {over}"
            self.say(line)

        def on_exception(self, *_: object) -> None:
            self.bar.stop()

        def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            self.bar.stop()

    return Lines()
