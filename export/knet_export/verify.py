"""Parity as a gate: the artefact on its engine against the PyTorch checkpoint, on pictures.

Both sides see the same fitted pixels and go through the same upsampling and the same metrics; what
is compared is the task (mIoU, class by class, pixel by pixel), and the logits under it. A float
reference is computed by PyTorch in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_runtime.backends import Backend
from knet_runtime.bundle import Bundle
from knet_runtime.errors import CheckpointError, DataError
from knet_runtime.manifest import Parity, Tolerance
from knet_runtime.metrics import ConfusionMatrix, agreement, worst_class_delta
from knet_runtime.pending import output_error, write_whole
from knet_runtime.postprocess import class_map
from knet_runtime.preprocess import fit
from knet_train.checkpoint import Checkpoint
from knet_train.dataset import LabelledFolder
from knet_train.evaluate import predict_logits

Picture = tuple[NDArray[np.uint8], NDArray[np.uint8] | None]

_CONFIDENT_MARGIN = 1.0  # logits: e times as likely as the runner-up
_RESAMPLES = 1000


class ClassRow(msgspec.Struct, frozen=True):
    """IoU in percent of one class on both sides; None where it was never labelled or predicted."""

    name: str
    reference: float | None
    artefact: float | None


class VerifyReport(msgspec.Struct, frozen=True):
    """What was measured; ``failures`` says in words what left the tolerance. IoU in percent,
    differences in points, agreements 0 … 1; None where the pictures had no labels."""

    model_id: str
    engine: str
    data: str
    images: int
    same_checkpoint: bool  # the bundle says that it was made from this very file
    miou_reference: float | None
    miou_artefact: float | None
    delta_miou: float | None
    delta_miou_interval: tuple[float, float] | None  # 95 %, paired bootstrap over pictures
    worst_class: str | None
    worst_class_delta_iou: float | None
    agreement: float  # equal pixels of the class maps at the pictures' size
    agreement_confident: float  # the same where the reference leads by a logit, at low resolution
    max_logit_diff: float
    mean_logit_diff: float
    classes: tuple[ClassRow, ...]
    tolerance: Tolerance
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures

    def parity(self) -> Parity:
        """The part that a manifest keeps."""
        return Parity(
            miou_reference=self.miou_reference,
            miou_artefact=self.miou_artefact,
            delta_miou=self.delta_miou,
            worst_class_delta_iou=self.worst_class_delta_iou,
            agreement=self.agreement,
            max_logit_diff=self.max_logit_diff,
            images=self.images,
            data=self.data,
        )


def pictures(folder: LabelledFolder) -> Iterator[Picture]:
    """The labelled pictures of a split, read one at a time."""
    for index in range(len(folder)):
        yield folder.read(index)


def check_labels(bundle: Bundle, folder: LabelledFolder) -> None:
    """Refuse data of another task: DataError unless classes and ignore index are the bundle's."""
    ours = bundle.manifest.labels
    if (ours.names, ours.ignore_index) != (folder.labels.names, folder.labels.ignore_index):
        raise DataError(
            f"{folder.root / 'labels.json'} has other classes than {bundle.path} "
            f"({folder.labels.num_classes} against {ours.num_classes}, or other names): "
            "verify with the data set that the model was trained for"
        )


def verify(
    bundle: Bundle,
    backend: Backend,
    checkpoint: Checkpoint,
    images: Iterable[Picture],
    data: str,
    on_image: Callable[[], None] = lambda: None,
) -> VerifyReport:
    """Compare ``backend`` running ``bundle`` with ``checkpoint`` on pictures, uint8 [H, W, 3] RGB
    with labels [H, W] or None. ``data`` names them in the report.

    Raises CheckpointError when the two are not the same kind of model, DataError without pictures.
    """
    manifest = bundle.manifest
    stride = manifest.output.stride
    if (checkpoint.labels.names, checkpoint.config.model.stride) != (manifest.labels.names, stride):
        raise CheckpointError(
            f"the checkpoint ({checkpoint.config.preset}, {checkpoint.labels.num_classes} classes) "
            f"is not the model of {bundle.path} ({manifest.provenance.preset}, "
            f"{manifest.labels.num_classes} classes): pass the one that it was exported from"
        )
    tally = _Tally(manifest.labels.num_classes, manifest.labels.ignore_index)
    for image, label in images:
        fitted, geometry = fit(image, manifest.input, stride)
        reference = predict_logits(checkpoint.model, fitted)
        artefact = backend.infer(fitted[None])[0]
        if artefact.shape != reference.shape:
            raise CheckpointError(
                f"the bundle gives logits {artefact.shape}, the checkpoint {reference.shape}: "
                "pass the checkpoint that it was exported from"
            )
        tally.logits(reference, artefact)
        tally.maps(
            class_map(reference, geometry, stride), class_map(artefact, geometry, stride), label
        )
        on_image()
    if not tally.agreements:
        raise DataError(f"{data} has no pictures to verify with")
    return _report(bundle, backend, checkpoint, tally, data)


