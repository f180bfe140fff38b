"""A bundle and an image in, its segmentation at the image's own size out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from knet_runtime.bundle.manifest import Kind, Meaning, SegmentRules
from knet_runtime.bundle.store import Bundle, open_bundle
from knet_runtime.engines import Engine, open_engine, unverified_reason
from knet_runtime.errors import ConfigError, EngineError
from knet_runtime.golden import SelfTest, SelfTestPolicy, check_at_start
from knet_runtime.labels import LabelMap
from knet_runtime.postprocess import (
    class_map,
    find_segments,
    pixel_uncertainty,
    restore_class_map,
    segment_uncertainty,
)
from knet_runtime.preprocess import Geometry, fit_to_input
from knet_runtime.segmentation import Segmentation
from knet_runtime.sources.given import ImageInput, read_given
from knet_runtime.types import Closeable

_Given = TypeVar("_Given", bound=ImageInput)


class Segmenter(Closeable):
    """A bundle opened on an engine, as a context manager.

        >>> from knet_deploy import Segmenter
        >>> with Segmenter() as segment:  # or Segmenter("street.knet")
        ...     result = segment("street.png")
        ...     others = segment(["photos/a.png", "photos/b.png"])
        >>> result.class_map.shape, len(others)
        ((360, 480), 2)

    ``bundle`` is an opened bundle, its folder, or None for the packaged model; ``engine`` is one of
    ``knet_runtime.engines.engine_specs``, "auto", or an ``Engine`` of your own, then closed
    with the segmenter (``examples/own_engine.py``); ``rules`` say how the masks of an instance or
    panoptic network become segments, where it is not as the bundle says. With ``uncertainty`` each
    result says how unsure the network was, for which a semantic one's logits are computed, whatever
    the engine's usual graph. Raises BundleError for a bundle that cannot be trusted, EngineError
    when the engine does not run it, ConfigError for rules that it has no use for, and ParityError
    when "auto" may take none. It may be called from several threads.
    """

    def __init__(
        self,
        bundle: Bundle | Path | str | None = None,
        engine: str | Engine = "auto",
        *,
        rules: SegmentRules | None = None,
        uncertainty: bool = False,
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
        manifest = self.bundle.manifest
        if rules is not None and manifest.task == "semantic":
            raise ConfigError(
                f"{self.bundle.path} is for semantic segmentation, which has no scores: leave out "
                "the rules for segments"
            )
        self._rules = rules or manifest.segment_rules
        self._uncertainty = uncertainty
        kind: Kind | None = "logits" if uncertainty and manifest.task == "semantic" else None
        if isinstance(engine, str):
            self._engine = open_engine(self.bundle, engine, kind)
        elif kind is None or engine.kind == kind:
            self._engine = engine
        else:
            raise ConfigError(f"uncertainty needs logits, and {engine.name} gives a class map")
        self._graph = self.bundle.graph(self._engine.kind)

    @property
    def labels(self) -> LabelMap:
        """Names and colours of the classes."""
        return self.bundle.manifest.labels

    @property
    def model_id(self) -> str:
        """The model's name and the first digits of its hash."""
        return self.bundle.model_id

    @property
    def engine(self) -> str:
        """The name of the engine that runs."""
        return self._engine.name

    @property
    def max_batch(self) -> int:
        """How many images go through the engine at once, at most."""
        return self.bundle.manifest.input.max_batch

    @property
    def unverified_reason(self) -> str | None:
        """Why these masks are not proven to be the trained model's; None if verify has passed this
        bundle on this engine and device."""
        engine = self._engine
        return unverified_reason(self.bundle.graph(engine.kind), engine.name, engine.device)

    @overload
    def __call__(self, image: ImageInput) -> Segmentation: ...
    @overload
    def __call__(self, image: list[_Given] | tuple[_Given, ...]) -> list[Segmentation]: ...
    def __call__(
        self, image: ImageInput | list[_Given] | tuple[_Given, ...]
    ) -> Segmentation | list[Segmentation]:
        """Segment an image of any size, or each of a list of them, in order.

        An image is the name of a file (PNG, JPEG, BMP, TIFF, WebP), a PIL image, or an array uint8
        [H, W, 3] RGB. Files and PIL images become upright RGB as training reads them: turned by
        their EXIF data, without transparency, 16 bits as 8. Each result keeps its ``image``, an
        array the very one that was given. Raises SourceError for what is no image, EngineError
        when the engine fails.
        """
        if not isinstance(image, list | tuple):
            return self([image])[0]
        step, results = self.max_batch, []
        for start in range(0, len(image), step):
            images = [read_given(one) for one in image[start : start + step]]
            shown = zip(self._group(images), images, strict=True)
            results += [replace(result, image=one) for result, one in shown]
        return results

    def batch(self, frames: Sequence[NDArray[np.uint8]]) -> list[Segmentation]:
        """Segment frames of a stream, uint8 [H, W, 3] RGB, each of any size; one result per frame,
        in order, which keeps no image.

        They go through the engine in groups of the model's largest batch. Raises SourceError for a
        frame of another type or shape, EngineError when the engine fails.
        """
        step = self.max_batch
        return [
            result
            for start in range(0, len(frames), step)
            for result in self._group(frames[start : start + step])
        ]

    def _group(self, frames: Sequence[NDArray[np.uint8]]) -> list[Segmentation]:
        fitted, fit_times = [], []
        for frame in frames:
            started = perf_counter()
            fitted.append(fit_to_input(frame, self.bundle.manifest.input))
            fit_times.append(perf_counter() - started)
        started = perf_counter()
        images = [image for image, _ in fitted]
        # A lone frame needs no copy to become a batch.
        outputs = self._engine.infer(images[0][None] if len(images) == 1 else np.stack(images))
        infer_time = (perf_counter() - started) / len(frames)
        results = []
        for index, ((_, geometry), fit_time) in enumerate(zip(fitted, fit_times, strict=True)):
            started = perf_counter()
            given = {spec.meaning: outputs[spec.name][index] for spec in self._graph.outputs}
            try:
                result = self._result(given, geometry)
            except ValueError as error:
                raise EngineError(f"{self.engine}: {error}; check it with verify") from error
            post_time = perf_counter() - started
            seconds = {"preprocess": fit_time, "infer": infer_time, "postprocess": post_time}
            timings = {stage: 1000 * value for stage, value in seconds.items()}
            results.append(replace(result, timings=timings))
        return results

    def _result(self, given: Mapping[Meaning, NDArray[Any]], geometry: Geometry) -> Segmentation:
        """One image's outputs at the image's size."""
        if "class_map" in given:
            return Segmentation(restore_class_map(given["class_map"], geometry), self.labels)
        if "semantic_logits" in given:
            logits = given["semantic_logits"]
            unsure = pixel_uncertainty(logits, geometry) if self._uncertainty else None
            found = Segmentation(class_map(logits, geometry), self.labels)
            return replace(found, uncertainty=unsure)
        classes, masks = given["class_logits"], given["mask_logits"]
        task = self.bundle.manifest.task
        found = find_segments(task, classes, masks, geometry, self.labels, self._rules)
        unsure = segment_uncertainty(found) if self._uncertainty else None
        return replace(found, uncertainty=unsure)

    def self_test(self, policy: SelfTestPolicy = "refuse") -> SelfTest | None:
        """The golden tensors through this engine; see ``golden.check_at_start``."""
        return check_at_start(self.bundle, self._engine, policy)

    def warm_up(self, largest: int = 1) -> None:
        """Run blank images in batches of 1 … ``largest`` (at most ``max_batch``): what an engine
        does once for each, such as taking memory, is then done. Raises EngineError."""
        size = self.bundle.manifest.input.size
        for count in range(1, min(largest, self.max_batch) + 1):
            self._engine.infer(np.zeros((count, *size, 3), np.uint8))

    def close(self) -> None:
        """Free the engine; a second call does nothing."""
        self._engine.close()
