"""mIoU against milliseconds as a picture: a number per variant, a colour per family."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from knet_deploy.bench.plot import Rgb, png_bytes, put_text, text_width

Place = Callable[[float, float], tuple[int, int]]

_INK, _LINE = (40, 40, 40), (228, 228, 228)
_FAMILIES = {"knet": (33, 113, 181), "fpn": (217, 95, 14), "lr-aspp": (35, 139, 69)}
_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 1080, 600, 70, 60, 290, 60
_RADIUS = 11
_KINDS = ("filled: ONNX Runtime, fp32", "ring: OpenVINO, bf16")


def draw_curve(report: dict[str, Any]) -> bytes:
    """PNG bytes of ``curve.py``'s report: the variants of equal budget, at the first frame size."""
    size = report["frames"][0]
    steps = min(row["steps"] for row in report["rows"])
    rows = [row for row in report["rows"] if row["steps"] == steps]
    points = [
        (found["ms"][size]["median"], found["miou"], number, row, engine)
        for number, row in enumerate(rows, 1)
        for engine, found in row["engines"].items()
    ]
    picture = np.full((_HEIGHT, _WIDTH, 3), 255, np.uint8)
    place = _axes(picture, [point[0] for point in points], [point[1] for point in points])
    for milliseconds, miou, number, row, engine in points:
        at = place(milliseconds, miou)
        _point(picture, at, number, _FAMILIES[row["family"]], filled=engine == "onnxruntime-cpu")
    put_text(
        picture, f"CamVid val, every variant trained for {steps} steps", (_LEFT, 34), 0.6, _INK
    )
    put_text(
        picture, f"ms from a decoded {size} frame to its class map", (_LEFT, _HEIGHT - 14), 0.46
    )
    put_text(picture, "mIoU", (_LEFT - 50, _TOP - 8), 0.46)
    _legend(picture, rows)
    return png_bytes(picture)


def _axes(picture: Rgb, x: list[float], y: list[float]) -> Place:
    """Draw the grid; where a value stands in the picture."""
    columns, rows = _ticks(min(x), max(x)), _ticks(min(y), max(y))
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def place(milliseconds: float, miou: float) -> tuple[int, int]:
        across = (milliseconds - columns[0]) / (columns[-1] - columns[0])
        up = (miou - rows[0]) / (rows[-1] - rows[0])
        return round(_LEFT + across * width), round(_TOP + (1 - up) * height)

    for value in columns:
        at = place(value, rows[0])
        cv2.line(picture, at, (at[0], _TOP), _LINE, 1)
        put_text(picture, f"{value:g}", (at[0] - 8, at[1] + 20), 0.44)
    for value in rows:
        at = place(columns[0], value)
        cv2.line(picture, at, (_LEFT + width, at[1]), _LINE, 1)
        put_text(picture, f"{value:g}", (at[0] - 40, at[1] + 5), 0.44)
    return place


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round values, from below ``low`` to above ``high``."""
    span = max(high - low, 1e-6)
    power = 10.0 ** math.floor(math.log10(span))
    step = next(power * part for part in (0.2, 0.5, 1, 2) if span <= 6 * power * part)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * index, 6) for index in range(first, max(last, first + 1) + 1)]


def _point(
    picture: Rgb, at: tuple[int, int], number: int, colour: tuple[int, int, int], *, filled: bool
) -> None:
    cv2.circle(picture, at, _RADIUS, (255, 255, 255), -1, cv2.LINE_AA)
    cv2.circle(picture, at, _RADIUS, colour, -1 if filled else 2, cv2.LINE_AA)
    text = str(number)
    ink = (255, 255, 255) if filled else colour
    put_text(picture, text, (at[0] - text_width(text, 0.4) // 2, at[1] + 4), 0.4, ink)


def _legend(picture: Rgb, rows: list[dict[str, Any]]) -> None:
    left, line = _WIDTH - _RIGHT + 30, 27
    for number, row in enumerate(rows, 1):
        at = (left, _TOP + line * (number - 1) + 10)
        _point(picture, at, number, _FAMILIES[row["family"]], filled=True)
        put_text(picture, row["name"], (left + 20, at[1] + 5), 0.46, _INK)
    for index, words in enumerate(_KINDS):
        put_text(picture, words, (left - 10, _HEIGHT - 44 + 20 * index), 0.42)
