"""Shrunk networks of mmsegmentation: their stored numbers, their weights, and ours to match."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from knet_train import mmseg
from knet_train.config import Config, load_config
from knet_train.models.backbones import _OPTIONS

TESTS = Path(__file__).resolve().parents[2]
SHRUNK = (
    "model.channels=16",
    "model.heads=2",
    "model.update_channels=8",
    "model.ffn_channels=32",
    "model.auxiliary_channels=8",
)
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tiny() -> Mapping[str, np.ndarray]:
    with np.load(TESTS / "train" / "mmseg" / "data" / "mmseg_tiny.npz") as file:
        return dict(file)


@pytest.fixture
def state_of(tiny: Mapping[str, np.ndarray], shrunk: None) -> Callable[[str], State]:
    """The drawn state dict of a shrunk network of mmsegmentation."""
    draw = runpy.run_path(str(TESTS / "reference" / "make_fixture.py"))["draw"]

    def make(name: str) -> State:
        shapes = json.loads(tiny[f"{name}/shapes"].tobytes())
        return {key: torch.from_numpy(draw(key, tuple(shape))) for key, shape in shapes.items()}

    return make


@pytest.fixture
def shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets and their backbones at the widths of the stored networks."""
    create: Callable[..., Any] = timm.create_model

    def create_shrunk(name: str, **options: Any) -> Any:
        if name.startswith("swin_"):
            options |= {"embed_dim": 4, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4)}
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", create_shrunk)
    monkeypatch.setitem(_OPTIONS, "resnet50c", {"channels": (2, 4, 8, 16), "stem_width": 2})
    monkeypatch.setattr(mmseg, "load_config", shrunk_config)


def shrunk_config(preset: str) -> Config:
    return load_config(preset, SHRUNK if preset != "knet-edge" else ())


@pytest.fixture
def state(state_of: Callable[[str], State]) -> State:
    return state_of("r50_fcn")


@pytest.fixture
def pth(tmp_path: Path, state: State) -> Path:
    path = tmp_path / "knet.pth"
    torch.save({"meta": {"CLASSES": None}, "state_dict": state}, path)
    return path
