from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from knet_runtime.segmentation import Segmentation
from knet_train.config import Config
from knet_train.data.dataset import open_folder
from knet_train.evaluate import evaluate, together
from knet_train.inference import predict
from knet_train.models.knet import KNet


def test_scores_count_every_labelled_pixel_of_the_split(
    tiny_model: KNet, tiny_config: Callable[..., Config], make_folder: Callable[..., Path]
) -> None:
    folder = open_folder(make_folder(["a", "b"], size=(50, 70)), "all")
    by_drive = evaluate(
        lambda image: Segmentation(predict(tiny_model, image, tiny_config()), folder.labels), folder
    )
    confusion = together(by_drive, folder.labels)
    labelled = sum(int((folder.read(index)[1] != 255).sum()) for index in range(2))
    assert int(confusion.matrix.sum()) == labelled
    for index in range(2):
        image, label = folder.read(index)
        agree = predict(tiny_model, image, tiny_config()) == label
        labelled -= int(agree.sum())
    assert int(np.trace(confusion.matrix)) == int(confusion.matrix.sum()) - labelled
