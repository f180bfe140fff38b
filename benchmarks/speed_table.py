"""The tables of `knet-deploy bench` reports, as README.md beside this file shows them.

python benchmarks/speed_table.py benchmarks/results/speed-*.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from knet_runtime.bench.report import Report, Row
from knet_runtime.bench.summary import TOTAL

AGAINST = {"peer torch": "× eager", "peer ort-naive": "× plain ONNX Runtime"}
HEADS = ("precision", "ms (p5 … p95)", *AGAINST.values(), "equal pixels", "of the limit", "MiB")


def table(report: Report, task: str) -> Iterator[str]:
    """Markdown lines for one frame size: ours first, each with its ratios to the peers."""
    yield f"| {task} | {' | '.join(HEADS)} |"
    yield "|---" * (len(HEADS) + 1) + "|"
    ratios = {(ratio.slower, ratio.faster): ratio for ratio in report.ratios if ratio.task == task}
    rows = [row for row in report.rows if row.task == task]
    for row in sorted(rows, key=lambda row: not row.ours):
        found = [ratios.get((peer, row.contestant)) for peer in AGAINST]
        shares = ["" if ratio is None else f"{ratio.median:.2f}" for ratio in found]
        yield f"| {' | '.join(_cells(row, shares))} |"


def _cells(row: Row, ratios: list[str]) -> list[str]:
    time = row.stages[TOTAL]
    name = row.contestant if row.verified or not row.ours else f"{row.contestant} (not verified)"
    return [
        name,
        row.precision,
        f"{time.median:.1f} ({time.p5:.1f} … {time.p95:.1f})",
        *ratios,
        "" if row.agreement is None else f"{100 * row.agreement:.3f} %",
        "" if row.matmul_share is None else f"{100 * row.matmul_share:.0f} %",
        "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("reports", type=Path, nargs="+", help="what bench --json wrote")
    for path in parser.parse_args().reports:
        report = msgspec.json.decode(path.read_bytes(), type=Report)
        for task in dict.fromkeys(row.task for row in report.rows):
            sys.stdout.write("\n".join([*table(report, task), "", ""]))


if __name__ == "__main__":
    main()
