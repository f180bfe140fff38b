"""What a bundle is compared with: the trained checkpoint in PyTorch, or another bundle.

A reference gives logits for the very pixels that the bundle's graph sees. Only the checkpoint's
needs PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from knet_runtime.bundle.manifest import Meaning
from knet_runtime.bundle.store import Bundle, find_bundle, open_bundle
from knet_runtime.engines import open_engine
from knet_runtime.errors import BundleError, CheckpointError, ParityError
from knet_runtime.types import Closeable

if TYPE_CHECKING:
    from knet_train.checkpoint import Checkpoint, SegmentCheckpoint

_ENGINE = "onnxruntime-cpu"

Outputs = Mapping[Meaning, NDArray[np.float32]]


class Reference(Protocol):
    """The model as it should be."""

    @property
    def name(self) -> str:
        """What it is, in words."""

    @property
    def checkpoint_sha256(self) -> str:
        """The checkpoint that it is, or was made from."""

    def check(self, bundle: Bundle) -> None:
        """Raise the KnetError that says so when it cannot be compared with ``bundle``."""

    def outputs(self, fitted: NDArray[np.uint8]) -> Outputs:
        """uint8 [H, W, 3] RGB at the bundle's input size -> what the network gives, float32."""

    def stage_masks(self, fitted: NDArray[np.uint8]) -> list[NDArray[np.float32]] | None:
        """Of such an image the mask logits [N, H/8, W/8] of the first kernels and of every stage,
        of a network for segments; None where only a graph's own outputs are known."""


@contextmanager
def open_reference(against: Path, bundle: Bundle) -> Iterator[Reference]:
    """What ``bundle`` is to be compared with: a checkpoint, or another bundle: its folder, or the
    name of a packaged one.

    Raises CheckpointError or BundleError, and ImportError for a checkpoint without PyTorch.
    """
    against = find_bundle(against)
    if against.is_dir():
        with BundleReference(open_bundle(against), bundle) as other:
            yield other
        return
    from knet_train.checkpoint import read_any_checkpoint

    yield TorchReference(read_any_checkpoint(against))


class TorchReference:
    """The trained checkpoint itself, in PyTorch and float32."""

    name = "PyTorch, float32"

    def __init__(self, checkpoint: Checkpoint | SegmentCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.checkpoint_sha256 = checkpoint.sha256

    def check(self, bundle: Bundle) -> None:
        """Raise CheckpointError when the two are not the same kind of model."""
        manifest, checkpoint = bundle.manifest, self.checkpoint
        model = checkpoint.config.model
        stride = model.stride if model.task == "semantic" else _stride(bundle)
        ours = checkpoint.labels.names, model.task, stride
        if ours != (manifest.labels.names, manifest.task, _stride(bundle)):
            raise CheckpointError(
                f"the checkpoint ({checkpoint.config.preset}, {checkpoint.labels.num_classes} "
                f"classes) is not the model of {bundle.path} ({manifest.provenance.preset}, "
                f"{manifest.labels.num_classes} classes): pass the one that it was exported from"
            )

    def outputs(self, fitted: NDArray[np.uint8]) -> Outputs:
        """See ``Reference``. Raises CheckpointError when they hold NaN or infinity."""
        from knet_train.checkpoint import Checkpoint
        from knet_train.inference import predict_logits, predict_segment_logits

        if isinstance(self.checkpoint, Checkpoint):
            return {"semantic_logits": predict_logits(self.checkpoint.model, fitted[None])[0]}
        classes, masks = predict_segment_logits(self.checkpoint.model, fitted[None])
        return {"class_logits": classes[0], "mask_logits": masks[0]}

    def stage_masks(self, fitted: NDArray[np.uint8]) -> list[NDArray[np.float32]] | None:
        """See ``Reference``."""
        from knet_train.checkpoint import Checkpoint
        from knet_train.inference import predict_stage_masks

        if isinstance(self.checkpoint, Checkpoint):
            return None
        return predict_stage_masks(self.checkpoint.model, fitted)


class BundleReference(Closeable):
    """Another bundle, run by ONNX Runtime on the CPU.

    Raises BundleError unless it takes the same images as ``bundle`` and gives the same kind of
    logits: nothing is resized to make two shapes meet.
    """

    def __init__(self, other: Bundle, bundle: Bundle) -> None:
        ours, theirs = bundle.manifest, other.manifest
        self._other = other
        self._classes, self._stride = theirs.labels.names, _stride(other)
        self._task = theirs.task
        self._resize = theirs.input.resize
        self.check(bundle)
        self._other = other.with_input_size(ours.input.size)
        self._engine = open_engine(self._other, _ENGINE, "logits")
        self._outputs = other.graph("logits").outputs
        self.name = f"{other.model_id} ({other.manifest.precision}) on {_ENGINE}"
        self.checkpoint_sha256 = theirs.provenance.checkpoint_sha256

    def check(self, bundle: Bundle) -> None:
        """Raise BundleError when the two have other classes, strides or ways to fit an image."""
        ours = bundle.manifest
        if ours.labels.names != self._classes:
            what = f"other classes ({len(ours.labels.names)} against {len(self._classes)})"
        elif ours.task != self._task:
            what = f"other tasks ({ours.task} against {self._task})"
        elif _stride(bundle) != self._stride:
            what = f"other strides ({_stride(bundle)} against {self._stride})"
        elif ours.input.resize != self._resize:
            what = f"other ways to fit an image ({ours.input.resize} against {self._resize})"
        else:
            return
        raise BundleError(
            f"{bundle.path} and {self._other.path} have {what}: compare bundles of one model"
        )

    def outputs(self, fitted: NDArray[np.uint8]) -> Outputs:
        """See ``Reference``. Raises ParityError when they hold NaN or infinity."""
        given = self._engine.infer(fitted[None])
        found: Outputs = {output.meaning: given[output.name][0] for output in self._outputs}
        if not all(np.isfinite(array).all() for array in found.values()):
            raise ParityError(f"{self._other.path} gives NaN or infinity: it is no reference")
        return found

    def stage_masks(self, _fitted: NDArray[np.uint8]) -> list[NDArray[np.float32]] | None:
        """See ``Reference``."""
        return None

    def close(self) -> None:
        """Close its engine."""
        self._engine.close()


def _stride(bundle: Bundle) -> int | None:
    strides = [output.stride for output in bundle.graph("logits").outputs]
    return next((stride for stride in strides if stride is not None), None)
