"""Small K-Nets for instances and panoptic segmentation that find something, and bundles of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from made_once import made_once

from knet_runtime.bundle.store import Bundle, open_bundle, write_bundle
from knet_runtime.labels import LabelMap, distinct_palette
from knet_runtime.types import Task

if TYPE_CHECKING:
    from knet_train.config import Config
    from knet_train.models.segments import SegmentKNet

SIZE = (64, 96)
TASKS: tuple[Task, ...] = ("instance", "panoptic")


def labels_of(task: Task) -> LabelMap:
    """Five things; and three classes of stuff, in between, where the task has them."""
    things = (0, 1, 3, 4, 6) if task == "panoptic" else (0, 1, 2, 3, 4)
    count = 8 if task == "panoptic" else 5
    names = tuple(f"class {index}" for index in range(count))
    return LabelMap(names, distinct_palette(count), 255, things)


def segment_config(task: Task, *settings: str) -> Config:
    from knet_train.config import load_config

    return load_config(
        f"knet-r50-fpn-{task}",
        [
            "model.backbone=resnet10t",
            "model.channels=32",
            "model.update_channels=32",
            "model.ffn_channels=48",
            "model.kernels=12",
            f"data.eval_size={list(SIZE)}",
            *settings,
        ],
    )


def segment_knet(task: Task, config: Config | None = None) -> SegmentKNet:
    """Untrained, but sure of several classes and masks: with those of new weights, which find
    nothing, one result would equal any other."""
    import numpy as np
    import torch
    from torch import nn

    from knet_synthetic import Street
    from knet_train.models.build import build_segment_model

    torch.manual_seed(6)
    model = build_segment_model((config or segment_config(task)).model, labels_of(task)).eval()
    images = np.stack([Street(seed, SIZE).frame(0)[0] for seed in range(2)])
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
        for stage in model.stages:
            nn.init.normal_(stage.fc_class.weight, std=0.5)
            nn.init.normal_(stage.fc_class.bias)
            nn.init.normal_(stage.fc_mask.weight, std=0.5)
            # Kernels stay near what they are, or a pixel that rounding turns would turn many.
            nn.init.constant_(stage.updator.norm_in.bias, -4)
            nn.init.constant_(stage.updator.input_norm_in.bias, 4)
            location, semantic = model.head(model.levels(torch.from_numpy(images)))
            mean = stage.feat_transform(location + semantic).mean((0, 2, 3))
            stage.feat_transform.bias -= mean  # masks are neither empty nor everywhere
        found = model(torch.from_numpy(images))
    assert 0.2 < float((found.masks > 0).float().mean()) < 0.8
    assert int((found.classes.amax(2) > 0).sum()) > 4
    return model


def save_segment_knet(task: Task, path: Path) -> Path:
    from knet_train.checkpoint import save_checkpoint

    save_checkpoint(path, segment_knet(task), segment_config(task), labels_of(task))
    return path


def _checkpoint(factory: pytest.TempPathFactory, task: Task) -> Path:
    folder = made_once(factory, task, lambda out: save_segment_knet(task, out / "best.safetensors"))
    return folder / "best.safetensors"


def _bundle(factory: pytest.TempPathFactory, checkpoint: Path) -> Bundle:
    from knet_export.export import export_bundle

    folder = made_once(
        factory,
        f"{checkpoint.parent.name}-bundle",
        lambda out: export_bundle(checkpoint, out / "small.knet", max_batch=2),
    )
    return open_bundle(folder / "small.knet")


@pytest.fixture(scope="session", params=TASKS)
def segment_checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A checkpoint of each task."""
    return _checkpoint(tmp_path_factory, request.param)


@pytest.fixture(scope="session")
def segment_bundle(segment_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Its fp32 bundle."""
    return _bundle(tmp_path_factory, segment_checkpoint)


@pytest.fixture(scope="session")
def instance_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _checkpoint(tmp_path_factory, "instance")


@pytest.fixture(scope="session")
def instance_bundle(instance_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return _bundle(tmp_path_factory, instance_checkpoint)


@pytest.fixture(scope="session")
def panoptic_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _checkpoint(tmp_path_factory, "panoptic")


def spoilt(bundle: Bundle, path: Path) -> tuple[Bundle, str]:
    """The bundle with one weight of the second stage's kernels doubled, and the weight's name."""
    import numpy as np

    from knet_export.graph.onnx_graph import OnnxGraph
    from knet_export.graph.to_onnx import LOGITS_NAME

    graph = OnnxGraph.load(bundle.file(LOGITS_NAME))
    names = [
        name
        for node in graph.nodes
        if node.op_type in ("MatMul", "Gemm") and "stages.1." in node.name
        for name in node.input
        if name in graph.constants()
    ]
    (entry,) = (one for one in graph.model.graph.initializer if one.name == names[0])
    where = {item.key: item.value for item in entry.external_data}
    weights = bytearray(bundle.file(where["location"]).read_bytes())
    start, length = int(where.get("offset", 0)), int(where["length"])
    part = np.frombuffer(bytes(weights[start : start + length]), np.float32) * 2
    weights[start : start + length] = part.tobytes()
    files: dict[str, bytes | Path] = {
        name: bundle.file(name) for name in bundle.manifest.files if name != where["location"]
    }
    files[where["location"]] = bytes(weights)
    return write_bundle(path, bundle.manifest, files), names[0]
