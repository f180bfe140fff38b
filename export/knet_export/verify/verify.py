"""Parity as a gate: the artefact on its engine against a reference, on pictures.

Both sides see the same fitted pixels and go through the same upsampling and the same metrics; what
is compared is the task (mIoU, class by class, pixel by pixel), and the logits under it. The
reference is the checkpoint in PyTorch and float32, or another bundle; this module needs no PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_export.verify.measure import MarginRow, ParityMeter, top_two_margin
from knet_export.verify.reference import Reference
from knet_runtime.atomic import write_json
from knet_runtime.bundle.manifest import Kind, Parity, Precision, Tolerance
from knet_runtime.bundle.store import Bundle
from knet_runtime.engines import Engine
from knet_runtime.errors import DataError, EngineError
from knet_runtime.metrics import worst_class_delta
from knet_runtime.postprocess import class_map, cut_window, restore_class_map, upsampled_argmax
from knet_runtime.preprocess import Geometry, fit_to_input
from knet_runtime.types import ClassMap, Size

Picture = tuple[NDArray[np.uint8], NDArray[np.uint8] | None]


class ClassRow(msgspec.Struct, frozen=True):
    """IoU in percent of one class on both sides; None where it was never labelled or predicted."""

    name: str
    reference: float | None
    artefact: float | None

    @property
    def delta(self) -> float | None:
        """ΔIoU in points."""
        if self.reference is None or self.artefact is None:
            return None
        return self.artefact - self.reference


class VerifyReport(msgspec.Struct, frozen=True):
    """What was measured; ``failures`` says in words what left the tolerance. IoU in percent,
    differences in points, agreements 0 … 1; None where the pictures had no labels. Logit
    differences are shares of the reference's largest logit; None for a graph that gives class maps,
    and where it gave NaN or infinity."""

    model_id: str
    precision: Precision
    kind: Kind
    size: Size  # of the graph's input: height, width
    engine: str
    device: str
    reference: str
    same_checkpoint: bool  # the bundle says that it was made from the reference's very checkpoint
    data: str
    images: int
    miou_reference: float | None
    miou_artefact: float | None
    delta_miou: float | None
    delta_miou_interval: tuple[float, float] | None  # 95 %, paired bootstrap over pictures
    worst_class: str | None
    worst_class_delta_iou: float | None
    agreement: float  # equal pixels of the class maps at the pictures' size
    agreement_confident: float  # the same where the reference leads by a logit
    max_logit_diff: float | None
    mean_logit_diff: float | None
    margins: tuple[MarginRow, ...]
    classes: tuple[ClassRow, ...]
    tolerance: Tolerance
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether everything is inside the tolerance."""
        return not self.failures

    def parity(self) -> Parity:
        """The part that a manifest keeps."""
        return Parity(
            engine=self.engine,
            device=self.device,
            passed=self.passed,
            miou_reference=self.miou_reference,
            miou_measured=self.miou_artefact,
            delta_miou=self.delta_miou,
            worst_class_delta_iou=self.worst_class_delta_iou,
            agreement=self.agreement,
            max_logit_diff=self.max_logit_diff,
            images=self.images,
            data=self.data,
        )


@dataclass(frozen=True, eq=False)
class Compared:
    """One picture, after both sides have seen it: image uint8 [H, W, 3] RGB, class maps [H, W];
    ``artefact`` is None where its logits hold NaN or infinity."""

    index: int
    image: NDArray[np.uint8]
    reference: ClassMap
    artefact: ClassMap | None
    agreement: float


def verify(
    bundle: Bundle,
    backend: Engine,
    reference: Reference,
    images: Iterable[Picture],
    data: str,
    *,
    on_picture: Callable[[Compared], None] = lambda _: None,
) -> VerifyReport:
    """Compare ``backend`` running ``bundle`` with ``reference`` on pictures, uint8 [H, W, 3] RGB
    with labels [H, W] or None. ``data`` names them in the report.

    For a graph that gives class maps the reference's logits are upsampled to the graph's size, as
    the graph does it, and both maps brought to the picture's size in the same way.

    Raises CheckpointError or BundleError when the two are not the same kind of model, EngineError
    when they give other shapes, DataError without pictures.
    """
    reference.check(bundle)
    manifest = bundle.manifest
    (output_spec,) = bundle.graph(backend.kind).outputs
    tally = ParityMeter(manifest.labels.num_classes, manifest.labels.ignore_index)
    for index, (image, label) in enumerate(images):
        fitted, geometry = fit_to_input(image, manifest.input)
        expected = reference.logits(fitted)
        output = backend.infer(fitted[None])[output_spec.name][0]
        found: ClassMap | None = None
        if backend.kind == "classmap":
            wanted: ClassMap
            wanted, margin = _as_the_graph(expected, geometry)
            found = restore_class_map(np.asarray(output, np.uint8), geometry)
        else:
            if output.shape != expected.shape:
                raise EngineError(
                    f"the bundle gives logits {output.shape}, {reference.name} {expected.shape}: "
                    "compare it with what it was exported from"
                )
            wanted = class_map(expected, geometry)
            margin = top_two_margin(cut_window(expected, geometry), geometry.source_hw)
            logits = np.asarray(output, np.float32)
            if np.isfinite(logits).all():
                tally.logits(expected, logits)
                found = class_map(logits, geometry)
        agreed = tally.maps(wanted, found, margin, label)
        on_picture(Compared(index, image, wanted, found, agreed))
    if not tally.images:
        raise DataError(f"{data} has no pictures to verify with")
    return _report(bundle, backend, reference, tally, data)


