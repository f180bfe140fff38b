"""A verify report as a page: one HTML file that carries its images and needs no network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import repeat
from pathlib import Path
from string import Template

import numpy as np
from numpy.typing import NDArray

from knet_export.verify.measure import stage_limit
from knet_export.verify.verify import Compared, VerifyReport
from knet_runtime.atomic import make_folder, output_error, write_atomic, write_json
from knet_runtime.labels import LabelMap
from knet_runtime.markup import card, facts, legend, swatch
from knet_runtime.types import Rgb
from knet_train.page import OPACITY, STYLE, in_red, pictures, shrunk, small_marks
from knet_train.segment_pairs import MATCHED, differing, numbered_alike

PAGE_NAME, JSON_NAME = "report.html", "report.json"
_TEMPLATE = Path(__file__).with_name("report.html")
_OTHER_CHECKPOINT = (
    "<p class='note'>The bundle was not exported from the reference's checkpoint: "
    "this compares two models.</p>"
)
_MAX_CLASSES = 40  # in the plot; of more, those that changed most
_ROW, _NAME, _PLOT, _VALUE, _TOP, _TICK = 22, 150, 420, 76, 24, 30  # the plot's pixels
_MAX_IMAGES = 6


@dataclass(frozen=True, eq=False)
class _Kept:
    name: str
    index: int
    agreement: float
    image: Rgb
    reference: Rgb  # the overlay
    measured: Rgb | None
    different: NDArray[np.bool_]
    classes: frozenset[int]  # those that are drawn
    same: float | None  # of a result with segments: the part of the image that is not red


class WorstImages:
    """The images that agree least, made small."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._kept: list[_Kept] = []

    def add(self, compared: Compared) -> None:
        """Hold on to an image if it is among the worst so far."""
        if len(self._kept) == _MAX_IMAGES and compared.agreement >= self._kept[-1].agreement:
            return
        different = np.ones(compared.image.shape[:2], np.bool_)
        results, measured = [compared.reference], compared.measured
        if measured is not None:
            different = differing(compared.reference, measured)
            if measured.task != "semantic":
                measured = numbered_alike(compared.reference, measured)
            results.append(measured)
        small = shrunk(compared.image)
        kept = _Kept(
            name=self._names[compared.index],
            index=compared.index,
            agreement=compared.agreement,
            image=small,
            reference=compared.reference.overlay(small, OPACITY),
            measured=None if measured is None else measured.overlay(small, OPACITY),
            different=small_marks(different, small.shape[:2]),
            classes=frozenset(
                int(one) for result in results for one in np.unique(result.class_map)
            ),
            same=None if compared.reference.task == "semantic" else 1 - float(different.mean()),
        )
        self._kept = sorted([*self._kept, kept], key=lambda one: one.agreement)[:_MAX_IMAGES]

    @property
    def first(self) -> int:
        """The index of the worst image."""
        return self._kept[0].index

    def legend(self, labels: LabelMap) -> str:
        """The colours of the classes that are drawn, as HTML."""
        return legend(labels, {one for kept in self._kept for one in kept.classes})

    def figures(self) -> str:
        """Input, reference, measured and difference of each image, as HTML."""
        return "\n".join(_figure(kept) for kept in self._kept)


def write_page(report: VerifyReport, labels: LabelMap, worst: WorstImages, folder: Path) -> None:
    """Write ``report.json`` and ``report.html`` into ``folder``, which is made if it is missing;
    each appears whole or not at all. Raises OutputError."""
    try:
        make_folder(folder)
        write_json(folder / JSON_NAME, report)
        write_atomic(folder / PAGE_NAME, render(report, labels, worst).encode())
    except OSError as error:
        raise output_error(folder, error) from error


