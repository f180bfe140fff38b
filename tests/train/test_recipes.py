"""The published presets, run as they are but for sizes; and a network that learns by heart."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from knet_runtime.segmentation import Segmentation
from knet_train.checkpoint import read_checkpoint
from knet_train.config import Config, load_config
from knet_train.data.dataset import open_folder
from knet_train.evaluate import evaluate, together
from knet_train.fit import train
from knet_train.inference import predict

PUBLISHED = ("r50-fcn", "r50-pspnet", "r50-deeplabv3", "r50-upernet", "swin-t-upernet")
SMALL = (
    "data.crop=[64, 64]",
    "data.eval_scale=[128, 64]",
    "data.eval_size=[64, 64]",
    "data.train_split=all",
    "data.val_split=all",
    "optim.steps=2",
    "optim.batch_size=2",
    "trainer.val_every=2",
    "trainer.workers=0",
    "trainer.precision=32-true",
    "trainer.devices=1",
    # The backbones are whole; what stands on them would be 300 MB of weights.
    "model.channels=64",
    "model.update_channels=64",
    "model.ffn_channels=128",
    "model.auxiliary_channels=32",
)

# The same eight crops at every step, as they are, at about a quarter of their size.
LEARN_BY_HEART = (
    "data.eval_size=[96, 128]",
    "data.crop=[96, 128]",
    "data.scale=[1.0, 1.0]",
    "data.aspect=1.0",
    "data.max_class_share=1.0",
    "data.flip=0.0",
    "data.photometric=0.0",
    "data.synthetic_share=0.0",
    "data.train_split=all",
    "data.val_split=all",
    "model.dropout=0.0",
    "loss.class_balance=0.0",
    "optim.steps=110",
    "optim.warmup_steps=9",
    "optim.lr=2e-3",
    "optim.weight_decay=0.0",
    "optim.ema_decay=0.8",
    "trainer.val_every=110",
    "trainer.workers=0",
    "trainer.precision=32-true",
    "trainer.devices=1",
)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_published_preset_trains(
    preset: str, make_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without ImageNet's weights. Swin-L runs the code of Swin-T."""
    monkeypatch.setattr("knet_train.fit.load_pretrained", lambda *_: None)
    data = make_folder(classes=("road", "sky", "car", "tree", "pole"), stems=("a", "b"))
    config = load_config(preset, SMALL)
    try:
        result = train(config, data, tmp_path / "run")
        stored = read_checkpoint(result.last)
        assert stored.config == config
        assert stored.model.auxiliary is not None
        assert all(torch.isfinite(value).all() for value in stored.model.state_dict().values())
        assert 0 <= result.best_score <= 1
    finally:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)  # hundreds of megabytes each


@pytest.fixture
def eight(shared_data: Path, tmp_path: Path) -> Path:
    """Eight real images, spread over CamVid's training split."""
    camvid, folder = shared_data / "camvid", tmp_path / "eight"
    samples = open_folder(camvid, "train").samples
    for sample in samples[:: len(samples) // 8][:8]:
        for part, path in (("images", sample.image), ("labels", sample.label)):
            (folder / part).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / part / path.name)
    shutil.copy(camvid / "labels.json", folder)
    return folder


@pytest.mark.slow
def test_eight_images_are_learnt_by_heart(eight: Path, shared_data: Path, tmp_path: Path) -> None:
    """Half a minute on one core. What a broken loss, schedule or average cannot do."""
    config: Config = load_config("knet-edge", LEARN_BY_HEART)
    weights = shared_data / "backbones" / "tf_efficientnet_lite0.safetensors"
    result = train(config, eight, tmp_path / "run", backbone_weights=weights)
    stored = read_checkpoint(result.last)
    folder = open_folder(eight, "all")
    scores = evaluate(
        lambda image: Segmentation(predict(stored.model, image, config), stored.labels), folder
    )
    assert together(scores, stored.labels).pixel_accuracy > 0.95