def _as_the_graph(
    logits: NDArray[np.float32], geometry: Geometry
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The class map [H, W] that a right class-map graph and ``restore_class_map`` give, and the
    margin of each of its pixels."""
    classes = upsampled_argmax(logits, geometry.model_hw).astype(np.uint8)
    margin = top_two_margin(logits, geometry.model_hw)
    top, left, height, width = geometry.window
    size = (geometry.source_hw[1], geometry.source_hw[0])
    window = margin[top : top + height, left : left + width]
    nearest = cv2.resize(window, size, interpolation=cv2.INTER_NEAREST_EXACT)
    return restore_class_map(classes, geometry), np.asarray(nearest, np.float32)


def _report(
    bundle: Bundle,
    backend: Engine,
    reference: Reference,
    tally: ParityMeter,
    data: str,
) -> VerifyReport:
    artefact, labels, spec = bundle.graph(backend.kind), bundle.manifest.labels, bundle.manifest
    worst = worst_class_delta(tally.reference, tally.artefact)
    logits = tally.logit_differences()
    measured = VerifyReport(
        model_id=bundle.model_id,
        precision=artefact.precision,
        kind=backend.kind,
        size=(spec.input.height, spec.input.width),
        engine=backend.name,
        device=backend.device,
        reference=reference.name,
        same_checkpoint=spec.provenance.checkpoint_sha256 == reference.checkpoint_sha256,
        data=data,
        images=tally.images,
        miou_reference=100 * tally.reference.miou if tally.labelled else None,
        miou_artefact=100 * tally.artefact.miou if tally.labelled else None,
        delta_miou=(100 * (tally.artefact.miou - tally.reference.miou) if tally.labelled else None),
        delta_miou_interval=tally.interval() if tally.labelled else None,
        worst_class=None if worst is None else labels.names[worst.index],
        worst_class_delta_iou=None if worst is None else worst.points,
        agreement=tally.agreement,
        agreement_confident=tally.agreement_confident,
        max_logit_diff=logits[0] if logits else None,
        mean_logit_diff=logits[1] if logits else None,
        margins=tally.margins(),
        classes=tuple(
            ClassRow(name, _percent(before), _percent(after))
            for name, before, after in zip(
                labels.names, tally.reference.iou, tally.artefact.iou, strict=True
            )
        )
        if tally.labelled
        else (),
        tolerance=artefact.tolerance,
        failures=(),
    )
    return msgspec.structs.replace(measured, failures=_failures(measured, tally.broken))


def _failures(report: VerifyReport, broken: int) -> tuple[str, ...]:
    limits, failures = report.tolerance, []
    if broken:
        failures.append(f"{broken} of {report.images} pictures give NaN or infinity")
    if report.delta_miou is not None and not abs(report.delta_miou) <= limits.delta_miou:
        failures.append(f"ΔmIoU {report.delta_miou:+.3f} points is outside ±{limits.delta_miou:g}")
    worst = report.worst_class_delta_iou
    if worst is not None and not abs(worst) <= limits.worst_class_delta_iou:
        failures.append(
            f"ΔIoU of {report.worst_class} {worst:+.3f} points is outside "
            f"±{limits.worst_class_delta_iou:g}"
        )
    for what, share, least in (
        ("pixel agreement", report.agreement, limits.agreement),
        ("agreement of confident pixels", report.agreement_confident, limits.agreement_confident),
    ):
        if not share >= least:
            failures.append(f"{what} {share:.6f} is below {least:g}")
    for what, difference, most in (
        ("largest logit difference", report.max_logit_diff, limits.max_logit_diff),
        ("mean logit difference", report.mean_logit_diff, limits.mean_logit_diff),
    ):
        if difference is not None and not difference <= most:
            failures.append(f"{what} {difference:.2e} is above {most:g} of the largest logit")
    return tuple(failures)


def _percent(value: float) -> float | None:
    return None if np.isnan(value) else 100 * float(value)


def write_report(report: VerifyReport, path: Path) -> None:
    """Write the report as JSON; it appears whole or not at all. Raises OutputError."""
    write_json(path, report)
