"""`knet-deploy data`: check what a data folder holds, convert other formats into one, and back."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from knet_deploy.cli.choices import LABELLED
from knet_deploy.cli.console import (
    needs_extra,
    one_line,
    result_file,
    say,
    say_error,
    say_table,
    track,
)
from knet_runtime.errors import ConfigError
from knet_runtime.types import Task

if TYPE_CHECKING:
    from knet_train.data.check import DataReport, ObjectCount
    from knet_train.data.convert.write import Converted
    from knet_train.data.dataset import LabelledFolder
    from knet_train.data.export.labelled import LabelledImages
    from knet_train.data.segment_folder import SegmentFolder

data = typer.Typer(rich_markup_mode=None, help="Look after folders of labelled images.")

_SIZES = 5  # shown of the sizes that images have


@data.command()
def check(
    folder: Annotated[Path, typer.Argument(help=LABELLED)],
    split: Annotated[str | None, typer.Option(help="Only this split; by default all.")] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="Draw some images with their labels: FILE.png.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything found as JSON.")] = None,
    task: Annotated[
        Task | None,
        typer.Option(
            help="Whose labels to check; semantic by default, or what a folder of objects has.",
            show_default=False,
        ),
    ] = None,
    soft_labels: Annotated[
        list[Path] | None,
        typer.Option(
            help="Check these soft labels too, of split train or --split; repeatable.",
            show_default=False,
        ),
    ] = None,
    unlabelled: Annotated[
        list[Path] | None,
        typer.Option(help="And those of these images; repeatable.", show_default=False),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Of objects: judge them by the size and kernels of this preset or TOML file; by "
            "default knet-edge-TASK.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Read every image and label of a folder, and list whatever would break a training: files
    missing or damaged, sizes that differ, label values outside the map, palettes that contradict
    it. The exit status is then 1. Warn of labels that look unlike what was meant, such as classes
    without a pixel, and of objects that a training would not see.
    """
    with needs_extra("train", "knet-deploy data check"):
        from knet_train.config import load_config
        from knet_train.data import check as data_check
        from knet_train.data.check_segments import check_segments, survey_segments
        from knet_train.data.dataset import LabelledFolder
        from knet_train.data.segments import usual_task
        from knet_train.data.soft_labels import check_soft_labels, find_soft_labels
        from knet_train.figures import draw_sheet
    sheet_file, json_file = result_file(sheet, ".png"), result_file(json)
    task = task or usual_task(folder)
    if unlabelled and not soft_labels:
        raise ConfigError("--unlabelled names images that have soft labels: pass --soft-labels too")
    if soft_labels and task != "semantic":
        raise ConfigError(f"--soft-labels is for semantic segmentation, and this is for {task}")
    good: LabelledFolder | SegmentFolder
    if task == "semantic":
        if preset is not None:
            raise ConfigError(f"--preset {preset}: it judges objects; {folder} has class maps")
        survey = data_check.survey(folder, split)
        with track("checking", len(survey.samples)) as advance:
            report, pairs = data_check.check(survey, advance)
        if soft_labels:
            learnt = survey.folder(split or "train")
            soft = find_soft_labels(learnt, soft_labels, unlabelled or ())
            with track("checking soft labels", len(soft.files())) as advance:
                report = data_check.with_soft_labels(report, check_soft_labels(soft, advance))
        good = LabelledFolder(survey.layout, "", pairs)
    else:
        config = load_config(preset or f"knet-edge-{task}")
        if config.model.task != task:
            raise ConfigError(f"--preset {preset} is of task {config.model.task}, not {task}")
        objects = survey_segments(folder, split, task)
        with track("checking", sum(map(len, objects))) as advance:
            report, good = check_segments(objects, config, advance)
    _show(report, task)
    if json_file is not None:
        say("wrote", json_file.write(data_check.encode_report(report)))
    if sheet_file is not None and len(good):
        pixels = max(1, report.labelled_pixels)
        shares = {row.name: row.pixels / pixels for row in report.classes}
        say("wrote", sheet_file.write(draw_sheet(good, shares)))
    if report.problems:
        say_error(f"{folder} has {len(report.problems)} problems: fix the files named above")
        raise typer.Exit(1)


