"""The narrow networks whose numbers by the authors' own code are in shared/reference/unified."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from knet_train.foreign import map_state
from knet_train.models.knet import KernelUpdateStage
from knet_train.models.segments import LocalisationHead, SegmentKNet
from knet_train.published import published_name

WIDTH, KERNELS, THINGS = 64, 100, 80
Arrays = Mapping[str, Any]


class NarrowResNet(nn.Module):
    """torchvision's ResNet-50 at a sixteenth of its width."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4)
        inputs = 4
        for level, (planes, blocks) in enumerate(zip((4, 8, 16, 32), (3, 4, 6, 3), strict=True)):
            parts = []
            for block in range(blocks):
                stride = 2 if level and not block else 1
                shortcut = None
                if not block:
                    conv = nn.Conv2d(inputs, 4 * planes, 1, stride, bias=False)
                    shortcut = nn.Sequential(conv, nn.BatchNorm2d(4 * planes))
                parts.append(Bottleneck(inputs, planes, stride, shortcut))
                inputs = 4 * planes
            setattr(self, f"layer{level + 1}", nn.Sequential(*parts))

    def forward(self, image: Tensor) -> list[Tensor]:
        x = torch.max_pool2d(torch.relu(self.bn1(self.conv1(image))), 3, 2, 1)
        levels = []
        for level in range(1, 5):
            x = getattr(self, f"layer{level}")(x)
            levels.append(x)
        return levels


@pytest.fixture(scope="session")
def unified(request: pytest.FixtureRequest) -> Path:
    """The folder of the reference's numbers; skips where it is absent."""
    shared: Path = request.getfixturevalue("shared_data")
    folder = shared.parent / "reference" / "unified"
    if not folder.is_dir():
        pytest.skip(f"the reference's numbers are not at {folder}")
    return folder


@pytest.fixture(scope="session")
def narrow(unified: Path) -> Callable[[str], SegmentKNet]:
    """The narrow network of "inst" or "pan", with the reference's weights."""

    def make(task: str) -> SegmentKNet:
        classes = 133 if task == "pan" else THINGS
        model = SegmentKNet(
            NarrowResNet(),
            LocalisationHead((16, 32, 64, 128), WIDTH),
            [KernelUpdateStage(WIDTH, WIDTH, 8, 3 * WIDTH, classes) for _ in range(3)],
            channels=WIDTH,
            kernels=KERNELS,
            classes=classes,
            things=range(THINGS),
            panoptic=task == "pan",
            mean=(123.675, 116.28, 103.53),
            std=(58.395, 57.12, 57.375),
        )
        file = torch.load(unified / task / "checkpoint.pth", weights_only=True)
        weights, dropped, absent = map_state(file["state_dict"], model.state_dict(), published_name)
        assert (dropped, absent) == ({}, ())
        model.load_state_dict(weights)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def stored(unified: Path) -> Callable[[str], Arrays]:
    """The arrays of a file such as "pan/a_96x128"."""

    def load(name: str) -> Arrays:
        with np.load(unified / f"{name}.npz") as file:
            return {key: _plain(file[key]) for key in file.files}

    return load


def _plain(array: np.ndarray) -> Any:
    return json.loads(str(array)) if array.dtype.kind == "U" else array
