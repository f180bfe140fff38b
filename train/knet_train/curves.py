"""Curves as inline SVG: a chart with axes, and a small line for a row of a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

Curve = Sequence[tuple[float, float]]
"""Places (x, y), with rising x."""

_WIDTH, _HEIGHT = 340, 180
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 16, 12, 26
_SMALL = (110, 22)  # width, height


def chart(title: str, curve: Curve, end: float, best: tuple[float, float] | None = None) -> str:
    """A curve from x = 0 to ``end`` over y = 0, with a dot at ``best``; a curve of few places shows
    them as dots too."""
    highest = max((y for _, y in curve), default=0.0) or 1.0
    ticks = rounded_ticks(highest)
    top = max(highest, ticks[-1]) * 1.02
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return _LEFT + x / end * (right - _LEFT), bottom - y / top * (bottom - _TOP)

    parts = [f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='{escape(title)}'>"]
    for value in ticks:
        _, y = at(0, value)
        parts.append(f"<line class='grid' x1='{_LEFT}' x2='{right}' y1='{y:.1f}' y2='{y:.1f}'/>")
        parts.append(f"<text class='name' x='{_LEFT - 7}' y='{y + 4:.1f}'>{_plain(value)}</text>")
    for value in rounded_ticks(end):
        x, _ = at(value, 0)
        parts.append(f"<text class='tick' x='{x:.1f}' y='{_HEIGHT - 8}'>{value:,g}</text>")
    places = [at(x, y) for x, y in curve]
    parts.append(_line(places))
    if len(places) <= 20:
        parts += [f"<circle class='dot' cx='{x:.1f}' cy='{y:.1f}' r='2.5'/>" for x, y in places]
    if best is not None:
        x, y = at(*best)
        parts.append(
            f"<circle class='best' cx='{x:.1f}' cy='{y:.1f}' r='5'>"
            f"<title>{best[1]:.2f} at step {best[0]:,g}</title></circle>"
        )
    return "".join([*parts, "</svg>"])


def small_line(curve: Curve, end: float) -> str:
    """The same from y = 0 to 1 without axes, for a table."""
    width, height = _SMALL
    places = [(x / end * (width - 6) + 3, height - 3 - y * (height - 6)) for x, y in curve]
    dot = ""
    if places:
        dot = f"<circle class='dot' cx='{places[-1][0]:.1f}' cy='{places[-1][1]:.1f}' r='2.2'/>"
    return (
        f"<svg class='small' viewBox='0 0 {width} {height}' aria-hidden='true'>"
        f"<line class='grid' x1='3' x2='{width - 3}' y1='{height - 3}' y2='{height - 3}'/>"
        f"{_line(places)}{dot}</svg>"
    )


def rounded_ticks(highest: float) -> list[float]:
    """Three to six round numbers from 0 up to ``highest``, which is above 0.

    >>> rounded_ticks(2200)
    [0, 500, 1000, 1500, 2000]
    """
    rough = highest / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(one for one in (1, 2, 2.5, 5, 10) if one * power >= rough * 0.999) * power
    count = math.floor(highest / step * 1.000001)
    return [float(f"{number * step:.6g}") for number in range(count + 1)]


def _plain(value: float) -> str:
    """8e-4 of 0.0008."""
    if value >= 0.01 or value == 0:
        return f"{value:g}"
    return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")


def _line(places: Sequence[tuple[float, float]]) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f"<polyline class='curve' points='{points}'/>"
