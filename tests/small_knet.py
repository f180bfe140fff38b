"""A small K-Net that sees several classes, and bundles made of it: fixtures for all tests.

PyTorch is imported by the fixtures, so that the runtime's tests run where it is not installed.
"""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from made_once import made_once

from knet_runtime.bundle.store import Bundle, open_bundle
from knet_synthetic import CAMVID11, Street

SIZE = (64, 96)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained for a few seconds: random weights would see one class everywhere."""
    return made_once(tmp_path_factory, "run", _train) / "best.safetensors"


def _train(folder: Path) -> None:
    import torch

    from knet_train.checkpoint import save_checkpoint
    from knet_train.config import load_config
    from knet_train.loss import training_loss
    from knet_train.models.build import build_model

    config = load_config(
        "knet-edge",
        [
            f"data.eval_size={list(SIZE)}",
            "model.backbone=resnet10t",
            "model.channels=32",
            "model.update_channels=32",
            "model.ffn_channels=64",
        ],
    )
    torch.manual_seed(3)
    model = build_model(config.model, CAMVID11.num_classes).train()
    scenes = [Street(seed, SIZE).frame(0) for seed in range(8)]
    images = torch.from_numpy(np.stack([scene[0] for scene in scenes]))
    labels = torch.from_numpy(np.stack([scene[1] for scene in scenes]))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(30):
        optimizer.zero_grad()
        loss = training_loss(
            model.stage_logits(images), None, labels, config.loss, torch.ones(11), 11
        )
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        won = model.eval()(images).argmax(1)
    assert len(won.unique()) >= 4, "a map of one class would agree with anything"
    save_checkpoint(folder / "best.safetensors", model, config, CAMVID11)


@pytest.fixture(scope="session")
def small_bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The checkpoint's fp32 bundle; tests that record something in it copy it first."""
    from knet_export.export import export_bundle

    folder = made_once(
        tmp_path_factory, "small", lambda out: export_bundle(checkpoint, out / "small.knet")
    )
    return open_bundle(folder / "small.knet")


@pytest.fixture(scope="session")
def free_bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same for images of 64×64 to 256×512."""
    from knet_export.export import export_bundle
    from knet_export.spec import size_range

    sizes = size_range((64, 64), (256, 512))
    folder = made_once(
        tmp_path_factory,
        "free",
        lambda out: export_bundle(checkpoint, out / "free.knet", sizes=sizes),
    )
    return open_bundle(folder / "free.knet")


@pytest.fixture(scope="session")
def streets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight labelled pictures of another size than the model's, in the layout of a data set."""
    root = tmp_path_factory.mktemp("streets") / "streets"
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True)
    for number in range(8):
        image, label = Street(40 + number, (90, 130)).frame(2)
        cv2.imwrite(str(root / f"images/{number:02}.png"), image[..., ::-1])
        cv2.imwrite(str(root / f"labels/{number:02}.png"), label)
    (root / "labels.json").write_text(
        json.dumps({"class_names": CAMVID11.names, "ignore_index": 11})
    )
    return root