def render(report: VerifyReport, labels: LabelMap, worst: WorstImages) -> str:
    """The whole page as HTML."""
    about = "".join(
        f"<dt>{name}</dt><dd>{escape(text)}</dd>\n" for name, text in _about(report).items()
    )
    return Template(_TEMPLATE.read_text("utf-8")).substitute(
        style=STYLE,
        verdict="pass" if report.passed else "fail",
        title="Passed" if report.passed else "Failed",
        summary=escape(_summary(report)),
        failures="".join(f"<li>{escape(failure)}</li>" for failure in report.failures),
        model=escape(report.model_id),
        engine=escape(report.engine),
        about=about,
        same="" if report.same_checkpoint else _OTHER_CHECKPOINT,
        measures=_measures_table(report),
        margins=_table(("margin", "of all pixels", "equal"), _margins(report)),
        plot=delta_plot(report),
        classes=_classes_table(report, map(swatch, labels.palette)),
        labelled="" if report.classes else "hidden",
        score=score_of(report),
        lead="the size of the reference's mask logit"
        if report.metric != "mIoU"
        else "by how much the reference's best class leads the second, in logits",
        red="another class."
        if report.metric == "mIoU"
        else "another segment, or none. An object that both have has the same number and shade.",
        legend=worst.legend(labels),
        images=worst.figures(),
    )


def report_card(report: VerifyReport) -> str:
    """The verdict and the measures as HTML for a notebook, without images."""
    failures = "".join(f"<li>{escape(failure)}</li>" for failure in report.failures)
    title = f"{'Passed' if report.passed else 'Failed'}: {report.model_id} on {report.engine}"
    body = (
        f"<p>{escape(_summary(report))}</p><ul>{failures}</ul>"
        f"{'' if report.same_checkpoint else _OTHER_CHECKPOINT}"
        f"{facts(_about(report).items())}{_measures_table(report)}"
    )
    if report.classes:
        body += (
            f"<details><summary>{score_of(report)} of all classes</summary>"
            f"{_classes_table(report, repeat(''))}</details>"
        )
    return card(title, body, "good" if report.passed else "bad")


def _about(report: VerifyReport) -> dict[str, str]:
    """What was compared."""
    height, width = report.size
    return {
        "bundle": f"{report.model_id}, {report.precision} {report.kind} graph, {height}×{width}",
        "engine": f"{report.engine} on {report.device}",
        "reference": report.reference,
        "images": f"{report.images} images of {report.data}",
    }


def _summary(report: VerifyReport) -> str:
    if report.passed:
        return "Everything that was measured is inside the tolerance."
    count = len(report.failures)
    return f"{count} of the measures {'is' if count == 1 else 'are'} outside the tolerance."


def _measures_table(report: VerifyReport) -> str:
    return _table(("", "measured", "tolerance", ""), _measures(report))


def _classes_table(report: VerifyReport, marks: Iterable[str]) -> str:
    """Both sides' scores of every class, whose name has its one of ``marks`` before it."""
    return _table(("class", "reference, %", "bundle, %", "Δ, points"), _classes(report, marks))


def _table(head: Sequence[str], rows: Iterable[str]) -> str:
    cells = "".join(f"<th>{text}</th>" for text in head)
    body = "\n".join(rows)
    return f"<table>\n<thead><tr>{cells}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _measures(report: VerifyReport) -> Iterator[str]:
    """A row of the table for everything that was measured."""
    outside = report.tolerance.failures(**report.measures())
    pixels = "all pixels" if report.metric == "mIoU" else "all pixels of all kernels' masks"
    interval = ""
    if report.delta_miou_interval is not None:
        low, high = report.delta_miou_interval
        interval = (
            f"{report.miou_reference:.3f} → {report.miou_measured:.3f} %; "
            f"95 % interval {low:+.4f} … {high:+.4f}"
        )
    for name, what, detail in (
        ("delta_miou", f"Δ{report.metric}", interval),
        ("worst_class_delta_iou", f"Worst class, Δ{score_of(report)}", str(report.worst_class)),
        ("agreement", "Pixel agreement", pixels),
        ("agreement_confident", "Agreement where confident", "the reference leads by a logit"),
        ("max_logit_diff", "Largest logit difference", "share of the largest logit"),
        ("mean_logit_diff", "Mean logit difference", "share of the largest logit"),
    ):
        value, limit = getattr(report, name), getattr(report.tolerance, name)
        if value is None:
            continue
        if "delta" in name:
            cells = f"{value:+.4f} points", f"± {limit:g}"
        elif "agreement" in name:
            cells = f"{100 * value:.4f} %", f"≥ {100 * limit:g} %"
        else:
            cells = f"{value:.2e}", f"≤ {limit:g}"
        mark = "class='bad'>✗ outside" if name in outside else "class='good'>✓ inside"
        yield (
            f"<tr><th scope='row'>{escape(what)}<small>{escape(detail)}</small></th>"
            f"<td>{cells[0]}</td><td>{cells[1]}</td><td {mark}</td></tr>"
        )

    if report.matched is not None:
        yield (
            "<tr><th scope='row'>Matched segments<small>of both sides: of the same class, with an "
            f"IoU of at least {MATCHED:g}</small></th><td>{100 * report.matched:.2f} %</td>"
            "<td></td><td></td></tr>"
        )
    if report.stages is not None:
        worst, limit = max(report.stages), stage_limit(report.precision)
        mark = "class='bad'>✗ outside" if worst > limit else "class='good'>✓ inside"
        yield (
            "<tr><th scope='row'>Stages, largest logit difference<small>each given PyTorch's hard "
            f"masks</small></th><td>{worst:.2e}</td><td>≤ {limit:g}</td><td {mark}</td></tr>"
        )


