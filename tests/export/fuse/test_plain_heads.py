"""Networks without update stages: the plain heads that knet-edge is compared with."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from made_once import made_once
from safetensors.torch import save_file

from knet_export.data import open_images
from knet_export.export import export_bundle
from knet_export.verify.reference import TorchReference
from knet_export.verify.verify import verify
from knet_runtime.engines import open_engine
from knet_train.checkpoint import read_checkpoint
from knet_train.config import Config, ModelConfig, load_config
from knet_train.fit import train
from knet_train.models.backbones import build_backbone
from knet_train.models.build import build_model
from knet_train.models.knet import KNet

PLAIN = (
    "model.channels=32",
    "model.update_channels=32",
    "model.stages=0",
    "loss.stage_weights=[1.0]",
    "data.eval_size=[64, 96]",
    "data.crop=[64, 64]",
    "data.synthetic_share=0",
    "data.train_split=all",
    "data.val_split=all",
    "optim.steps=3",
    "optim.batch_size=2",
    "optim.warmup_steps=1",
    "trainer.val_every=3",
    "trainer.workers=0",
    "trainer.precision=32-true",
)
Build = Callable[[ModelConfig, int], KNet]


@pytest.fixture(scope="module")
def lraspp() -> ModuleType:
    path = Path(__file__).parents[3] / "benchmarks" / "lraspp.py"
    spec = importlib.util.spec_from_file_location("lraspp", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained(config: Config, data: Path, folder: Path, build: Build) -> Path:
    weights = folder / "backbone.safetensors"
    torch.manual_seed(0)
    save_file(build_backbone(config.model).state_dict(), weights)
    return train(config, data, folder / "run", backbone_weights=weights, build=build).last


@pytest.fixture(scope="session")
def plain(streets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a trained network without stages."""
    config = load_config("knet-edge", [*PLAIN, "model.backbone=resnet10t"])
    folder = made_once(
        tmp_path_factory, "plain-head", lambda out: trained(config, streets, out, build_model)
    )
    return folder / "run" / "last.safetensors"


def test_a_network_without_stages_trains_exports_and_verifies(
    plain: Path, streets: Path, tmp_path: Path
) -> None:
    checkpoint = read_checkpoint(plain)
    bundle = export_bundle(plain, tmp_path / "plain.knet")
    images = open_images(streets, "all", bundle.manifest.labels)
    for kind in ("logits", "classmap"):
        with open_engine(bundle, "onnxruntime-cpu", kind) as backend:
            report = verify(bundle, backend, TorchReference(checkpoint), images, images.name)
        assert report.passed, report.failures
        assert report.images == 8


def test_a_network_without_stages_exports_to_halves(plain: Path, tmp_path: Path) -> None:
    half = export_bundle(plain, tmp_path / "half.knet", precision="fp16")
    assert half.graph("logits").parity[0].passed


def test_the_lr_aspp_peer_gives_logits_of_its_stride_and_is_exported(
    lraspp: ModuleType, streets: Path, tmp_path: Path
) -> None:
    config = load_config("knet-edge", [*PLAIN, "model.output_stride=16", "model.stride=8"])
    path = trained(config, streets, tmp_path, lraspp.LRASPP)
    checkpoint = read_checkpoint(path, lraspp.LRASPP)
    images = torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8)
    levels = checkpoint.model.levels(images)
    assert [tuple(level.shape[2:]) for level in levels] == [(8, 12), (4, 6), (4, 6)]
    with torch.no_grad():
        logits = checkpoint.model(images)
        head = checkpoint.model.head
        # As published and in torchvision, where the upsampled features are classified.
        published = head({"low": levels[0], "high": levels[-1]})
    assert logits.shape == (2, 11, 8, 12)
    torch.testing.assert_close(logits, published, rtol=1e-4, atol=1e-4)

    bundle = lraspp.export(checkpoint, tmp_path / "peer.knet")
    with open_engine(bundle, "onnxruntime-cpu") as backend:
        got = backend.infer(images[:1].numpy())["logits"]
    np.testing.assert_allclose(got, logits[:1].numpy(), atol=1e-4 * float(logits.abs().max()))
