"""Where a new run's weights come from, other than ImageNet: one of our own checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from knet_runtime.errors import CheckpointError
from knet_train.checkpoint import FORMAT, read_tensors
from knet_train.knet import KNet

log = logging.getLogger(__name__)

# A row per class in each; with other classes they start afresh.
_CLASSIFIERS = (
    "conv_seg.weight",
    "conv_seg.bias",
    "auxiliary.conv_seg.weight",
    "auxiliary.conv_seg.bias",
)


def load_initial(model: KNet, path: Path) -> None:
    """All weights of a checkpoint of the same architecture into ``model``.

    Classifiers of another number of classes keep their new weights, and so does an auxiliary
    classifier that the checkpoint has not; both are logged. Raises CheckpointError naming the
    first weight that is missing, misshapen, foreign, or not finite.
    """
    metadata, state = read_tensors(
        path, "--init wants one that `knet-deploy train` or `import-mmseg` wrote"
    )
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no checkpoint of `knet-deploy train` or `import-mmseg`; weights of a "
            "backbone alone go to --backbone-weights"
        )
    needed = model.state_dict()
    fresh = []
    if not any(key.startswith("auxiliary.") for key in state):
        fresh += [key for key in needed if key.startswith("auxiliary.")]
    for key in _CLASSIFIERS:
        if key in state and key in needed and state[key].shape != needed[key].shape:
            fresh.append(key)
    for key in needed:
        if key in fresh:
            continue
        if key not in state:
            raise CheckpointError(f"{path} has no weight {key}: it is another architecture")
        if state[key].shape != needed[key].shape:
            raise CheckpointError(
                f"{path} has {key} as {list(state[key].shape)}, the model as "
                f"{list(needed[key].shape)}: pass the preset and the settings it was trained with"
            )
        if not torch.isfinite(state[key]).all():
            raise CheckpointError(f"{path}: {key} holds values that are not finite: it is broken")
    foreign = [key for key in state if key not in needed and not key.startswith("auxiliary.")]
    if foreign:
        raise CheckpointError(f"{path} has the weight {foreign[0]}, which the model has not")
    taken = {key: state[key] for key in needed if key not in fresh}
    model.load_state_dict(taken, strict=False)
    log.info("%d of %d weights taken from %s", len(taken), len(needed), path)
    if fresh:
        log.warning("%s does not hold these for this model, they start afresh: %s", path, fresh)