def score_of(report: VerifyReport) -> str:
    """The score of one class."""
    return "IoU" if report.metric == "mIoU" else report.metric


def _margins(report: VerifyReport) -> Iterator[str]:
    for row in report.margins:
        upper = "and more" if row.below is None else f"… {row.below:g}"
        agreed = "–" if row.agreement is None else f"{100 * row.agreement:.4f} %"
        yield (
            f"<tr><th scope='row'>{row.above:g} {upper}</th>"
            f"<td>{100 * row.share:.2f} %</td><td>{agreed}</td></tr>"
        )


def _classes(report: VerifyReport, marks: Iterable[str]) -> Iterator[str]:
    for row, mark in zip(report.classes, marks, strict=False):
        before, after = (
            "–" if value is None else f"{value:.2f}" for value in (row.reference, row.measured)
        )
        delta = "–" if row.delta is None else f"{row.delta:+.4f}"
        yield (
            f"<tr><th scope='row'>{mark}{escape(row.name)}</th>"
            f"<td>{before}</td><td>{after}</td><td>{delta}</td></tr>"
        )


def delta_plot(report: VerifyReport) -> str:
    """ΔIoU per class as an inline SVG, bars from a zero line and the tolerance as a band; empty for
    a report without labels."""
    rows = [(row.name, row.delta) for row in report.classes if row.delta is not None]
    if not rows:
        return ""
    note = ""
    if len(rows) > _MAX_CLASSES:
        shown = sorted(rows, key=lambda row: -abs(row[1]))[:_MAX_CLASSES]
        note = f"<p class='soft'>The {_MAX_CLASSES} of {len(rows)} classes that changed most.</p>"
        rows = [row for row in rows if row in shown]
    limit = report.tolerance.worst_class_delta_iou
    reach = 1.08 * max(limit, *(abs(delta) for _, delta in rows))
    width, height = _NAME + _PLOT + _VALUE, _TOP + _ROW * len(rows) + 6
    centre = _NAME + _PLOT / 2

    def at(points: float) -> float:
        return centre + points / reach * _PLOT / 2

    parts = [
        f"<svg viewBox='0 0 {width} {height}' role='img' "
        "aria-label='Change of " + score_of(report) + " per class, in points'>",
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
        outside = report.tolerance.failures(worst_class_delta_iou=delta)
        kind = "bar out" if outside else "bar"
        parts.append(
            f"<text class='name' x='{_NAME - 10}' y='{y + 15}'>{escape(_short(name))}</text>"
            f"<rect class='{kind}' x='{left:.1f}' y='{y + 4}' width='{max(right - left, 1):.1f}' "
            f"height='{_ROW - 8}' rx='2'><title>{escape(name)} {delta:+.4f}</title></rect>"
            f"<text class='value' x='{width - 4}' y='{y + 15}'>{delta:+.4f}</text>"
        )
    return "".join([*parts, "</svg>", note])


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"


def _figure(kept: _Kept) -> str:
    caption = f"{kept.name}: {100 * kept.agreement:.4f} % of the pixels equal"
    if kept.same is not None:
        caption = (
            f"{kept.name}: {100 * kept.agreement:.4f} % of the pixels of all kernels' masks equal, "
            f"{100 * kept.same:.2f} % of the image the same segment"
        )
    if kept.measured is None:
        caption += " (its logits hold NaN or infinity)"
    cells = {
        "input": kept.image,
        "reference": kept.reference,
        "bundle": kept.image // 4 if kept.measured is None else kept.measured,
        "difference": in_red(kept.image, kept.different),
    }
    return pictures(kept.name, caption, cells, objects=kept.same is not None)
