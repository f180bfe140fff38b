"""A verify report as a page: one HTML file that carries its pictures and needs no network.

ΔIoU per class as an inline SVG: bars from a zero line, the tolerance as a band.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_export.verify.verify import Compared, VerifyReport
from knet_runtime.atomic import make_folder, output_error, write_atomic
from knet_runtime.drawing import blend
from knet_runtime.labels import LabelMap
from knet_runtime.types import ClassMap

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


PAGE_NAME, JSON_NAME = "report.html", "report.json"
_KEPT = 6
_LONGEST_SIDE = 480  # of a picture on the page
_QUALITY = 82
_RED = np.array((255, 59, 48), np.float64)
_TEMPLATE = Path(__file__).with_name("report.html")


@dataclass(frozen=True, eq=False)
class _Kept:
    name: str
    index: int
    agreement: float
    image: NDArray[np.uint8]
    reference: ClassMap
    artefact: ClassMap | None
    different: NDArray[np.bool_]


class WorstPictures:
    """The pictures that agree least, made small."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._kept: list[_Kept] = []

    def keep(self, compared: Compared) -> None:
        """Hold on to a picture if it is among the worst so far."""
        if len(self._kept) == _KEPT and compared.agreement >= self._kept[-1].agreement:
            return
        height, width = compared.image.shape[:2]
        scale = min(1.0, _LONGEST_SIDE / max(height, width))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        different = np.ones((height, width), np.uint8)
        if compared.artefact is not None:
            different = (compared.reference != compared.artefact).astype(np.uint8)
        small = cv2.resize(compared.image, size, interpolation=cv2.INTER_AREA)
        kept = _Kept(
            name=self._names[compared.index],
            index=compared.index,
            agreement=compared.agreement,
            image=np.asarray(small, np.uint8),
            reference=_nearest(compared.reference, size),
            artefact=None if compared.artefact is None else _nearest(compared.artefact, size),
            different=_marked(different, size),
        )
        self._kept = sorted([*self._kept, kept], key=lambda one: one.agreement)[:_KEPT]

    @property
    def first(self) -> int:
        """The index of the worst picture."""
        return self._kept[0].index

    def figures(self, labels: LabelMap) -> str:
        """Input, reference, artefact and difference side by side, a row a picture, as HTML."""
        return "\n".join(_figure(kept, labels) for kept in self._kept)


def write_page(report: VerifyReport, labels: LabelMap, worst: WorstPictures, folder: Path) -> None:
    """Write ``report.json`` and ``report.html`` into ``folder``, which is made if it is missing;
    each appears whole or not at all. Raises OutputError."""
    try:
        make_folder(folder)
        write_atomic(
            folder / JSON_NAME, msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"
        )
        write_atomic(folder / PAGE_NAME, render(report, labels, worst).encode())
    except OSError as error:
        raise output_error(folder, error) from error


def render(report: VerifyReport, labels: LabelMap, worst: WorstPictures) -> str:
    """The whole page as HTML."""
    height, width = report.size
    return Template(_TEMPLATE.read_text("utf-8")).substitute(
        verdict="pass" if report.passed else "fail",
        title="Passed" if report.passed else "Failed",
        summary=escape(_summary(report)),
        failures="".join(f"<li>{escape(failure)}</li>" for failure in report.failures),
        model=escape(report.model_id),
        graph=escape(f"{report.precision} {report.kind} graph, {height}×{width}"),
        engine=escape(report.engine),
        device=escape(report.device),
        reference=escape(report.reference),
        same="" if report.same_checkpoint else _OTHER_CHECKPOINT,
        data=escape(f"{report.images} pictures of {report.data}"),
        measures="\n".join(_measures(report)),
        margins="\n".join(_margins(report)),
        plot=delta_plot(report),
        classes="\n".join(_classes(report, labels)),
        labelled="" if report.classes else "hidden",
        pictures=worst.figures(labels),
    )


_OTHER_CHECKPOINT = (
    "<p class='note'>The bundle was not exported from the reference's checkpoint: "
    "this compares two models.</p>"
)


def _summary(report: VerifyReport) -> str:
    if report.passed:
        return "Everything that was measured is inside the tolerance."
    count = len(report.failures)
    return f"{count} of the measures {'is' if count == 1 else 'are'} outside the tolerance."


