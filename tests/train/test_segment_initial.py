"""Checkpoints of one task and label map as the beginning of another's training."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_segments import TASKS, labels_of, segment_config

from knet_runtime.errors import CheckpointError
from knet_runtime.labels import LabelMap, distinct_palette
from knet_train.checkpoint import (
    load_initial,
    read_checkpoint,
    read_segment_checkpoint,
    save_checkpoint,
)
from knet_train.config import Config
from knet_train.models.build import build_model, build_segment_model

THREE = LabelMap(("car", "person", "road"), distinct_palette(3), 255, (0, 1))


@pytest.mark.parametrize("task", TASKS)
def test_other_classes_or_another_task_of_objects_start_with_all_but_the_classifiers(
    segment_checkpoint: Path, task: Any, caplog: pytest.LogCaptureFixture
) -> None:
    labels = THREE if task == "panoptic" else LabelMap(("car",), ((0, 0, 9),), 255, (0,))
    model = build_segment_model(segment_config(task).model, labels)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        load_initial(model, segment_checkpoint)
    stored = load_file(segment_checkpoint)
    for key, value in model.state_dict().items():
        classifier = key.startswith("conv_seg.") or ".fc_class." in key
        assert torch.equal(value, before[key] if classifier else stored[key]), key
    (record,) = caplog.records
    assert "start afresh: ['conv_seg.weight'" in record.getMessage()


def test_more_kernels_than_the_checkpoint_has_are_refused(segment_checkpoint: Path) -> None:
    task = read_segment_checkpoint(segment_checkpoint).config.model.task
    config = segment_config(task, "model.kernels=13")
    with pytest.raises(CheckpointError, match=r"has init_kernels.weight as \[12, .* \[13, "):
        load_initial(build_segment_model(config.model, labels_of(task)), segment_checkpoint)


def test_a_checkpoint_of_semantic_segmentation_is_none_of_objects_nor_the_other_way_round(
    segment_checkpoint: Path, tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = tiny_config()
    semantic = tmp_path / "semantic.safetensors"
    save_checkpoint(semantic, build_model(config.model, 3), config, THREE)
    task = read_segment_checkpoint(segment_checkpoint).config.model.task
    with pytest.raises(CheckpointError, match="semantic segmentation, and this is for instance or"):
        read_segment_checkpoint(semantic)
    with pytest.raises(CheckpointError, match=f"is a network for {task} segmentation, and this is"):
        read_checkpoint(segment_checkpoint)
    model = build_segment_model(segment_config(task).model, labels_of(task))
    with pytest.raises(CheckpointError, match="it is another architecture"):
        load_initial(model, semantic)
    with pytest.raises(CheckpointError, match="it is another architecture"):
        load_initial(build_model(config.model, 3), segment_checkpoint)
