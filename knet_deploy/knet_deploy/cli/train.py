"""`knet-deploy train`: a folder of labelled images becomes a checkpoint."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from knet_deploy.cli.choices import LoggerChoice
from knet_deploy.cli.console import clock, needs_extra, one_line, say

if TYPE_CHECKING:
    from knet_train.estimate import Estimate
    from knet_train.loggers import LoggerName

_GIB = 2**30


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
    soft_labels: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of a teacher's probabilities, as soft-labels writes them, for training "
            "images and --unlabelled ones; repeatable.",
            show_default=False,
        ),
    ] = None,
    unlabelled: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of images to learn from by their soft labels alone; repeatable.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in --out, or begin it.")
    ] = False,
    batch: Annotated[
        Literal["auto"] | None,
        typer.Option(
            help="Find the fewest parts of a step that fit into the GPU (optim.accumulate); "
            "optim.batch_size stays."
        ),
    ] = None,
    loggers: Annotated[
        list[LoggerChoice] | None,
        typer.Option(
            "--logger",
            help="Where numbers and images go besides the report; repeatable. By default csv and "
            "tensorboard. wandb and mlflow are extras.",
            show_default=False,
        ),
    ] = None,
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate", help="Say time, memory and disk after a few steps; --out is not touched."
        ),
    ] = False,
) -> None:
    """Train a K-Net. Leaves best.safetensors (highest mIoU, PQ or AP on the drives of
    data.leave_out, else on the validation split), last.safetensors, report.html, and logs in the
    folder --out."""
    chosen: list[LoggerName] = [one.value for one in loggers or []]
    with needs_extra("train"):
        from pytorch_lightning.utilities import rank_zero_only

        from knet_deploy.cli.training import Lines
        from knet_train.batch_size import fit_accumulate
        from knet_train.config import load_config, override_config
        from knet_train.estimate import estimate as try_run
        from knet_train.fit import train as fit
        from knet_train.loggers import USUAL, check_loggers
        from knet_train.run_folder import CONFIG, STATE, Stopped, began_with, causes
        from knet_train.run_report import REPORT

    for name in chosen:
        if name in ("wandb", "mlflow"):
            with needs_extra(name, f"--logger {name}"):
                check_loggers([name])
    config = load_config(preset, settings or [])
    if batch is not None:
        if resume and (out / CONFIG).is_file():  # a run goes on with the parts that it began with
            parts = began_with(out).optim.accumulate
            config = override_config(config, [f"optim.accumulate={parts}"])
        else:
            config = fit_accumulate(
                config,
                data,
                backbone_weights=backbone_weights,
                init=init,
                soft_labels=soft_labels or (),
                unlabelled=unlabelled or (),
            )
        size, parts = config.optim.batch_size, config.optim.accumulate
        say("batch", f"{size} images a step, {size // parts} at once (optim.accumulate={parts})")
    if estimate:
        found = try_run(
            config,
            data,
            backbone_weights=backbone_weights,
            init=init,
            soft_labels=soft_labels or (),
            unlabelled=unlabelled or (),
        )
        _say_estimate(found, out)
        return
    lines = Lines()
    folders = {"--soft-labels": soft_labels or [], "--unlabelled": unlabelled or []}
    resuming = _resuming(data, out, preset, settings or [], folders, chosen, batch)
    try:
        result = fit(
            config,
            data,
            out,
            backbone_weights=backbone_weights,
            init=init,
            soft_labels=soft_labels or (),
            unlabelled=unlabelled or (),
            resume=resume,
            resume_command=resuming,
            callbacks=[lines],
            loggers=chosen or USUAL,
        )
    except KeyboardInterrupt as stop:
        if getattr(rank_zero_only, "rank", 0) == 0:  # of many processes the first one speaks
            # SIGTERM arrives again, as an interrupt of its own, while the first is on its way.
            step = next((cause.step for cause in causes(stop) if isinstance(cause, Stopped)), None)
            what = "stopped without saving"
            if step is not None:
                what = f"stopped at {lines.standing(step, config.optim.steps)}"
            if (out / STATE).exists():
                what += f"; resume with: {resuming}"
            typer.echo(f"knet-deploy: {one_line(what)}", err=True)
        raise
    if result.rank > 0:
        return
    score = f"{result.metric} {100 * result.best_score:.2f} %"
    over = f"over {result.scored_classes} of {result.classes} classes"
    on = ", ".join(config.data.leave_out) or config.data.val_split
    typer.echo(f"best {result.best}  {score} {over} on {on}")
    typer.echo(f"last {result.last}")
    typer.echo(f"report {out / REPORT}")


def _say_estimate(found: Estimate, out: Path) -> None:
    for label, value in found.facts.items():
        say(label, value)
    say("step", f"{found.step:.3g} s")
    say("evaluation", f"{found.evaluation:.3g} s, {found.evaluations} of them")
    say("time", clock(found.total))
    say("peak", "unknown" if found.memory is None else f"{found.memory / _GIB:.2f} GiB of memory")
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    say("disk", f"{found.disk / _GIB:.2f} GiB, {free / _GIB:.1f} GiB free at {there}")


def _resuming(
    data: Path,
    out: Path,
    preset: str,
    settings: list[str],
    folders: Mapping[str, Sequence[Path]],
    loggers: Sequence[LoggerName],
    batch: str | None,
) -> str:
    words = ["knet-deploy", "train", "--data", str(data), "--out", str(out), "--preset", preset]
    for setting in settings:
        words += ["--set", setting]
    for option, paths in folders.items():
        for path in paths:
            words += [option, str(path)]
    for name in loggers:
        words += ["--logger", name]
    if batch is not None:
        words += ["--batch", batch]
    return shlex.join([*words, "--resume"])
