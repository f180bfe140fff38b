"""What a changed graph costs, measured against the float graph on images held out for it."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from knet_export.data import ImageSet
from knet_export.graph.onnx_graph import OnnxGraph
from knet_export.int8.calibrate import spread
from knet_runtime.bundle.manifest import Manifest, Tolerance
from knet_runtime.errors import CheckpointError
from knet_runtime.metrics import ConfusionMatrix, agreement, worst_class_delta
from knet_runtime.postprocess import class_map
from knet_runtime.preprocess import Geometry, fit_to_input
from knet_runtime.types import ClassMap


class Score(msgspec.Struct, frozen=True):
    """How near a graph is to the float one: ΔmIoU and the largest ΔIoU of a class, in points (None
    without labels), and the share of pixels that get the same class."""

    delta_miou: float | None
    worst_class_delta_iou: float | None
    agreement: float

    def inside(self, tolerance: Tolerance) -> bool:
        """Whether all that was measured is within ``tolerance``."""
        return not tolerance.failures(**msgspec.structs.asdict(self))


class _Held(msgspec.Struct, frozen=True):
    """One image as the graph takes it, and what the float graph makes of it."""

    fitted: NDArray[np.uint8]
    geometry: Geometry
    reference: ClassMap
    label: NDArray[np.uint8] | None


class Int8Scorer:
    """Held-out images, kept in memory with the float graph's class maps at the images' sizes."""

    def __init__(
        self, graph: OnnxGraph, manifest: Manifest, images: ImageSet, indices: Sequence[int]
    ) -> None:
        self._manifest = manifest
        session = graph.session()
        self._held: list[_Held] = []
        for index in indices:
            image, label = images.read(index)
            fitted, geometry = fit_to_input(image, manifest.input)
            reference = self._run(session, fitted, geometry)
            self._held.append(_Held(fitted, geometry, reference, label))
        self._reference = self._confusion([held.reference for held in self._held])

    def __len__(self) -> int:
        return len(self._held)

    def spread(self, count: int) -> Int8Scorer:
        """A scorer with at most ``count`` of the images, spread over them."""
        fewer = copy(self)
        fewer._held = spread(self._held, count)
        fewer._reference = fewer._confusion([held.reference for held in fewer._held])
        return fewer

    def score(self, graph: OnnxGraph) -> Score:
        """Run ``graph`` on every held-out image. Raises CheckpointError for logits with NaN."""
        session = graph.session()
        maps = [self._run(session, held.fitted, held.geometry) for held in self._held]
        pairs = [
            (agreement(found, held.reference), found.size)
            for found, held in zip(maps, self._held, strict=True)
        ]
        agreed = sum(share * size for share, size in pairs) / sum(size for _, size in pairs)
        confusion = self._confusion(maps)
        worst = worst_class_delta(self._reference, confusion)
        if worst is None:
            return Score(None, None, agreed)
        return Score(100 * (confusion.miou - self._reference.miou), worst.points, agreed)

    def _run(self, session: Any, fitted: NDArray[np.uint8], geometry: Geometry) -> ClassMap:
        output = self._manifest.graph("logits").output("semantic_logits")
        (logits,) = session.run([output.name], {self._manifest.input.name: fitted[None]})
        try:
            return class_map(logits[0], geometry)
        except ValueError as error:  # NaN
            raise CheckpointError(
                f"the graph cannot be scored: {error}; try the checkpoint with `knet-deploy eval`"
            ) from error

    def _confusion(self, maps: Sequence[ClassMap]) -> ConfusionMatrix:
        labels = self._manifest.labels
        confusion = ConfusionMatrix(labels.num_classes, labels.ignore_index)
        for found, held in zip(maps, self._held, strict=True):
            if held.label is not None:
                confusion.update(found, held.label)
        return confusion
