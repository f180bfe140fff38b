"""`knet-deploy eval`: the score of a checkpoint or a bundle on labelled images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import numpy as np
import typer
from numpy.typing import NDArray

from knet_deploy.cli.choices import BUNDLE, EngineOption
from knet_deploy.cli.console import needs_extra, one_line, result_file, say, say_table, track
from knet_runtime.bundle.manifest import SegmentRules
from knet_runtime.bundle.store import find_bundle, open_bundle
from knet_runtime.errors import ConfigError
from knet_runtime.labels import LabelMap
from knet_runtime.segmentation import Segmentation
from knet_runtime.types import Task

if TYPE_CHECKING:
    from knet_train.evaluate import Scored
    from knet_train.evaluate_segments import InstanceReport, PanopticReport


@dataclass(frozen=True)
class _Model:
    """A checkpoint or a bundle that is ready to segment images, and what its report says of it."""

    task: Task
    labels: LabelMap
    find: Callable[[NDArray[np.uint8]], Segmentation]
    split: str
    checkpoint_sha256: str
    preset: str
    engine: str
    mode: str


def evaluate(
    model: Annotated[
        Path, typer.Argument(help=f"A checkpoint, RUN/best.safetensors, or a bundle, {BUNDLE}.")
    ],
    data: Annotated[Path, typer.Option(help="Labelled images, in a layout that train reads.")],
    split: Annotated[
        str | None,
        typer.Option(help="Split of --data; by default the checkpoint's val_split, or val."),
    ] = None,
    task: Annotated[
        Literal["instance"] | None,
        typer.Option(help="Score a panoptic model's things as objects, by AP."),
    ] = None,
    engine: EngineOption = "auto",
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
    by_drive: Annotated[
        bool,
        typer.Option(
            "--by-drive",
            help="Score each drive too: images whose names are the same but for a number at the "
            "end; for semantic models.",
        ),
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Write all numbers as JSON.")] = None,
    confusion: Annotated[
        Path | None, typer.Option(help="Draw the confusion matrix: FILE.png.")
    ] = None,
) -> None:
    """Score a checkpoint or a bundle on labelled images, at their own sizes, with a table of
    classes: mIoU, mAcc and aAcc of a semantic model, PQ of a panoptic one, AP of one for instances.

    How an image is seen is the checkpoint's own: at one fixed size, or (the published models) at
    its own ratio. A bundle sees it as it always does.
    """
    for setting in settings or []:
        if not setting.startswith("data."):
            raise ConfigError(f"--set {setting}: eval takes data.* only, the rest is trained")
    json_file, drawing_file = result_file(json), result_file(confusion, ".png")
    model = find_bundle(model)
    if model.is_dir():
        for option, given in (("--slide", slide), ("--ms-flip", ms_flip), ("--set", settings)):
            if given:
                raise ConfigError(f"{option} is for checkpoints: a bundle sees images in one way")
        opening = _bundle(model, engine, task)
    elif engine != "auto":
        raise ConfigError(f"--engine {engine} runs bundles, and {model} is none")
    else:
        opening = _checkpoint(model, task, settings or [], slide=slide, ms_flip=ms_flip)
    with opening as opened, needs_extra("train", "knet-deploy eval"):
        if drawing_file is not None and opened.task != "semantic":
            raise ConfigError(f"--confusion is for semantic models, {model} is {opened.task}")
        if by_drive and opened.task != "semantic":
            raise ConfigError(f"--by-drive is for semantic models, {model} is {opened.task}")
        if opened.task == "semantic":
            report, drawing = _semantic(opened, data, split or opened.split, by_drive=by_drive)
        else:
            report, drawing = _segments(opened, data, split or opened.split), None
        from knet_train.evaluate import encode_report
    if json_file is not None:
        say("wrote", json_file.write(encode_report(report)))
    if drawing_file is not None and drawing is not None:
        say("wrote", drawing_file.write(drawing()))


@contextmanager
def _bundle(path: Path, engine: str, task: Task | None) -> Iterator[_Model]:
    from knet_runtime.segmenter import Segmenter

    bundle = open_bundle(path)
    manifest, rules = bundle.manifest, None
    scored = _scored_task(path, manifest.task, task)
    if manifest.task != "semantic":
        rules = _rules(manifest.segment_rules, scored)
    with Segmenter(bundle, engine, rules=rules) as segment:
        yield _Model(
            task=scored,
            labels=segment.labels,
            find=segment,
            split="val",
            checkpoint_sha256=manifest.provenance.checkpoint_sha256,
            preset=manifest.provenance.preset,
            engine=segment.engine,
            mode=f"{manifest.input.resize} to {manifest.input.width}×{manifest.input.height}",
        )


@contextmanager
def _checkpoint(
    path: Path, task: Task | None, settings: list[str], *, slide: bool, ms_flip: bool
) -> Iterator[_Model]:
    with needs_extra("train", "knet-deploy eval"):
        import torch

        from knet_train import inference
        from knet_train.checkpoint import Checkpoint, read_any_checkpoint
        from knet_train.config import override_config
    opened = read_any_checkpoint(path)
    config = override_config(opened.config, settings)
    scored = _scored_task(path, config.model.task, task)
    inference.check_mode(config, slide=slide, ms_flip=ms_flip)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    opened.model.to(device)

    def find(image: NDArray[np.uint8]) -> Segmentation:
        if isinstance(opened, Checkpoint):
            classes = inference.predict(opened.model, image, config, slide=slide, ms_flip=ms_flip)
            return Segmentation(classes, opened.labels)
        rules = _rules(inference.segment_rules(config), scored)
        return inference.predict_segments(opened.model, image, config, opened.labels, rules)

    yield _Model(
        task=scored,
        labels=opened.labels,
        find=find,
        split=config.data.val_split,
        checkpoint_sha256=opened.sha256,
        preset=config.preset,
        engine=f"pytorch-{device.type}",
        mode=inference.describe_mode(config, slide=slide, ms_flip=ms_flip),
    )


def _scored_task(path: Path, own: Task, asked: Task | None) -> Task:
    """The task that a model is scored as."""
    if asked is not None and own == "semantic":
        raise ConfigError(f"--task {asked}: {path} is semantic, it tells no objects apart")
    return asked or own


def _rules(rules: SegmentRules, task: Task) -> SegmentRules:
    """Average precision ranks all objects, whatever their score."""
    return msgspec.structs.replace(rules, score=0.0) if task == "instance" else rules


def _scored(opened: _Model, folder: str, images: int) -> Scored:
    from knet_train.evaluate import Scored

    say("data", f"{folder}, {images} images")
    say("model", f"{opened.preset}, on {opened.engine}")
    say("seen", opened.mode)
    return Scored(
        checkpoint_sha256=opened.checkpoint_sha256,
        preset=opened.preset,
        engine=opened.engine,
        data=folder,
        images=images,
        mode=opened.mode,
    )


def _semantic(
    opened: _Model, data: Path, split: str, *, by_drive: bool
) -> tuple[Scored, Callable[[], bytes]]:
    from knet_train import evaluate as scores
    from knet_train.data.dataset import open_folder

    folder = open_folder(data, split)
    scores.check_classes(opened.labels.names, folder.labels.names, folder.root)
    with track("evaluating", len(folder)) as advance:
        drives = scores.evaluate(opened.find, folder, on_image=advance)
    counts = scores.together(drives, opened.labels)
    scored = _scored(opened, f"{folder.root.resolve().name}, split {folder.split}", len(folder))
    report = scores.make_report(counts, opened.labels, scored)
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
    if by_drive:
        report = msgspec.structs.replace(report, drives=scores.drive_rows(drives, folder))
        say_table(
            ("drive", "images", "mIoU"),
            [(one_line(row.name), str(row.images), _percent(row.miou)) for row in report.drives],
        )

    def drawing() -> bytes:
        from knet_runtime.drawing import encode_png
        from knet_train.figures import draw_confusion

        title = f"{report.preset} on {report.data}: mIoU {_percent(report.miou)} %"
        return encode_png(draw_confusion(counts, opened.labels, title))

    return report, drawing


def _show_panoptic(report: PanopticReport) -> PanopticReport:
    rows = [
        (
            one_line(row.name) + ("" if row.thing else " (stuff)"),
            *map(_percent, (row.pq, row.sq, row.rq)),
            *map(str, (row.tp, row.fp, row.fn)),
        )
        for row in report.classes
    ]
    say_table(("class", "PQ", "SQ", "RQ", "found", "wrong", "missed"), rows)
    for name, mean in (("", report.all), (" things", report.things), (" stuff", report.stuff)):
        detail = f"(SQ {_percent(mean.sq)}, RQ {_percent(mean.rq)})"
        say(f"PQ{name}", f"{_percent(mean.pq)} % {detail} over {mean.classes} classes")
    return report


def _show_instance(report: InstanceReport) -> InstanceReport:
    rows = [
        (one_line(row.name), *map(_percent, (row.ap, row.ap50, row.ap75)), str(row.objects))
        for row in report.classes
    ]
    say_table(("class", "AP", "AP50", "AP75", "objects"), rows)
    there = sum(row.ap is not None for row in report.classes)
    say("AP", f"{_percent(report.ap)} % over {there} of {len(rows)} classes")
    say("AP50", f"{_percent(report.ap50)} %")
    say("AP75", f"{_percent(report.ap75)} %")
    return report


def _segments(opened: _Model, data: Path, split: str) -> Scored:
    from knet_train import evaluate_segments as scores
    from knet_train.data.segments import open_segments
    from knet_train.evaluate import check_classes

    folder, labels = open_segments(data, split, opened.task), opened.labels
    wanted = labels.names
    if opened.task == "instance":
        wanted = tuple(labels.names[index] for index in labels.things)
    check_classes(wanted, folder.labels.names, folder.root)
    with track("evaluating", len(folder)) as advance:
        if opened.task == "panoptic":
            quality = scores.panoptic_quality(opened.find, folder, on_image=advance)
        else:
            precision = scores.average_precision(opened.find, folder, on_image=advance)
    scored = _scored(opened, f"{folder.root.resolve().name}, split {folder.split}", len(folder))
    if summary := folder.summary():
        say("void", summary)
    if opened.task == "panoptic":
        return _show_panoptic(scores.panoptic_report(quality, scored))
    return _show_instance(scores.instance_report(precision, scored))


def _percent(score: float | None) -> str:
    return "-" if score is None else f"{score:.2f}"
