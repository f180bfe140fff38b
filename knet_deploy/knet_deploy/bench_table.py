"""What `bench` says: a table for each frame size, and a line for each ratio."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from knet_deploy.console import one_line

if TYPE_CHECKING:
    from knet_runtime.bench.report import Report, Row
    from knet_runtime.bench.summary import Ratio

_HEAD = (
    "frames/s",
    "ms",
    "p5",
    "p95",
    "p99",
    "fit",
    "infer",
    "tail",
    "draw",
    "matmul",
    "copy",
    "J/frame",
    "MiB",
    "start s",
    "equal",
)


def lines(report: Report) -> Iterator[str]:
    """The whole answer, line by line."""
    machine = report.machine
    models = ", ".join(report.models)
    yield f"{models}, {report.source}, {report.rounds} rounds of {report.frames} frames"
    yield (
        f"{machine.processor}, {report.threads} threads: matrix product "
        f"{2 * report.limits.matmul / 1e9:.0f} GFLOP/s float32, copy "
        f"{report.limits.copy / 1e9:.1f} GB/s"
    )
    if machine.load is not None and machine.load > 1:
        yield f"note: the load is {machine.load:.1f}: others compute here too"
    for count in dict.fromkeys(row.multiply_adds for row in report.rows if row.multiply_adds):
        yield f"{count / 1e9:.2f} giga multiply-adds a picture"
    for task in dict.fromkeys(row.task for row in report.rows):
        rows = [row for row in report.rows if row.task == task]
        yield ""
        yield from _table(task, rows)
    yield ""
    yield from _notes(report)
    for row in report.files:
        several = "" if row.sources == 1 else f", {row.sources} files at once"
        yield (
            f"file to file {row.task}: {row.contestant} {row.frames_per_second:.1f} "
            f"frames/s{several}"
        )
    for media in report.media:
        parts = ", ".join(f"{stage} {time.median:.2f}" for stage, time in media.stages.items())
        yield f"file {media.task}, ms a frame: {parts}"
    for ratio in report.ratios:
        if ratio.faster == _winner(report, ratio.task) and ratio.slower != ratio.faster:
            yield _ratio(ratio)


def _table(task: str, rows: list[Row]) -> Iterator[str]:
    cells = [(task, "precision", *_HEAD), *(_cells(row) for row in rows)]
    kept = [column for column in range(len(cells[0])) if any(line[column] for line in cells[1:])]
    widths = {column: max(len(line[column]) for line in cells) for column in kept}
    for line in cells:
        yield "  ".join(
            line[column].ljust(widths[column]) if column < 2 else line[column].rjust(widths[column])
            for column in kept
        ).rstrip()


def _cells(row: Row) -> tuple[str, ...]:
    total = row.stages["total"]
    stages = (
        f"{row.stages[name].median:.2f}" if name in row.stages else ""
        for name in ("fit", "infer", "tail", "draw")
    )
    mark = "" if row.verified or not row.ours else " *"
    return (
        f"{row.contestant}{mark}",
        row.precision,
        f"{row.frames_per_second:.1f}",
        f"{total.median:.2f}",
        f"{total.p5:.2f}",
        f"{total.p95:.2f}",
        f"{total.p99:.2f}",
        *stages,
        _percent(row.matmul_share, 0),
        _percent(row.copy_share, 0),
        "" if row.joules_per_frame is None else f"{row.joules_per_frame:.2f}",
        "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}",
        f"{row.startup_seconds:.1f}",
        _percent(row.agreement, 3),
    )


def _percent(share: float | None, digits: int) -> str:
    return "" if share is None else f"{100 * share:.{digits}f} %"


def _notes(report: Report) -> Iterator[str]:
    seen = set()
    for row in report.rows:
        if row.contestant in seen:
            continue
        seen.add(row.contestant)
        if row.ours and row.doubt:
            yield one_line(f"* {row.contestant}: {row.doubt}; knet-deploy verify measures it")
        if row.note:
            yield one_line(f"{row.contestant}: {row.note}")
    for failure in report.failures:
        what = "broke off" if failure.contestant in seen else "did not run"
        yield one_line(f"{failure.contestant} {what}: {failure.reason}")


def _winner(report: Report, task: str) -> str | None:
    """The fastest of ours that is verified here; of all of ours, where none is."""
    ours = [row for row in report.rows if row.ours and row.task == task]
    proven = [row for row in ours if row.verified] or ours
    return max(proven, key=lambda row: row.frames_per_second).contestant if proven else None


def _ratio(ratio: Ratio) -> str:
    return (
        f"{ratio.task}: {ratio.faster} is {ratio.median:.2f} times as fast as {ratio.slower} "
        f"({ratio.least:.2f} … {ratio.most:.2f})"
    )
