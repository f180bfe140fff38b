"""Bars as a PNG, drawn with what the base install has."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import msgspec
import numpy as np

from knet_deploy.bench.report import TOTAL, Report, counted
from knet_runtime.drawing import drawable, encode_png
from knet_runtime.types import Rgb

Colour = tuple[int, int, int]
OURS, BASELINE = (33, 113, 181), (170, 170, 170)
_UNVERIFIED, _INK, _PALE = (158, 202, 225), (40, 40, 40), (120, 120, 120)
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_MARGIN, _ROW, _PLOT, _VALUE = 24, 26, 460, 200


class Bar(msgspec.Struct, frozen=True):
    """A named length, from 0, with a whisker from ``low`` to ``high`` and words behind it."""

    name: str
    value: float
    low: float
    high: float
    words: str
    colour: Colour


def bars_of(report: Report) -> bytes:
    """PNG bytes: milliseconds of every target, for each size of frame, the fastest first."""
    groups: dict[str, list[Bar]] = {size: [] for size in report.sizes}
    for row in sorted(report.rows, key=lambda row: row.stages[TOTAL].median):
        total = row.stages[TOTAL]
        words = f"{total.median:.1f} ms, {row.frames_per_second:.1f} frames/s, {row.precision}"
        colour = (OURS if row.verified else _UNVERIFIED) if row.ours else BASELINE
        name = row.target if row.verified or not row.ours else f"{row.target} *"
        groups[row.size].append(Bar(name, total.median, total.p5, total.p95, words, colour))
    note = f"{report.machine.processor}; median, p5 to p95; * not verified here"
    return draw_bars(title_of(report), note, list(groups.items()))


def title_of(report: Report) -> str:
    """The drawing's title, which holds for class maps and for segments."""
    return f"{', '.join(report.models)}: ms a frame, {counted(report.threads, 'thread')}"


def draw_bars(title: str, note: str, groups: Sequence[tuple[str, Sequence[Bar]]]) -> bytes:
    """PNG bytes of horizontal bars; each group has its own scale."""
    names = [bar.name for _, bars in groups for bar in bars]
    left = _MARGIN + max([_text_width(name, 0.46) for name in names], default=0) + 10
    rows = sum(len(bars) + 2 for _, bars in groups)
    width = max(left + _PLOT + _VALUE, 2 * _MARGIN + _text_width(title, 0.6))
    image: Rgb = np.full((2 * _MARGIN + 40 + _ROW * rows, width, 3), 255, np.uint8)
    _put_text(image, title, (_MARGIN, _MARGIN + 12), 0.6)
    _put_text(image, note, (_MARGIN, _MARGIN + 34), 0.42, _PALE)
    top = _MARGIN + 52
    for name, bars in groups:
        _put_text(image, name, (_MARGIN, top + 16), 0.5)
        top += _ROW
        longest = max([max(bar.value, bar.high) for bar in bars], default=0) or 1
        for bar in bars:
            middle = top + _ROW // 2
            ends = [left + round(_PLOT * value / longest) for value in (bar.low, bar.high)]
            end = left + max(round(_PLOT * bar.value / longest), 1)
            _put_text(image, bar.name, (left - 10 - _text_width(bar.name, 0.46), middle + 5), 0.46)
            cv2.rectangle(image, (left, middle - 8), (end, middle + 8), bar.colour, -1)
            cv2.line(image, (ends[0], middle), (ends[1], middle), _INK, 1)
            for edge in ends:
                cv2.line(image, (edge, middle - 4), (edge, middle + 4), _INK, 1)
            _put_text(image, bar.words, (max(end, ends[1]) + 8, middle + 5), 0.44)
            top += _ROW
        top += _ROW
    return encode_png(image)


def _text_width(text: str, scale: float) -> int:
    """Of what ``_put_text`` writes, in pixels."""
    return int(cv2.getTextSize(drawable(text), _FONT, scale, 1)[0][0])


def _put_text(image: Rgb, text: str, at: tuple[int, int], scale: float, ink: Colour = _INK) -> None:
    """Write ``text`` with its lower left corner ``at`` (x, y)."""
    cv2.putText(image, drawable(text), at, _FONT, scale, ink, 1, cv2.LINE_AA)
