"""Scores of a PyTorch model, by the runtime's own preprocessing, upsampling and metrics."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from knet_runtime.manifest import InputSpec
from knet_runtime.metrics import ConfusionMatrix
from knet_runtime.postprocess import class_map
from knet_runtime.preprocess import fit
from knet_train.config import Config
from knet_train.dataset import LabelledFolder
from knet_train.knet import KNet


def input_spec(config: Config) -> InputSpec:
    """The network's input as training evaluates it and export fixes it."""
    height, width = config.data.eval_size
    return InputSpec(
        name="image", height=height, width=width, resize=config.data.eval_resize, max_batch=16
    )


@torch.no_grad()
def predict_logits(model: KNet, image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A fitted image uint8 [H, W, 3] RGB -> the last stage's logits float32 [N, H/s, W/s]."""
    device = model.mean.device
    batch = torch.from_numpy(image).to(device).permute(2, 0, 1)[None]
    logits: NDArray[np.float32] = model(batch)[-1][0].float().cpu().numpy()
    return logits


def predict(model: KNet, image: NDArray[np.uint8], config: Config) -> NDArray[np.integer]:
    """An image uint8 [h, w, 3] RGB of any size -> its class map [h, w]. The model must be in
    evaluation mode."""
    fitted, geometry = fit(image, input_spec(config), config.model.stride)
    return class_map(predict_logits(model, fitted), geometry, config.model.stride)


def evaluate(model: KNet, folder: LabelledFolder, config: Config) -> ConfusionMatrix:
    """Confusion matrix over a split, at the images' own sizes. The model must be in evaluation
    mode."""
    confusion = ConfusionMatrix(folder.labels.num_classes, folder.labels.ignore_index)
    for prediction, label in _pairs(model, folder, config):
        confusion.update(prediction, label)
    return confusion


def _pairs(
    model: KNet, folder: LabelledFolder, config: Config
) -> Iterator[tuple[NDArray[np.integer], NDArray[np.uint8]]]:
    for index in range(len(folder)):
        image, label = folder.read(index)
        yield predict(model, image, config), label
