"""Bars and curves as PNGs, drawn with what the base install has."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import cv2
import msgspec
import numpy as np

from knet_deploy.bench.report import Report
from knet_runtime.types import Rgb

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_INK, _PALE, _LINE = (40, 40, 40), (120, 120, 120), (225, 225, 225)
_OURS, _OURS_UNPROVEN, _PEER = (33, 113, 181), (158, 202, 225), (170, 170, 170)
_SERIES = ((33, 113, 181), (217, 95, 2), (35, 139, 69), (117, 107, 177), (120, 120, 120))
_MARGIN, _ROW, _PLOT, _VALUE = 24, 26, 460, 200
_CURVE = (300, 460)  # height and width of a panel of curves

Colour = tuple[int, int, int]


class Bar(msgspec.Struct, frozen=True):
    """A named length, from 0, with a whisker from ``low`` to ``high`` and words behind it."""

    name: str
    value: float
    low: float
    high: float
    words: str
    colour: Colour = _OURS


def bars_of(report: Report) -> bytes:
    """PNG bytes: milliseconds of every contestant, for each size of frame, the fastest first."""
    groups = []
    for task in dict.fromkeys(row.task for row in report.rows):
        bars = []
        for row in sorted(report.rows, key=lambda row: row.stages["total"].median):
            if row.task != task:
                continue
            total = row.stages["total"]
            words = f"{total.median:.1f} ms, {row.frames_per_second:.1f} frames/s, {row.precision}"
            colour = (_OURS if row.verified else _OURS_UNPROVEN) if row.ours else _PEER
            name = row.contestant if row.verified or not row.ours else f"{row.contestant} *"
            bars.append(Bar(name, total.median, total.p5, total.p95, words, colour))
        groups.append((task, bars))
    models = ", ".join(report.models)
    title = f"{models}: ms from frame to class map, {report.threads} threads"
    note = f"{report.machine.processor}; median, p5 to p95; * not verified here"
    return draw_bars(title, note, groups)


def draw_bars(title: str, note: str, groups: Sequence[tuple[str, Sequence[Bar]]]) -> bytes:
    """PNG bytes of horizontal bars; each group has its own scale."""
    names = [bar.name for _, bars in groups for bar in bars]
    left = _MARGIN + max([text_width(name, 0.46) for name in names], default=0) + 10
    rows = sum(len(bars) + 2 for _, bars in groups)
    wide = max(left + _PLOT + _VALUE, 2 * _MARGIN + text_width(title, 0.6))
    picture: Rgb = np.full((2 * _MARGIN + 40 + _ROW * rows, wide, 3), 255, np.uint8)
    put_text(picture, title, (_MARGIN, _MARGIN + 12), 0.6, _INK)
    put_text(picture, note, (_MARGIN, _MARGIN + 34), 0.42)
    top = _MARGIN + 52
    for name, bars in groups:
        put_text(picture, name, (_MARGIN, top + 16), 0.5, _INK)
        top += _ROW
        longest = max([max(bar.value, bar.high) for bar in bars], default=0) or 1
        for bar in bars:
            middle = top + _ROW // 2
            ends = [left + round(_PLOT * value / longest) for value in (bar.low, bar.high)]
            end = left + max(round(_PLOT * bar.value / longest), 1)
            put_text(
                picture, bar.name, (left - 10 - text_width(bar.name, 0.46), middle + 5), 0.46, _INK
            )
            cv2.rectangle(picture, (left, middle - 8), (end, middle + 8), bar.colour, -1)
            cv2.line(picture, (ends[0], middle), (ends[1], middle), _INK, 1)
            for edge in ends:
                cv2.line(picture, (edge, middle - 4), (edge, middle + 4), _INK, 1)
            put_text(picture, bar.words, (max(end, ends[1]) + 8, middle + 5), 0.44, _INK)
            top += _ROW
        top += _ROW
    return png_bytes(picture)


class Curve(msgspec.Struct, frozen=True):
    """A line through points (x, y), both above 0."""

    name: str
    points: tuple[tuple[float, float], ...]


def draw_curves(title: str, panels: Sequence[tuple[str, str, str, Sequence[Curve]]]) -> bytes:
    """PNG bytes of panels (name, what x is, what y is, curves), both axes logarithmic: what grows
    linearly runs beside the grey diagonal."""
    height, width = _CURVE
    across = min(len(panels), 2)
    down = -(-len(panels) // 2)
    cell = (height + 90, width + 130)
    picture: Rgb = np.full((70 + cell[0] * down, _MARGIN + cell[1] * across, 3), 255, np.uint8)
    put_text(picture, title, (_MARGIN, _MARGIN + 12), 0.6, _INK)
    for number, panel in enumerate(panels):
        top, left = 70 + cell[0] * (number // 2), _MARGIN + 60 + cell[1] * (number % 2)
        _panel(picture, (top, left), *panel)
    return png_bytes(picture)


def _panel(
    picture: Rgb, at: tuple[int, int], name: str, across: str, up: str, curves: Sequence[Curve]
) -> None:
    top, left = at
    height, width = _CURVE
    points = [point for curve in curves for point in curve.points]
    lows = [min(axis) for axis in zip(*points, strict=True)]
    highs = [max(axis) for axis in zip(*points, strict=True)]
    spans = [np.log(max(high / low, 1.01)) for low, high in zip(lows, highs, strict=True)]

    def place(x: float, y: float) -> tuple[int, int]:
        right = np.log(x / lows[0]) / spans[0]
        above = np.log(y / lows[1]) / spans[1]
        return left + round(float(right) * width), top + height - round(float(above) * height)

    cv2.rectangle(picture, (left, top), (left + width, top + height), _LINE, 1)
    area = picture[top : top + height + 1, left : left + width + 1]
    start = place(lows[0], lows[1])
    end = place(lows[0] * np.exp(spans[0]), lows[1] * np.exp(spans[0]))
    shifted = [(x - left, y - top) for x, y in (start, end)]
    cv2.line(area, shifted[0], shifted[1], _LINE, 1, cv2.LINE_AA)
    for number, curve in enumerate(curves):
        colour = _SERIES[number % len(_SERIES)]
        places = [place(x, y) for x, y in curve.points]
        for one, other in pairwise(places):
            cv2.line(picture, one, other, colour, 2, cv2.LINE_AA)
        for one in places:
            cv2.circle(picture, one, 4, colour, -1, cv2.LINE_AA)
        put_text(picture, curve.name, (left + 10, top + 20 + 18 * number), 0.44, colour)
    free = left - width
    for x in sorted({x for x, _ in points}):
        words = _short(x)
        begin = place(x, lows[1])[0] - text_width(words, 0.36) // 2
        if begin > free:  # not over its neighbour's
            put_text(picture, words, (begin, top + height + 16), 0.36)
            free = begin + text_width(words, 0.36) + 6
    for y in (lows[1], highs[1]):
        words = _short(y)
        put_text(picture, words, (left - 8 - text_width(words, 0.4), place(lows[0], y)[1] + 4), 0.4)
    words = f"{name}: {up} against {across}, logarithmic; grey: linear"
    put_text(picture, words, (left, top + height + 40), 0.46, _INK)


def png_bytes(picture: Rgb) -> bytes:
    """An RGB picture as a PNG file."""
    _, data = cv2.imencode(".png", np.ascontiguousarray(picture[..., ::-1]))
    return data.tobytes()


def _short(value: float) -> str:
    """Three digits: 7.25, 262 k, 2.1 M."""
    if value >= 1e6:
        return f"{value / 1e6:.3g} M"
    if value >= 1e4:
        return f"{value / 1e3:.3g} k"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _plain(text: str) -> str:
    """OpenCV's letters are ASCII."""
    return text.replace("×", "x").encode("ascii", "replace").decode()


def text_width(text: str, scale: float) -> int:
    """Of what ``put_text`` writes, in pixels."""
    return int(cv2.getTextSize(_plain(text), _FONT, scale, 1)[0][0])


def put_text(
    picture: Rgb, text: str, at: tuple[int, int], scale: float, ink: Colour = _PALE
) -> None:
    """Write ``text`` with its lower left corner ``at`` (x, y)."""
    cv2.putText(picture, _plain(text), at, _FONT, scale, ink, 1, cv2.LINE_AA)
