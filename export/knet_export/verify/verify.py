"""Parity as a gate: a bundle's graph on its engine against a reference, on images.

Both sides see the same fitted pixels and go through the same upsampling and the same metrics; what
is compared is the task (mIoU, class by class, pixel by pixel), and the logits under it. Of a
network for segments it is panoptic quality or average precision, which segments match, every pixel
of every kernel's mask (``knet_runtime.golden`` says why), with the reference's mask logit as its
margin, and the logits of the classes.
The reference is the checkpoint in PyTorch and float32, or another bundle; this module needs no
PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_export.data import LabelledImage, open_images
from knet_export.verify.measure import MarginRow, ParityMeter, stage_limit, top_two_margin
from knet_export.verify.reference import Outputs, Reference, open_reference
from knet_export.verify.segments import SegmentMeter
from knet_runtime.bundle.manifest import (
    Kind,
    Manifest,
    Meaning,
    Parity,
    Precision,
    SegmentRules,
    Tolerance,
)
from knet_runtime.bundle.store import Bundle, open_bundle, record_parity
from knet_runtime.engines import Engine, open_engine
from knet_runtime.errors import DataError, EngineError
from knet_runtime.metrics import inside
from knet_runtime.postprocess import (
    class_map,
    cut_window,
    find_segments,
    restore_class_map,
    upsampled_argmax,
)
from knet_runtime.preprocess import Geometry, fit_to_input
from knet_runtime.segmentation import Segmentation
from knet_runtime.types import METRICS, ClassMap, Metric, Rgb, Size

if TYPE_CHECKING:
    from knet_train.data.truth import Truth


class ClassRow(msgspec.Struct, frozen=True):
    """IoU (or PQ, AP) in percent of one class on both sides; None where it was never labelled or
    predicted."""

    name: str
    reference: float | None
    measured: float | None

    @property
    def delta(self) -> float | None:
        """The difference in points."""
        if self.reference is None or self.measured is None:
            return None
        return self.measured - self.reference


class VerifyReport(msgspec.Struct, frozen=True):
    """What was measured; ``failures`` says in words what left the tolerance. mIoU (of a panoptic
    network PQ, of one for instances AP: ``metric`` says which) in percent, differences in points,
    agreements 0 … 1; None where the images had no labels. Logit differences are shares of the
    reference's largest logit; None for a graph that gives class maps,
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
    miou_measured: float | None
    delta_miou: float | None
    delta_miou_interval: tuple[float, float] | None  # 95 %, paired bootstrap over images
    worst_class: str | None
    worst_class_delta_iou: float | None
    agreement: float  # equal pixels of the class maps at the images' size, or of all masks
    agreement_confident: float  # the same where the reference leads by a logit
    max_logit_diff: float | None
    mean_logit_diff: float | None
    margins: tuple[MarginRow, ...]
    classes: tuple[ClassRow, ...]
    tolerance: Tolerance
    failures: tuple[str, ...]
    metric: Metric = "mIoU"
    # Share of both sides' segments that have a partner; None for class maps.
    matched: float | None = None
    # Of the first kernels' masks and of every stage's, ``stage_differences`` on the first image;
    # None for class maps, against a bundle, and for bf16, which ONNX Runtime cannot run on the CPU.
    stages: tuple[float, ...] | None = None

    @property
    def passed(self) -> bool:
        """Whether everything is inside the tolerance."""
        return not self.failures

    def _repr_html_(self) -> str:
        from knet_export.verify.report import report_card

        return report_card(self)

    def measures(self) -> dict[str, float | None]:
        """What the tolerance limits, named as its fields."""
        return {name: getattr(self, name) for name in self.tolerance.__struct_fields__}

    def parity(self) -> Parity:
        """The part that a manifest keeps."""
        return Parity(
            engine=self.engine,
            device=self.device,
            passed=self.passed,
            miou_reference=self.miou_reference,
            miou_measured=self.miou_measured,
            delta_miou=self.delta_miou,
            worst_class_delta_iou=self.worst_class_delta_iou,
            agreement=self.agreement,
            max_logit_diff=self.max_logit_diff,
            images=self.images,
            data=self.data,
        )


@dataclass(frozen=True, eq=False)
class Compared:
    """One image, after both sides have seen it: uint8 [H, W, 3] RGB, results at its size;
    ``measured`` is None where its logits hold NaN or infinity."""

    index: int
    image: Rgb
    reference: Segmentation
    measured: Segmentation | None
    agreement: float


