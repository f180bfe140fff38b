from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from knet_train.config import Config
from knet_train.data.dataset import open_folder
from knet_train.evaluate import evaluate, input_spec, predict, predict_logits
from knet_train.models.knet import KNet


def test_the_input_is_what_the_configuration_says(tiny_config: Callable[..., Config]) -> None:
    spec = input_spec(tiny_config("data.eval_resize=letterbox"))
    assert (spec.height, spec.width, spec.resize) == (64, 96, "letterbox")


def test_logits_are_the_last_stages(tiny_model: KNet) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    logits = predict_logits(tiny_model, image)
    assert (logits.shape, logits.dtype) == ((3, 16, 24), np.float32)
    with torch.no_grad():
        expected = tiny_model(torch.from_numpy(image)[None])[0]
    np.testing.assert_array_equal(logits, expected.numpy())


@pytest.mark.parametrize("resize", ["stretch", "letterbox"])
@pytest.mark.parametrize("size", [(64, 96), (37, 81), (200, 120)])
def test_a_class_map_has_the_images_own_size(
    tiny_model: KNet, tiny_config: Callable[..., Config], resize: str, size: tuple[int, int]
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    predicted = predict(tiny_model, image, tiny_config(f"data.eval_resize={resize}"))
    assert predicted.shape == size
    assert predicted.max() < 3


def test_a_fitting_image_is_upsampled_as_torch_would(
    tiny_model: KNet, tiny_config: Callable[..., Config]
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    logits = torch.from_numpy(predict_logits(tiny_model, image))[None]
    full = F.interpolate(logits, (64, 96), mode="bilinear", align_corners=False)[0]
    top = full.topk(2, dim=0).values
    clear = (top[0] - top[1] > 1e-4).numpy()
    predicted = predict(tiny_model, image, tiny_config())
    np.testing.assert_array_equal(predicted[clear], full.argmax(0).numpy()[clear])


def test_scores_count_every_labelled_pixel_of_the_split(
    tiny_model: KNet, tiny_config: Callable[..., Config], make_folder: Callable[..., Path]
) -> None:
    folder = open_folder(make_folder(["a", "b"], size=(50, 70)), "all")
    confusion = evaluate(tiny_model, folder, tiny_config())
    labelled = sum(int((folder.read(index)[1] != 255).sum()) for index in range(2))
    assert int(confusion.matrix.sum()) == labelled
    for index in range(2):
        image, label = folder.read(index)
        agree = predict(tiny_model, image, tiny_config()) == label
        labelled -= int(agree.sum())
    assert int(np.trace(confusion.matrix)) == int(confusion.matrix.sum()) - labelled