def _measures(report: VerifyReport) -> list[str]:
    limits, rows = report.tolerance, []
    if report.delta_miou is not None and report.delta_miou_interval is not None:
        low, high = report.delta_miou_interval
        rows.append(
            _measure(
                "ΔmIoU",
                f"{report.delta_miou:+.4f} points",
                f"{report.miou_reference:.3f} → {report.miou_artefact:.3f} %; "
                f"95 % interval {low:+.4f} … {high:+.4f}",
                f"± {limits.delta_miou:g}",
                abs(report.delta_miou) <= limits.delta_miou,
            )
        )
    if report.worst_class_delta_iou is not None:
        rows.append(
            _measure(
                "Worst class, ΔIoU",
                f"{report.worst_class_delta_iou:+.4f} points",
                str(report.worst_class),
                f"± {limits.worst_class_delta_iou:g}",
                abs(report.worst_class_delta_iou) <= limits.worst_class_delta_iou,
            )
        )
    rows.append(
        _measure(
            "Pixel agreement",
            f"{100 * report.agreement:.4f} %",
            "all pixels",
            f"≥ {100 * limits.agreement:g} %",
            report.agreement >= limits.agreement,
        )
    )
    rows.append(
        _measure(
            "Agreement where confident",
            f"{100 * report.agreement_confident:.4f} %",
            "the reference leads by a logit",
            f"≥ {100 * limits.agreement_confident:g} %",
            report.agreement_confident >= limits.agreement_confident,
        )
    )
    for what, value, most in (
        ("Largest logit difference", report.max_logit_diff, limits.max_logit_diff),
        ("Mean logit difference", report.mean_logit_diff, limits.mean_logit_diff),
    ):
        if value is not None:
            share = "share of the largest logit"
            rows.append(_measure(what, f"{value:.2e}", share, f"≤ {most:g}", value <= most))
    return rows


def _measure(what: str, value: str, detail: str, limit: str, inside: bool) -> str:
    mark = "<td class='good'>✓ inside</td>" if inside else "<td class='bad'>✗ outside</td>"
    return (
        f"<tr><th scope='row'>{escape(what)}<small>{escape(detail)}</small></th>"
        f"<td>{escape(value)}</td><td>{escape(limit)}</td>{mark}</tr>"
    )


def _margins(report: VerifyReport) -> list[str]:
    rows = []
    for row in report.margins:
        upper = "and more" if row.below is None else f"… {row.below:g}"
        agreed = "–" if row.agreement is None else f"{100 * row.agreement:.4f} %"
        rows.append(
            f"<tr><th scope='row'>{row.least:g} {upper}</th>"
            f"<td>{100 * row.share:.2f} %</td><td>{agreed}</td></tr>"
        )
    return rows


def _classes(report: VerifyReport, labels: LabelMap) -> list[str]:
    rows = []
    for row, colour in zip(report.classes, labels.palette, strict=False):
        before, after = (
            "–" if value is None else f"{value:.2f}" for value in (row.reference, row.artefact)
        )
        delta = "–" if row.delta is None else f"{row.delta:+.4f}"
        rows.append(
            f"<tr><th scope='row'><i style='background:rgb{colour}'></i>{escape(row.name)}</th>"
            f"<td>{before}</td><td>{after}</td><td>{delta}</td></tr>"
        )
    return rows


def _figure(kept: _Kept, labels: LabelMap) -> str:
    reference = blend(kept.image, kept.reference, labels, 0.65)
    artefact = kept.image // 4
    if kept.artefact is not None:
        artefact = blend(kept.image, kept.artefact, labels, 0.65)
    grey = np.repeat(kept.image.mean(2, keepdims=True) * 0.45, 3, 2)
    difference = np.where(kept.different[..., None], _RED, grey).astype(np.uint8)
    name = escape(kept.name)
    cells = "".join(
        f'<div><img alt="{what} of {name}" src="{_data_uri(image)}"><span>{what}</span></div>'
        for what, image in (
            ("input", kept.image),
            ("reference", reference),
            ("artefact", artefact),
            ("difference", difference),
        )
    )
    caption = f"{name}: {100 * kept.agreement:.4f} % of the pixels equal"
    if kept.artefact is None:
        caption += " (its logits hold NaN or infinity)"
    return f"<figure><figcaption>{caption}</figcaption>{cells}</figure>"


def _data_uri(image: NDArray[np.uint8]) -> str:
    bgr = np.ascontiguousarray(image[..., ::-1])
    _, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    return f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}"


def _marked(different: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels of a smaller picture in which anything differs, so that a lone one is seen too."""
    shares = cv2.resize(different.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    marks = cv2.dilate((shares > 0).astype(np.uint8), np.ones((3, 3), np.uint8))
    return np.asarray(marks, np.uint8) > 0


def _nearest(classes: ClassMap, size: tuple[int, int]) -> ClassMap:
    small = cv2.resize(classes, size, interpolation=cv2.INTER_NEAREST_EXACT)
    if classes.dtype == np.uint8:
        return np.asarray(small, np.uint8)
    return np.asarray(small, np.uint16)
