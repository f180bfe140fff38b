"""`knet-deploy eval`: the score of a checkpoint on labelled images, as published scores are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knet_deploy.cli.choices import LABELLED
from knet_deploy.cli.console import needs_extra, one_line, result_file, say, say_table, track
from knet_runtime.errors import ConfigError

if TYPE_CHECKING:
    from knet_train.evaluate import EvalReport


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint: RUN/best.safetensors.")],
    data: Annotated[Path, typer.Option(help=LABELLED)],
    split: Annotated[
        str | None, typer.Option(help="Split of --data; by default the checkpoint's val_split.")
    ] = None,
    slide: Annotated[
        bool,
        typer.Option("--slide/--whole", help="In overlapping windows of data.crop, or at once."),
    ] = False,
    ms_flip: Annotated[
        bool,
        typer.Option("--ms-flip", help="Average six scales (0.5 to 1.75) and their mirror images."),
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override, such as data.eval_scale=[2048,640]."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write all numbers as JSON.")] = None,
    confusion: Annotated[
        Path | None, typer.Option(help="Draw the confusion matrix: FILE.png.")
    ] = None,
) -> None:
    """Score a checkpoint on labelled images, at their own sizes: mIoU, mAcc, aAcc and a table of
    classes. How an image is seen is the checkpoint's own: at one fixed size, or (the published
    models) at its own ratio."""
    with needs_extra("train", "knet-deploy eval"):
        import torch

        from knet_train import evaluate as scores
        from knet_train.checkpoint import read_checkpoint
        from knet_train.config import override_config
        from knet_train.data.dataset import open_folder
        from knet_train.figures import draw_confusion
    for setting in settings or []:
        if not setting.startswith("data."):
            raise ConfigError(f"--set {setting}: eval takes data.* only, the rest is trained")
    json_file, drawing_file = result_file(json), result_file(confusion, ".png")
    opened = read_checkpoint(checkpoint)
    config = override_config(opened.config, settings or [])
    scores.check_mode(config, slide=slide, ms_flip=ms_flip)
    folder = open_folder(data, split or config.data.val_split)
    scores.check_classes(opened.labels, folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with track("evaluating", len(folder)) as advance:
        counts = scores.evaluate(
            opened.model.to(device), folder, config, slide=slide, ms_flip=ms_flip, on_image=advance
        )
    report = scores.make_report(
        counts, opened, folder, scores.describe_mode(config, slide=slide, ms_flip=ms_flip)
    )
    _show(report, device.type)
    if json_file is not None:
        say("wrote", json_file.write(scores.encode_report(report)))
    if drawing_file is not None:
        title = f"{report.preset} on {report.data}: mIoU {_percent(report.miou)} %"
        say("wrote", drawing_file.write(draw_confusion(counts, opened.labels, title)))


def _show(report: EvalReport, device: str) -> None:
    say("data", f"{report.data}, {report.images} images")
    say("model", f"{report.preset}, on {device}")
    say("seen", report.mode)
    say_table(
        ("class", "IoU", "Acc", "Precision"),
        [
            (one_line(row.name), *map(_percent, (row.iou, row.acc, row.precision)))
            for row in report.classes
        ],
    )
    unseen = [row.name for row in report.classes if row.iou is None]
    over = f"over {len(report.classes) - len(unseen)} of {len(report.classes)} classes"
    if unseen:
        over += f"; neither labelled nor predicted: {', '.join(unseen)}"
    say("mIoU", f"{_percent(report.miou)} % {over}")
    say("mAcc", f"{_percent(report.macc)} %")
    say("aAcc", f"{_percent(report.aacc)} %")


def _percent(score: float | None) -> str:
    return "-" if score is None else f"{score:.2f}"
