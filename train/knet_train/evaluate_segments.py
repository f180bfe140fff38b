"""The scores of instance and panoptic models over a split: average precision, panoptic quality.

The model is whatever gives an image's segments: a checkpoint in PyTorch, or a bundle, which needs
no PyTorch; nor does this module. Segments are numbered from 1, as 0 is void. (The authors' own code
numbers them from 0, so that an image's first segment is void to the evaluation where its class is
0: published panoptic qualities hold that fault, ours do not.)
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from knet_runtime.panoptic_quality import PanopticQuality, Quality, segment_ids
from knet_train.average_precision import AveragePrecision, Precision
from knet_train.data.segment_folder import SegmentFolder
from knet_train.evaluate import Find, Scored, percent


class MeanQuality(msgspec.Struct, frozen=True):
    """Panoptic quality and its factors in percent, the mean of so many ``classes``: those that have
    a segment; None where there is none."""

    pq: float | None
    sq: float | None
    rq: float | None
    classes: int


class QualityRow(msgspec.Struct, frozen=True):
    """One class in percent, None where it has no segment; and its numbers of segments: matched,
    found but not true, true but not found."""

    name: str
    thing: bool
    pq: float | None
    sq: float | None
    rq: float | None
    tp: int
    fp: int
    fn: int


class PanopticReport(Scored, frozen=True, kw_only=True):
    """What ``knet-deploy eval`` measured of a panoptic model."""

    all: MeanQuality
    things: MeanQuality
    stuff: MeanQuality
    classes: tuple[QualityRow, ...]


class PrecisionRow(msgspec.Struct, frozen=True):
    """One class in percent, None where the truth has no object of it; ``objects`` are those it has,
    crowds left out."""

    name: str
    ap: float | None
    ap50: float | None
    ap75: float | None
    objects: int


class InstanceReport(Scored, frozen=True, kw_only=True):
    """What ``knet-deploy eval`` measured of a model's objects; the means are over the classes that
    have any."""

    ap: float | None = msgspec.field(name="AP")
    ap50: float | None = msgspec.field(name="AP50")
    ap75: float | None = msgspec.field(name="AP75")
    classes: tuple[PrecisionRow, ...]


def panoptic_quality(
    find: Find, folder: SegmentFolder, on_image: Callable[[], None] = lambda: None
) -> PanopticQuality:
    """Panoptic quality over a split that was opened for task "panoptic". Raises what ``find`` and
    ``SegmentFolder.read`` raise."""
    quality = PanopticQuality(folder.labels)
    for index in range(len(folder)):
        image, truth = folder.read(index)
        quality.update(segment_ids(find(image)), truth.flat())
        on_image()
    return quality


def average_precision(
    find: Find, folder: SegmentFolder, on_image: Callable[[], None] = lambda: None
) -> AveragePrecision:
    """Average precision of masks over a split that was opened for task "instance". Segments of
    classes that it has not, such as a panoptic model's stuff, are left out; the others go by their
    names. Raises what ``find`` and ``SegmentFolder.read`` raise."""
    places = {name: index for index, name in enumerate(folder.labels.names)}
    precision = AveragePrecision(folder.labels)
    for index in range(len(folder)):
        image, truth = folder.read(index)
        result = find(image)
        found = [
            {**one, "category_id": place}
            for one in result.to_coco()
            if (place := places.get(result.labels.names[one["category_id"]])) is not None
        ]
        precision.update(index, found, truth)
        on_image()
    return precision


def panoptic_report(quality: PanopticQuality, scored: Scored) -> PanopticReport:
    """The scores in percent."""
    labels, counts = quality.labels, zip(quality.tp, quality.fp, quality.fn, strict=True)
    return PanopticReport(
        **msgspec.structs.asdict(scored),
        all=_mean(quality.all),
        things=_mean(quality.things),
        stuff=_mean(quality.stuff),
        classes=tuple(
            QualityRow(name, index in labels.things, *_percents(row), *map(int, numbers))
            for index, (name, row, numbers) in enumerate(
                zip(labels.names, quality.per_class(), counts, strict=True)
            )
        ),
    )


def instance_report(precision: AveragePrecision, scored: Scored) -> InstanceReport:
    """The scores in percent."""
    (every, each), objects = precision.scores(), [0] * precision.labels.num_classes
    for one in precision.truth:
        objects[one["category_id"]] += not one["iscrowd"]
    rows = zip(precision.labels.names, each, objects, strict=True)
    return InstanceReport(
        **msgspec.structs.asdict(scored),
        ap=percent(every.ap),
        ap50=percent(every.ap50),
        ap75=percent(every.ap75),
        classes=tuple(PrecisionRow(name, *_shares(row), count) for name, row, count in rows),
    )


def _mean(row: Quality) -> MeanQuality:
    return MeanQuality(*_percents(row), row.count)


def _percents(row: Quality) -> tuple[float | None, float | None, float | None]:
    return percent(row.pq), percent(row.sq), percent(row.rq)


def _shares(row: Precision) -> tuple[float | None, float | None, float | None]:
    return percent(row.ap), percent(row.ap50), percent(row.ap75)