def _show(report: DataReport, task: Task) -> None:
    say("folder", f"{report.root} ({report.layout} layout, {len(report.classes)} classes)")
    say("splits", ", ".join(f"{name} {count}" for name, count in report.splits.items()))
    shown = [f"{size.width}×{size.height} ({size.images})" for size in report.sizes[:_SIZES]]
    more = len(report.sizes) - _SIZES
    say("sizes", ", ".join(shown) + (f" and {more} more" if more > 0 else ""))
    if report.objects is None:
        pixels = report.labelled_pixels + report.ignored_pixels
        say("labelled", f"{100 * report.labelled_pixels / max(1, pixels):.1f} % of the pixels")
    else:
        _show_objects(report, report.objects, task)
    shares = [100 * row.pixels / max(1, report.labelled_pixels) for row in report.classes]
    rows = zip(report.classes, shares, strict=True)
    table = [(one_line(row.name), f"{share:.3f}", str(row.images)) for row, share in rows]
    if any(row.objects is not None for row in report.classes):
        counts = ["" if row.objects is None else str(row.objects) for row in report.classes]
        cells = [(*line, count) for line, count in zip(table, counts, strict=True)]
        say_table(("class", "pixels %", "images", "objects"), cells)
    else:
        say_table(("class", "pixels %", "images"), table)
    if report.soft_labels is not None:
        say("soft labels", f"{report.soft_labels} files")
    for line in report.warnings:
        say("warning", line)
    for line in report.problems:
        say("problem", line)
    if not report.problems:
        say("problems", f"none in {report.images} images")


def _show_objects(report: DataReport, found: ObjectCount, task: Task) -> None:
    pixels = max(1, sum(size.height * size.width * size.images for size in report.sizes))
    void = 100 * report.ignored_pixels / pixels
    if task == "panoptic":
        say("labelled", f"{100 - void:.1f} % of the pixels; the others are void")
    else:
        covered = 100 * report.labelled_pixels / pixels
        say("covered", f"{covered:.1f} % of the pixels by objects; {void:.1f} % are void")
    mean = found.objects / max(1, report.images)
    text = f"{found.objects}, {mean:.1f} an image, at most {found.most}"
    say("objects", text + (f"; {found.crowds} crowds" if found.crowds else ""))


@data.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Folder or ZIP file of images and labels.")],
    out: Annotated[Path, typer.Argument(help="Folder to make; it must not be there yet.")],
    format_name: Annotated[
        str | None, typer.Option("--from", help="The format, where a folder may be in several.")
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="Only these, in this order: A,B,C; the others become 'not labelled'."),
    ] = None,
    renamed: Annotated[
        list[str] | None,
        typer.Option("--map", help="Rename a class, or merge it into another: OLD=NEW."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Shares of train, val and test, such as 0.8,0.1,0.1; frames of one sequence stay "
            "together. By default as the source has them, else 0.8,0.2."
        ),
    ] = None,
    link: Annotated[
        bool, typer.Option("--link", help="Link to the source's images instead of copying them.")
    ] = False,
    task: Annotated[
        Task, typer.Option(help="What to learn from it; objects are written for two of them.")
    ] = "semantic",
) -> None:
    """Recognise the format of a folder or ZIP file of labelled images, and write it in the layout
    that training reads: COCO, Pascal VOC, CVAT, LabelMe, Label Studio, YOLO, Roboflow, Supervisely,
    Cityscapes, Mapillary, BDD100K, ADE20K, CamVid, parquet files, and folders of images and masks.
    """
    with needs_extra("train", "knet-deploy data convert"):
        from knet_train.data.convert.formats import FORMAT_NAMES
        from knet_train.data.convert.splits import parse_shares
        from knet_train.data.convert.write import (
            Options,
            check_options,
            convert as write,
            open_source,
        )
    if format_name is not None and format_name not in FORMAT_NAMES:
        raise ConfigError(f"--from is {format_name!r}; the formats are {', '.join(FORMAT_NAMES)}")
    names = tuple(name.strip() for name in classes.split(",")) if classes else ()
    shares = None if split is None else parse_shares(split)
    options = Options(names, tuple(renamed or ()), shares, link, task)
    check_options(out, options, source)
    with open_source(source, format_name) as opened:
        match = opened.match
        say("recognised", f"{match.format.title}: {match.reason} (--from {match.format.name})")
        with track("converting", len(opened.source.items)) as advance:
            done = write(opened, out, options, advance)
    if done.problems:
        for line in done.problems:
            say("problem", line)
        say_error(f"{source} has {len(done.problems)} problems: fix them; nothing was written")
        raise typer.Exit(1)
    _show_converted(done, out, task)


