"""`knet-deploy data check`: what a data folder holds, and everything that is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from knet_train.data.check import DataReport

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
) -> None:
    """Read every image and label of a folder, and list whatever would break a training: files
    missing or damaged, sizes that differ, label values outside the map, palettes that contradict
    it. The exit status is then 1. Warn of labels that look unlike what was meant, such as classes
    without a pixel.
    """
    with needs_extra("train", "knet-deploy data check"):
        from knet_train.data import check as data_check
        from knet_train.figures import draw_sheet
    sheet_file, json_file = result_file(sheet, ".png"), result_file(json)
    survey = data_check.survey(folder, split)
    with track("checking", len(survey.samples)) as advance:
        report, good = data_check.check(survey, advance)
    _show(report)
    if json_file is not None:
        say("wrote", json_file.write(data_check.encode_report(report)))
    if sheet_file is not None and good:
        pixels = max(1, report.labelled_pixels)
        shares = {row.name: row.pixels / pixels for row in report.classes}
        say("wrote", sheet_file.write(draw_sheet(survey.layout, good, shares)))
    if report.problems:
        say_error(f"{folder} has {len(report.problems)} problems: fix the files named above")
        raise typer.Exit(1)


def _show(report: DataReport) -> None:
    say("folder", f"{report.root} ({report.layout} layout, {len(report.classes)} classes)")
    say("splits", ", ".join(f"{name} {count}" for name, count in report.splits.items()))
    shown = [f"{size.width}×{size.height} ({size.images})" for size in report.sizes[:_SIZES]]
    more = len(report.sizes) - _SIZES
    say("sizes", ", ".join(shown) + (f" and {more} more" if more > 0 else ""))
    pixels = report.labelled_pixels + report.ignored_pixels
    say("labelled", f"{100 * report.labelled_pixels / max(1, pixels):.1f} % of the pixels")
    shares = [100 * row.pixels / max(1, report.labelled_pixels) for row in report.classes]
    rows = zip(report.classes, shares, strict=True)
    say_table(
        ("class", "pixels %", "images"),
        [(one_line(row.name), f"{share:.3f}", str(row.images)) for row, share in rows],
    )
    for line in report.warnings:
        say("warning", line)
    for line in report.problems:
        say("problem", line)
    if not report.problems:
        say("problems", f"none in {report.images} images")
