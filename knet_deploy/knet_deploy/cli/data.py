"""`knet-deploy data check`: what a data folder holds, and everything that is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knet_deploy.cli.console import needs_extra, one_line, say, say_error, track
from knet_runtime.atomic import AtomicFile
from knet_runtime.errors import ConfigError

if TYPE_CHECKING:
    from knet_train.data.check import DataReport

data = typer.Typer(rich_markup_mode=None, help="Look after folders of labelled pictures.")

_SIZES = 5  # shown of the sizes that pictures have


@data.command()
def check(
    folder: Annotated[
        Path, typer.Argument(help="Labelled pictures: our, ADE20K's or Cityscapes' layout.")
    ],
    split: Annotated[str | None, typer.Option(help="Only this split; by default all.")] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="Draw some pictures with their labels: FILE.png.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything found as JSON.")] = None,
) -> None:
    """Read every picture and label of a folder, and list whatever would break a training: files
    missing or damaged, sizes that differ, label values outside the map. The exit status is then 1.
    """
    with needs_extra("train", "knet-deploy data check"):
        from knet_train.data import check as data_check
        from knet_train.figures import draw_sheet
    if sheet is not None and sheet.suffix.lower() != ".png":
        raise ConfigError(f"{sheet}: let the picture's name end in .png")
    files = {path: AtomicFile(path) for path in (sheet, json) if path is not None}
    survey = data_check.survey(folder, split)
    with track("checking", len(survey.samples)) as advance:
        report, good = data_check.check(survey, advance)
    _show(report)
    if json is not None:
        say("wrote", files[json].write(data_check.encode_report(report)))
    if sheet is not None and good:
        pixels = max(1, report.labelled_pixels)
        shares = {row.name: row.pixels / pixels for row in report.classes}
        say("wrote", files[sheet].write(draw_sheet(survey.layout, good, shares)))
    if report.problems:
        say_error(f"{folder} has {len(report.problems)} problems: mend the files named above")
        raise typer.Exit(1)


def _show(report: DataReport) -> None:
    say("folder", f"{report.root} ({report.layout} layout, {len(report.classes)} classes)")
    say("splits", ", ".join(f"{name} {count}" for name, count in report.splits.items()))
    shown = [f"{size.width}×{size.height} ({size.images})" for size in report.sizes[:_SIZES]]
    more = len(report.sizes) - _SIZES
    say("sizes", ", ".join(shown) + (f" and {more} more" if more > 0 else ""))
    pixels = report.labelled_pixels + report.ignored_pixels
    say("labelled", f"{100 * report.labelled_pixels / max(1, pixels):.1f} % of the pixels")
    names = [one_line(row.name) for row in report.classes]
    width = max(map(len, ["class", *names]))
    typer.echo(f"\n{'class':<{width}}    pixels %  pictures")
    for name, row in zip(names, report.classes, strict=True):
        share = 100 * row.pixels / max(1, report.labelled_pixels)
        typer.echo(f"{name:<{width}}  {share:>10.3f}  {row.images:>8}")
    typer.echo("")
    for line in report.warnings:
        say("warning", line)
    for line in report.problems:
        say("problem", line)
    if not report.problems:
        say("problems", f"none in {report.images} pictures")