def _show_converted(done: Converted, out: Path, task: Task) -> None:
    say("wrote", out)
    say("splits", ", ".join(f"{name} {count}" for name, count in done.splits.items()))
    say("divided", done.divided)
    pixels = sum(row.pixels for row in done.classes)
    say("labelled", f"{100 * pixels / max(1, pixels + done.void):.1f} % of the pixels")
    for line in done.left_out:
        say("left out", line)
    rows = [
        (one_line(row.name), f"{100 * row.pixels / max(1, pixels):.3f}", str(row.images))
        for row in done.classes
    ]
    if task == "semantic":
        say_table(("class", "pixels %", "images"), rows)
    else:
        counts = [str(row.objects) for row in done.classes]
        cells = [(*row, count) for row, count in zip(rows, counts, strict=True)]
        say_table(("class", "pixels %", "images", "objects"), cells)
    check = ["knet-deploy", "data", "check", str(out)]
    train = ["knet-deploy", "train", "--data", str(out), "--out", f"runs/{out.absolute().name}"]
    if task != "semantic":
        check += ["--task", task]
        train += ["--preset", f"knet-edge-{task}"]
    say("next", shlex.join(check))
    say("then", shlex.join(train))


@data.command()
def export(
    folder: Annotated[Path, typer.Argument(help=LABELLED)],
    out: Annotated[Path, typer.Argument(help="Folder to make; it must not be there yet.")],
    to: Annotated[Literal["coco", "cvat"], typer.Option(help="The format.")],
    split: Annotated[str | None, typer.Option(help="Only this split; by default all.")] = None,
    task: Annotated[
        Task | None,
        typer.Option(
            help="Whose labels to write; semantic by default, or what a folder of objects has.",
            show_default=False,
        ),
    ] = None,
    polygons: Annotated[
        bool,
        typer.Option(
            "--polygons",
            help="Outlines within a pixel where there are no holes, instead of exact masks.",
        ),
    ] = False,
    link: Annotated[
        bool, typer.Option("--link", help="Link to the folder's images instead of copying them.")
    ] = False,
) -> None:
    """Write the labels of a folder that training reads for other programs: to correct them in CVAT
    and bring them back with `data convert`, or as COCO's instances or panoptic format.
    """
    with needs_extra("train", "knet-deploy data export"):
        from knet_train.data.export.labelled import list_images
        from knet_train.data.export.write import check_export, export as write
        from knet_train.data.segments import usual_task
    task = task or usual_task(folder)
    check_export(out, to, task, polygons=polygons)
    listed = list_images(folder, split, task)
    with track("exporting", len(listed.images)) as advance:
        done = write(listed, out, to, polygons=polygons, link=link, on_image=advance)
    if done.problems:
        for line in done.problems:
            say("problem", line)
        say_error(f"{folder} has {len(done.problems)} problems: fix them; nothing was written")
        raise typer.Exit(1)
    say("wrote", out)
    say("splits", ", ".join(f"{name} {count}" for name, count in done.splits.items()))
    say("shapes", f"{done.counts.masks} masks, {done.counts.polygons} polygons")
    if to == "cvat":
        say("labels", f"of a new task: {out / 'labels.json'}, under Raw")
        say("upload", f"{out / 'annotations.xml'}, as CVAT 1.1")
    say("and back", shlex.join(_way_back(listed, out, to)))


def _way_back(listed: LabelledImages, out: Path, to: Literal["coco", "cvat"]) -> list[str]:
    """The command that makes the same labels of an export."""
    back = out.with_name(f"{out.absolute().name}-knet")
    words = ["knet-deploy", "data", "convert", str(out), str(back)]
    names = listed.labels.names
    # Else what no shape covers would be one more class, in front.
    if to == "cvat" and listed.task != "instance" and not any("," in name for name in names):
        words += ["--classes", ",".join(names)]
    return words if listed.task == "semantic" else [*words, "--task", listed.task]