class _Tally:
    """Sums over pictures; per picture only what the bootstrap needs, [3, N] counts a side."""

    def __init__(self, classes: int, ignore_index: int) -> None:
        self.classes, self.ignore_index = classes, ignore_index
        self.reference = ConfusionMatrix(classes, ignore_index)
        self.artefact = ConfusionMatrix(classes, ignore_index)
        self.per_image: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        self.agreements: list[tuple[float, int]] = []
        self.confident = np.zeros(2, np.int64)
        self.worst, self.summed, self.count = 0.0, 0.0, 0

    def logits(self, reference: NDArray[np.float32], artefact: NDArray[np.float32]) -> None:
        difference = np.abs(reference - artefact)
        self.worst = float(np.maximum(self.worst, difference.max()))  # carries a NaN on
        self.summed += float(difference.sum(dtype=np.float64))
        self.count += difference.size
        if len(reference) > 1:
            second, first = np.partition(reference, -2, axis=0)[-2:]
            sure = first - second >= _CONFIDENT_MARGIN
        else:
            sure = np.ones(reference.shape[1:], bool)
        equal = reference.argmax(0) == artefact.argmax(0)
        self.confident += (int((equal & sure).sum()), int(sure.sum()))

    def maps(
        self,
        reference: NDArray[np.integer],
        artefact: NDArray[np.integer],
        label: NDArray[np.uint8] | None,
    ) -> None:
        self.agreements.append((agreement(reference, artefact), reference.size))
        if label is None:
            return
        sides = []
        for total, prediction in ((self.reference, reference), (self.artefact, artefact)):
            one = ConfusionMatrix(self.classes, self.ignore_index)
            one.update(prediction, label)
            total.matrix += one.matrix
            sides.append(np.stack([np.diag(one.matrix), one.matrix.sum(1), one.matrix.sum(0)]))
        self.per_image.append((sides[0], sides[1]))


def _report(
    bundle: Bundle, backend: Backend, checkpoint: Checkpoint, tally: _Tally, data: str
) -> VerifyReport:
    labels, tolerance = bundle.manifest.labels, bundle.artefact.tolerance
    pixels = sum(size for _, size in tally.agreements)
    agreed = sum(share * size for share, size in tally.agreements) / pixels
    labelled = bool(tally.per_image) and not np.isnan(tally.reference.miou)
    delta = 100 * (tally.artefact.miou - tally.reference.miou) if labelled else None
    worst = worst_class_delta(tally.reference, tally.artefact) if labelled else None
    sure = int(tally.confident[1])
    failures = []
    if delta is not None and not abs(delta) <= tolerance.delta_miou:
        failures.append(f"ΔmIoU {delta:+.3f} points is outside ±{tolerance.delta_miou}")
    if worst is not None and not abs(worst.points) <= tolerance.worst_class_delta_iou:
        failures.append(
            f"ΔIoU of {labels.names[worst.index]} {worst.points:+.3f} points is outside "
            f"±{tolerance.worst_class_delta_iou}"
        )
    if not agreed >= tolerance.agreement:
        failures.append(f"pixel agreement {agreed:.5f} is below {tolerance.agreement}")
    if not tally.worst <= tolerance.max_logit_diff:
        failures.append(
            f"largest logit difference {tally.worst:.2e} is above {tolerance.max_logit_diff:.0e}"
        )
    return VerifyReport(
        model_id=bundle.model_id,
        engine=backend.name,
        data=data,
        images=len(tally.agreements),
        same_checkpoint=bundle.manifest.provenance.checkpoint_sha256 == checkpoint.sha256,
        miou_reference=100 * tally.reference.miou if labelled else None,
        miou_artefact=100 * tally.artefact.miou if labelled else None,
        delta_miou=delta,
        delta_miou_interval=_interval(tally.per_image) if labelled else None,
        worst_class=None if worst is None else labels.names[worst.index],
        worst_class_delta_iou=None if worst is None else worst.points,
        agreement=agreed,
        agreement_confident=int(tally.confident[0]) / sure if sure else 1.0,
        max_logit_diff=tally.worst,
        mean_logit_diff=tally.summed / tally.count,
        classes=tuple(
            ClassRow(name, _percent(reference), _percent(artefact))
            for name, reference, artefact in zip(
                labels.names, tally.reference.iou, tally.artefact.iou, strict=True
            )
        )
        if labelled
        else (),
        tolerance=tolerance,
        failures=tuple(failures),
    )


def _interval(
    per_image: list[tuple[NDArray[np.int64], NDArray[np.int64]]],
) -> tuple[float, float]:
    """95 % of ΔmIoU in points when pictures are drawn again with replacement, both sides alike."""
    reference = np.stack([pair[0] for pair in per_image])
    artefact = np.stack([pair[1] for pair in per_image])
    rng = np.random.default_rng(0)
    deltas = []
    for _ in range(_RESAMPLES):
        times = np.bincount(
            rng.integers(0, len(per_image), len(per_image)), minlength=len(per_image)
        )
        both = [np.tensordot(times, side, 1) for side in (reference, artefact)]
        deltas.append(100 * (_miou(both[1]) - _miou(both[0])))
    low, high = np.nanpercentile(deltas, (2.5, 97.5))
    return float(low), float(high)


def _miou(counts: NDArray[np.int64]) -> float:
    hits, labelled, predicted = counts
    union = labelled + predicted - hits
    return float((hits[union > 0] / union[union > 0]).mean()) if (union > 0).any() else np.nan


def _percent(value: float) -> float | None:
    return None if np.isnan(value) else 100 * float(value)


def write_report(report: VerifyReport, path: Path) -> None:
    """Write the report as JSON; it appears whole or not at all. Raises OutputError."""
    try:
        write_whole(path, msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    except OSError as error:
        raise output_error(path, error) from error