def verify_bundle(
    bundle: Bundle | Path | str,
    against: Path | str,
    data: Path | str,
    *,
    split: str = "val",
    engine: str = "auto",
) -> VerifyReport:
    """Compare a bundle with ``against``, its checkpoint or another bundle, on the images of
    ``data``: a data set with labels (its ``split``) or a folder of images.

    The verdict (``VerifyReport.passed``) is also stored in the bundle, for this engine and device,
    where ``against`` is what it was exported from and the bundle is not a packaged one. Raises
    CheckpointError or BundleError for models of another kind, DataError without images, EngineError
    when the engine fails, OutputError when the verdict cannot be stored.

        >>> from knet_deploy import export_bundle, verify_bundle
        >>> bundle = export_bundle("best.safetensors", "street.knet")
        >>> report = verify_bundle(bundle, "best.safetensors", "photos")
        >>> report.passed, report.images
        (True, 2)
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    manifest = opened.manifest
    images = open_images(Path(data), split, manifest.labels, task=manifest.task)
    with open_engine(opened, engine) as running, open_reference(Path(against), opened) as reference:
        report = verify(opened, running, reference, images, images.name)
    if report.same_checkpoint and not opened.is_packaged:
        record_parity(opened, running.kind, report.parity())
    return report


def verify(
    bundle: Bundle,
    engine: Engine,
    reference: Reference,
    images: Iterable[LabelledImage],
    data: str,
    *,
    on_image: Callable[[Compared], None] = lambda _: None,
) -> VerifyReport:
    """Compare ``engine`` running ``bundle`` with ``reference`` on images, uint8 [H, W, 3] RGB with
    labels [H, W] or None. ``data`` names them in the report.

    For a graph that gives class maps the reference's logits are upsampled to the graph's size, as
    the graph does it, and both maps brought to the image's size in the same way.

    Raises CheckpointError or BundleError when the two are not the same kind of model, EngineError
    when they give other shapes, DataError without images.
    """
    reference.check(bundle)
    manifest = bundle.manifest
    labels, outputs = manifest.labels, bundle.graph(engine.kind).outputs
    meter = ParityMeter(labels.num_classes, labels.ignore_index)
    segments = None if manifest.task == "semantic" else SegmentMeter(labels, manifest.task)
    stages: tuple[float, ...] | None = None
    for index, (image, label) in enumerate(images):
        fitted, geometry = fit_to_input(image, manifest.input)
        expected = reference.outputs(fitted)
        given = engine.infer(fitted[None])
        measured = {output.meaning: given[output.name][0] for output in outputs}
        for meaning in set(expected) & set(measured):
            if measured[meaning].shape != expected[meaning].shape:
                raise EngineError(
                    f"the bundle gives logits {measured[meaning].shape}, {reference.name} "
                    f"{expected[meaning].shape}: compare it with what it was exported from"
                )
        if segments is None:
            sides, agreed = _class_maps(engine.kind, expected, measured, geometry, label, meter)
            wanted, found = (None if one is None else Segmentation(one, labels) for one in sides)
        else:
            wanted, found, agreed = _segments(
                manifest, expected, measured, geometry, label, meter, segments
            )
            if index == 0:
                stages = _stages(bundle, engine.kind, reference, fitted, expected)
        assert wanted is not None
        on_image(Compared(index, image, wanted, found, agreed))
    if not meter.images:
        raise DataError(f"{data} has no images to verify with")
    return _report(bundle, engine, reference, meter, segments, stages, data)


def _class_maps(
    kind: Kind,
    expected: Outputs,
    measured: Mapping[Meaning, NDArray[Any]],
    geometry: Geometry,
    label: NDArray[np.uint8] | None,
    meter: ParityMeter,
) -> tuple[tuple[ClassMap, ClassMap | None], float]:
    """Both sides' class maps of one image, counted; and the share of equal pixels."""
    reference_logits = expected["semantic_logits"]
    found: ClassMap | None = None
    if kind == "classmap":
        wanted, margin = _as_the_graph(reference_logits, geometry)
        found = restore_class_map(np.asarray(measured["class_map"], np.uint8), geometry)
        return (wanted, found), meter.maps(wanted, found, margin, label)
    classes = class_map(reference_logits, geometry)
    margin = top_two_margin(cut_window(reference_logits, geometry), geometry.source_hw)
    logits = np.asarray(measured["semantic_logits"], np.float32)
    if np.isfinite(logits).all():
        meter.logits(reference_logits, logits)
        found = class_map(logits, geometry)
    return (classes, found), meter.maps(classes, found, margin, label)


