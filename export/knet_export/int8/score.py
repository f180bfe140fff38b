"""What a changed graph costs, measured against the float graph on images held out for it.

Of class maps that is mIoU, where there are labels, and the pixels that get the same class. Of a
network for segments it is the panoptic quality of its results with the float graph's as the truth:
how many of the segments that a user would see are still there, and how well they cover. A few
segments say little of a single layer, so the pixels are compared as well, those of every kernel's
mask, whatever the rules make of it; ``verify`` looks at the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_export.data import ImageSet
from knet_export.graph.onnx_graph import OnnxGraph
from knet_export.int8.calibrate import spread
from knet_runtime.bundle.manifest import Manifest, Meaning, Tolerance
from knet_runtime.errors import CheckpointError, DataError
from knet_runtime.metrics import ConfusionMatrix, agreement, worst_class_delta
from knet_runtime.panoptic_quality import PanopticQuality, SegmentIds, segment_ids
from knet_runtime.postprocess import class_map, find_segments
from knet_runtime.preprocess import Geometry, fit_to_input
from knet_runtime.types import ClassMap

LEAST_QUALITY = 80.0
"""The panoptic quality, in percent, that an int8 graph's segments must have with those of the float
graph as the truth."""


class Score(msgspec.Struct, frozen=True):
    """How near a graph is to the float one. ΔmIoU and the largest ΔIoU of a class, in points (None
    without labels, and of segments); the share of pixels that get the same class, or that are on
    the same side of every kernel's mask; and of segments their panoptic quality in percent, with
    the float graph's as the truth."""

    delta_miou: float | None
    worst_class_delta_iou: float | None
    agreement: float
    quality: float | None = None

    def inside(self, tolerance: Tolerance) -> bool:
        """Whether all that was measured is within ``tolerance`` and ``LEAST_QUALITY``."""
        if self.quality is not None and not self.quality >= LEAST_QUALITY:
            return False
        limited = msgspec.structs.asdict(self)
        del limited["quality"]
        return not tolerance.failures(**limited)


Result = TypeVar("Result")
Logits = Mapping[Meaning, NDArray[np.float32]]


@dataclass(frozen=True)
class Held(Generic[Result]):
    """One image as the graph takes it, and what the float graph makes of it."""

    fitted: NDArray[np.uint8]
    geometry: Geometry
    reference: Result
    label: NDArray[np.uint8] | None


class Int8Scorer(ABC, Generic[Result]):
    """Held-out images, kept in memory with the float graph's results at the images' sizes."""

    def __init__(
        self, graph: OnnxGraph, manifest: Manifest, images: ImageSet, indices: Sequence[int]
    ) -> None:
        self._manifest = manifest
        session = graph.session()
        self._held: list[Held[Result]] = []
        for index in indices:
            image, label = images.read(index)
            fitted, geometry = fit_to_input(image, manifest.input)
            reference = self._run(session, fitted, geometry)
            self._held.append(Held(fitted, geometry, reference, label))

    def __len__(self) -> int:
        return len(self._held)

    def spread(self, count: int) -> Int8Scorer[Result]:
        """A scorer with at most ``count`` of the images, spread over them."""
        fewer = copy(self)
        fewer._held = spread(self._held, count)
        return fewer

    def score(self, graph: OnnxGraph) -> Score:
        """Run ``graph`` on every held-out image. Raises CheckpointError for logits with NaN."""
        session = graph.session()
        return self._score(
            (self._run(session, held.fitted, held.geometry), held) for held in self._held
        )

    def _run(self, session: Any, fitted: NDArray[np.uint8], geometry: Geometry) -> Result:
        outputs = self._manifest.graph("logits").outputs
        names = [output.name for output in outputs]
        found = session.run(names, {self._manifest.input.name: fitted[None]})
        logits = {output.meaning: array[0] for output, array in zip(outputs, found, strict=True)}
        try:
            return self._result(logits, geometry)
        except ValueError as error:  # NaN
            raise CheckpointError(
                f"the graph cannot be scored: {error}; try the checkpoint with `knet-deploy eval`"
            ) from error

    @abstractmethod
    def _result(self, logits: Logits, geometry: Geometry) -> Result: ...

    @abstractmethod
    def _score(self, pairs: Iterable[tuple[Result, Held[Result]]]) -> Score: ...


class ClassScorer(Int8Scorer[ClassMap]):
    """The scorer of semantic networks."""

    def _result(self, logits: Logits, geometry: Geometry) -> ClassMap:
        return class_map(logits["semantic_logits"], geometry)

    def _score(self, pairs: Iterable[tuple[ClassMap, Held[ClassMap]]]) -> Score:
        labels = self._manifest.labels
        confusion, reference = (
            ConfusionMatrix(labels.num_classes, labels.ignore_index) for _ in range(2)
        )
        equal, pixels = 0.0, 0
        for found, held in pairs:
            equal += agreement(found, held.reference) * found.size
            pixels += found.size
            if held.label is not None:
                confusion.update(found, held.label)
                reference.update(held.reference, held.label)
        worst = worst_class_delta(reference, confusion)
        if worst is None:
            return Score(None, None, equal / pixels)
        return Score(100 * (confusion.miou - reference.miou), worst.points, equal / pixels)


class Found(NamedTuple):
    """An image's segments, and which pixels every kernel's mask holds, bits of uint8 [...]."""

    segments: SegmentIds
    masks: NDArray[np.uint8]


class SegmentScorer(Int8Scorer[Found]):
    """The scorer of networks for segments. Raises DataError when the float graph finds none on the
    images: then there is nothing to lose."""

    def __init__(
        self, graph: OnnxGraph, manifest: Manifest, images: ImageSet, indices: Sequence[int]
    ) -> None:
        super().__init__(graph, manifest, images, indices)
        if not any(held.reference.segments.classes for held in self._held):
            raise DataError(
                f"the model finds nothing on the {len(self)} images of {images.name} that int8 is "
                "measured on: take images of what it was trained to find"
            )

    def _result(self, logits: Logits, geometry: Geometry) -> Found:
        manifest, masks = self._manifest, logits["mask_logits"]
        found = find_segments(
            manifest.task,
            logits["class_logits"],
            masks,
            geometry,
            manifest.labels,
            manifest.segment_rules,
        )
        return Found(segment_ids(found), np.packbits(masks > 0))

    def _score(self, pairs: Iterable[tuple[Found, Held[Found]]]) -> Score:
        quality = PanopticQuality(self._manifest.labels)
        equal = bits = 0
        for found, held in pairs:
            quality.update(found.segments, held.reference.segments)
            changed = np.unpackbits(found.masks ^ held.reference.masks)
            equal += changed.size - int(np.count_nonzero(changed))
            bits += changed.size
        share = quality.all.pq
        return Score(None, None, equal / bits, None if np.isnan(share) else 100 * share)


def new_scorer(
    graph: OnnxGraph, manifest: Manifest, images: ImageSet, indices: Sequence[int]
) -> ClassScorer | SegmentScorer:
    """The scorer for the manifest's task."""
    scorer = ClassScorer if manifest.task == "semantic" else SegmentScorer
    return scorer(graph, manifest, images, indices)
