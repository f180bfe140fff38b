"""A network and a data folder that train in seconds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from knet_runtime.labels import LabelMap
from knet_train.backbones import build_backbone
from knet_train.build import build_model
from knet_train.config import Config, load_config
from knet_train.knet import KNet

TINY = (
    "model.channels=32",
    "model.stages=1",
    "model.heads=2",
    "model.ffn_channels=64",
    "data.eval_size=[64, 96]",
    "data.crop=[64, 64]",
    "data.synthetic_share=0",
    "loss.stage_weights=[1.0, 1.0]",
    "optim.steps=6",
    "optim.batch_size=2",
    "optim.warmup_steps=2",
    "trainer.val_every=2",
    "trainer.workers=0",
    "trainer.precision=32-true",
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and sums keep their order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny_config() -> Callable[..., Config]:
    """The preset, shrunk; more overrides go on top."""
    return lambda *overrides: load_config("knet-edge", [*TINY, *overrides])


@pytest.fixture
def tiny_labels() -> LabelMap:
    return LabelMap(("road", "sky", "car"), ((128, 64, 128), (0, 0, 255), (255, 0, 0)), 255)


@pytest.fixture
def tiny_model(tiny_config: Callable[..., Config]) -> KNet:
    torch.manual_seed(0)
    return build_model(tiny_config().model, 3).eval()


@pytest.fixture(scope="session")
def backbone_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the whole shape of ImageNet's, without their meaning."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("backbone") / "model.safetensors"
    save_file(build_backbone(load_config("knet-edge").model).state_dict(), path)
    return path


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """A data folder: pictures by stem (which may hold a folder), coloured by their class."""

    def make(
        stems: Sequence[str] = tuple("abcdef"),
        size: tuple[int, int] = (64, 96),
        classes: Sequence[str] = ("road", "sky", "car"),
        root: str = "data",
    ) -> Path:
        folder = tmp_path / root
        rng = np.random.default_rng(0)
        for stem in stems:
            label = np.zeros(size, np.uint8)
            label[: size[0] // 2] = 1
            top, left = int(rng.integers(size[0] // 2)), int(rng.integers(size[1] // 2))
            label[top : top + size[0] // 3, left : left + size[1] // 3] = 2
            image = np.stack([label * 100, 255 - label * 60, label * 20 + 40], -1)
            image = (image * 0.9 + rng.integers(0, 20, image.shape)).astype(np.uint8)
            label[0] = 255
            write(folder / "images" / f"{stem}.png", image)
            write(folder / "labels" / f"{stem}.png", label)
        (folder / "labels.json").write_text(json.dumps({"class_names": list(classes)}))
        return folder

    return make


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