def _segments(
    manifest: Manifest,
    expected: Outputs,
    measured: Mapping[Meaning, NDArray[Any]],
    geometry: Geometry,
    truth: Truth | None,
    meter: ParityMeter,
    segments: SegmentMeter,
) -> tuple[Segmentation, Segmentation | None, float]:
    """Both sides' segments of one image, counted; and the share of equal pixels of all masks."""
    finite = all(np.isfinite(array).all() for array in measured.values())

    def found(outputs: Mapping[Meaning, NDArray[Any]], rules: SegmentRules) -> Segmentation:
        classes, masks = (
            np.asarray(outputs[name], np.float32) for name in ("class_logits", "mask_logits")
        )
        return find_segments(manifest.task, classes, masks, geometry, manifest.labels, rules)

    def both(rules: SegmentRules) -> tuple[Segmentation, Segmentation | None]:
        return found(expected, rules), found(measured, rules) if finite else None

    results = both(manifest.segment_rules)
    segments.compare(*results)
    if truth is not None:
        rules = manifest.segment_rules
        if manifest.task == "instance":  # average precision ranks them all
            rules = msgspec.structs.replace(rules, score=0.0)
        segments.score(*both(rules), truth)
    if finite:
        meter.logits(expected["class_logits"], measured["class_logits"])
    masks = [inside(each["mask_logits"]) for each in (expected, measured)]
    margin = np.abs(expected["mask_logits"])
    return *results, meter.maps(masks[0], masks[1] if finite else None, margin, None)


def _stages(
    bundle: Bundle, kind: Kind, reference: Reference, fitted: Rgb, expected: Outputs
) -> tuple[float, ...] | None:
    graph = bundle.graph(kind)
    masks = None if graph.precision == "bf16" else reference.stage_masks(fitted)
    if masks is None:
        return None
    from knet_export.graph.onnx_graph import OnnxGraph
    from knet_export.verify.stages import stage_differences

    feed = {bundle.manifest.input.name: fitted[None]}
    loaded = OnnxGraph.load(bundle.file(graph.path))
    return stage_differences(loaded, feed, masks, expected["mask_logits"])


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
    engine: Engine,
    reference: Reference,
    meter: ParityMeter,
    segments: SegmentMeter | None,
    stages: tuple[float, ...] | None,
    data: str,
) -> VerifyReport:
    manifest, graph = bundle.manifest, bundle.graph(engine.kind)
    names, delta = manifest.labels.names, meter.delta() if segments is None else segments.delta()
    metric = METRICS[bundle.manifest.task]
    largest, mean = meter.logit_differences() or (None, None)
    worst_class, worst = None, None
    classes: tuple[ClassRow, ...] = ()
    if delta is not None:
        rows = zip(names, delta.classes, strict=True)
        classes = tuple(ClassRow(name, *sides) for name, sides in rows)
        if delta.worst is not None:
            worst_class, worst = names[delta.worst], classes[delta.worst].delta
    report = VerifyReport(
        model_id=bundle.model_id,
        precision=graph.precision,
        kind=engine.kind,
        size=manifest.input.size,
        engine=engine.name,
        device=engine.device,
        reference=reference.name,
        same_checkpoint=manifest.provenance.checkpoint_sha256 == reference.checkpoint_sha256,
        data=data,
        images=meter.images,
        miou_reference=None if delta is None else delta.reference,
        miou_measured=None if delta is None else delta.measured,
        delta_miou=None if delta is None else delta.points,
        delta_miou_interval=None if delta is None else delta.interval,
        worst_class=worst_class,
        worst_class_delta_iou=worst,
        agreement=meter.agreement,
        agreement_confident=meter.agreement_confident,
        max_logit_diff=largest,
        mean_logit_diff=mean,
        margins=meter.margins(),
        classes=classes,
        tolerance=graph.tolerance,
        failures=(),
        metric=metric,
        matched=None if segments is None else segments.matched,
        stages=stages,
    )
    failures = graph.tolerance.failures(**report.measures())
    if "worst_class_delta_iou" in failures:
        failures["worst_class_delta_iou"] += f" ({worst_class})"
    if meter.broken:
        broken = f"{meter.broken} of {meter.images} images give NaN or infinity"
        failures = {"broken": broken, **failures}
    limit = stage_limit(graph.precision)
    outside = {stage: one for stage, one in enumerate(stages or ()) if not one <= limit}
    if outside:
        where = "stages " if len(outside) > 1 else "stage "
        where += ", ".join(map(str, outside))
        failures["stages"] = (
            f"{where} with PyTorch's masks: {max(outside.values()):.2g} of the largest logit is "
            f"above {limit:g}"
        )
    words = (text.replace("ΔmIoU", f"Δ{metric}") for text in failures.values())
    if metric != "mIoU":
        words = (text.replace("ΔIoU", f"Δ{metric}") for text in words)
    return msgspec.structs.replace(report, failures=tuple(words))
