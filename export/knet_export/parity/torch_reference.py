"""The trained checkpoint itself, in PyTorch and float32, as what an artefact is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from knet_runtime.bundle import Bundle
from knet_runtime.errors import CheckpointError
from knet_train.checkpoint import Checkpoint
from knet_train.evaluate import predict_logits

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class TorchReference:
    """A checkpoint as ``knet_export.parity.reference.Reference``."""

    name = "PyTorch, float32"

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.checkpoint_sha256 = checkpoint.sha256

    def check(self, bundle: Bundle) -> None:
        """Raise CheckpointError when the two are not the same kind of model."""
        manifest, checkpoint = bundle.manifest, self.checkpoint
        stride = manifest.output.stride
        ours = checkpoint.labels.names, checkpoint.config.model.stride
        if ours != (manifest.labels.names, stride):
            raise CheckpointError(
                f"the checkpoint ({checkpoint.config.preset}, {checkpoint.labels.num_classes} "
                f"classes) is not the model of {bundle.path} ({manifest.provenance.preset}, "
                f"{manifest.labels.num_classes} classes): pass the one that it was exported from"
            )

    def logits(self, fitted: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See ``Reference``. Raises CheckpointError when they hold NaN or infinity."""
        return predict_logits(self.checkpoint.model, fitted)
