"""ΔIoU per class as an inline SVG: bars from a zero line, the tolerance as a band."""

from __future__ import annotations

from html import escape

from knet_export.parity.verify import VerifyReport

_MOST = 40  # classes; of more, those that changed most
_ROW, _NAME, _PLOT, _VALUE, _TOP, _TICK = 22, 150, 420, 76, 24, 30


def delta_plot(report: VerifyReport) -> str:
    """The plot of a report with labels; empty without."""
    rows = [(row.name, row.delta) for row in report.classes if row.delta is not None]
    if not rows:
        return ""
    note = ""
    if len(rows) > _MOST:
        shown = sorted(rows, key=lambda row: -abs(row[1]))[:_MOST]
        note = f"<p class='soft'>The {_MOST} of {len(rows)} classes that changed most.</p>"
        rows = [row for row in rows if row in shown]
    limit = report.tolerance.worst_class_delta_iou
    reach = 1.08 * max(limit, *(abs(delta) for _, delta in rows))
    width, height = _NAME + _PLOT + _VALUE, _TOP + _ROW * len(rows) + 6
    centre = _NAME + _PLOT / 2

    def at(points: float) -> float:
        return centre + points / reach * _PLOT / 2

    parts = [
        f"<svg viewBox='0 0 {width} {height}' role='img' "
        "aria-label='Change of IoU per class, in points'>",
        f"<rect class='band' x='{at(-limit):.1f}' y='{_TOP - 4}' "
        f"width='{at(limit) - at(-limit):.1f}' height='{height - _TOP}'/>",
    ]
    for points in (-limit, 0.0, limit):
        parts.append(
            f"<line class='{'zero' if points == 0 else 'limit'}' x1='{at(points):.1f}' "
            f"x2='{at(points):.1f}' y1='{_TOP - 4}' y2='{height - 4}'/>"
        )
        if points and at(limit) - centre < _TICK:  # it would be written over the zero
            continue
        parts.append(
            f"<text class='tick' x='{at(points):.1f}' y='{_TOP - 9}'>"
            f"{'0' if points == 0 else f'{points:+g}'}</text>"
        )
    for number, (name, delta) in enumerate(rows):
        y = _TOP + _ROW * number
        left, right = sorted((at(0), at(delta)))
        kind = "bar" if abs(delta) <= limit else "bar out"
        parts.append(
            f"<text class='name' x='{_NAME - 10}' y='{y + 15}'>{escape(_short(name))}</text>"
            f"<rect class='{kind}' x='{left:.1f}' y='{y + 4}' width='{max(right - left, 1):.1f}' "
            f"height='{_ROW - 8}' rx='2'><title>{escape(name)} {delta:+.4f}</title></rect>"
            f"<text class='value' x='{width - 4}' y='{y + 15}'>{delta:+.4f}</text>"
        )
    return "".join([*parts, "</svg>", note])


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"
