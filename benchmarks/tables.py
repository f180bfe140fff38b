"""The tables of README.md beside this file, from committed results.

python benchmarks/tables.py benchmarks/results/{speed-*,growth,operators,curve*}.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from knet_deploy.bench.report import TOTAL, Report, Row

AGAINST = {"baseline torch": "× eager", "baseline ort-naive": "× plain ONNX Runtime"}
UNITS = {"area": "pixels", "classes": "classes", "batch": "images", "sources": "files"}


def speed(report: Report) -> Iterator[str]:
    """What ``knet-deploy bench`` found, a table for each frame size: ours first, each with its
    ratios to the baselines."""
    for size in report.sizes:
        heads = [size, "precision", "ms (p5 … p95)", *AGAINST.values()]
        yield _line([*heads, "equal pixels", "of the float32 limit", "MiB"])
        yield "|---" * (len(heads) + 3) + "|"
        found = {(one.slower, one.faster): one for one in report.ratios if one.size == size}
        rows = [row for row in report.rows if row.size == size]
        for row in sorted(rows, key=lambda row: not row.ours):
            ratios = [found.get((baseline, row.target)) for baseline in AGAINST]
            yield _target(row, ["" if one is None else f"{one.median:.2f}" for one in ratios])
        yield ""


def _target(row: Row, ratios: list[str]) -> str:
    time = row.stages[TOTAL]
    return _line(
        [
            row.target if row.verified or not row.ours else f"{row.target} (not verified)",
            row.precision,
            f"{time.median:.1f} ({time.p5:.1f} … {time.p95:.1f})",
            *ratios,
            "" if row.agreement is None else f"{100 * row.agreement:.3f} %",
            "" if row.matmul_share is None else f"{100 * row.matmul_share:.0f} %",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}",
        ]
    )


def growth(report: dict[str, Any]) -> Iterator[str]:
    """What ``growth.py`` found: for each thing that grows, its steps, their exponents, and the
    exponent of the line through all points (least squares of the logarithms)."""
    yield _line(["grows", "milliseconds", "exponent of each step", "of all"])
    yield "|---|---|---|---|"
    for curve in report["curves"]:
        points = curve["points"]
        steps = ", ".join(f"{point['at']:,}: {point['ms']:.1f}" for point in points)
        slopes = " ".join(f"{point['slope']:.2f}" for point in points if point["slope"] is not None)
        at, ms = zip(*((point["at"], point["ms"]) for point in points), strict=True)
        whole = np.polyfit(np.log(at), np.log(ms), 1)[0]
        yield _line([UNITS[curve["against"]], steps, slopes, f"{whole:.2f}"])
    yield ""


def operators(report: dict[str, Any]) -> Iterator[str]:
    """What ``operators.py`` found: the longest six of each engine, and their shares."""
    yield _line(["engine", "precision", "ms in all operators", "of which"])
    yield "|---|---|---|---|"
    for row in report["rows"]:
        whole = sum(row["ms"].values())
        parts = [f"{kind} {100 * ms / whole:.0f} %" for kind, ms in list(row["ms"].items())[:6]]
        yield _line([row["engine"], row["precision"], f"{whole:.1f}", ", ".join(parts)])
    yield ""


def place(report: dict[str, Any]) -> Iterator[str]:
    """What ``curve.py`` found: a line for each variant."""
    engines = list(report["rows"][0]["engines"])
    heads = ["variant", "parameters", "multiply-adds", "mIoU"]
    heads += [f"{engine}, {size}" for engine in engines for size in report["frames"]]
    yield _line([*heads, *(f"mIoU on {engine}" for engine in engines)])
    yield "|---" * (len(heads) + len(engines)) + "|"
    for row in report["rows"]:
        found = [row["engines"][engine] for engine in engines]
        cells = [row["name"], f"{row['parameters'] / 1e6:.2f} M"]
        cells += [f"{row['multiply_adds'] / 1e9:.2f} G", f"{row['miou']:.2f}"]
        cells += [
            f"{one['ms'][size]['median']:.1f} ms" for one in found for size in report["frames"]
        ]
        yield _line([*cells, *(f"{one['miou']:.2f}" for one in found)])
    yield ""


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(path: Path) -> Iterator[str]:
    """Of any of these results, by what it holds."""
    found = json.loads(path.read_text("utf-8"))
    if "curves" in found:
        yield from growth(found)
    elif "ratios" in found:
        yield from speed(msgspec.convert(found, Report))
    elif "ms" in found["rows"][0]:
        yield from operators(found)
    else:
        yield from place(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSON of these")
    for path in parser.parse_args().results:
        sys.stdout.write("\n".join([*table(path), ""]))


if __name__ == "__main__":
    main()
