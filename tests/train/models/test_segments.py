"""K-Net for instances and panoptic segmentation against the authors' own code."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from narrow_knet import Arrays

from knet_runtime.errors import ConfigError
from knet_runtime.labels import LabelMap, distinct_palette
from knet_train.config import load_config
from knet_train.data.layouts import COCO, COCO_THINGS
from knet_train.models.build import build_model, build_segment_model
from knet_train.models.knet import StageOutput
from knet_train.models.segments import SegmentKNet, positional_code, upsample_twice

Narrow = Callable[[str], SegmentKNet]
Stored = Callable[[str], Arrays]


def differ(found: torch.Tensor, expected: np.ndarray) -> float:
    """The largest difference, as a share of the largest number."""
    assert found.shape == expected.shape
    return float(np.abs(found.numpy() - expected).max() / np.abs(expected).max())


def image_of(arrays: Arrays) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(arrays["image_bgr"][None, ..., ::-1]))


@pytest.mark.parametrize("task", ["inst", "pan"])
def test_every_part_gives_the_authors_numbers(narrow: Narrow, stored: Stored, task: str) -> None:
    model, arrays = narrow(task), stored(f"{task}/a_96x128")
    with torch.no_grad():
        levels = model.levels(image_of(arrays))
        pyramid = model.head.pyramid(levels)
        outputs = model.decode(levels)
    for number, (level, part) in enumerate(zip(levels, pyramid, strict=True), 2):
        assert differ(level, arrays[f"c{number}"]) < 1e-5
        assert differ(part, arrays[f"p{number}"]) < 1e-5
    assert differ(outputs.semantic, arrays["seg_logits"]) < 1e-5
    last = upsample_twice(outputs.stages[-1].masks)
    if task == "inst":
        assert differ(last, arrays["final_mask_logits_s4"]) < 1e-4


@pytest.mark.parametrize("task", ["inst", "pan"])
@pytest.mark.parametrize("name", ["a_96x128", "b_133x100_pad"])
def test_every_stage_gives_the_authors_numbers(
    narrow: Narrow, stored: Stored, task: str, name: str
) -> None:
    arrays = stored(f"{task}/{name}")
    with torch.no_grad():
        first, *stages = narrow(task).training_outputs(image_of(arrays)).stages
    assert differ(first.kernels, arrays["init_kernels_out"]) < 1e-5
    assert differ(first.masks, arrays["init_mask_logits"]) < 1e-5
    for number, stage in enumerate(stages):
        assert stage.classes is not None
        assert differ(stage.classes, arrays[f"s{number}_cls_logits"]) < 1e-4
        assert differ(stage.masks, arrays[f"s{number}_mask_logits"]) < 1e-4
        assert differ(stage.kernels, arrays[f"s{number}_kernels"]) < 1e-4


@pytest.mark.parametrize("task", ["inst", "pan"])
def test_a_stage_alone_gives_the_authors_numbers(narrow: Narrow, stored: Stored, task: str) -> None:
    model, arrays = narrow(task), stored(f"{task}/c_75x100_up")
    given = ("init_kernels_out", "init_mask_logits")
    for number, stage in enumerate(model.stages):
        inputs = (torch.from_numpy(arrays[name]) for name in ("x_feats", *given))
        with torch.no_grad():
            output: StageOutput = stage(*inputs)
        assert output.classes is not None
        assert differ(output.classes, arrays[f"s{number}_cls_logits"]) < 1e-4
        assert differ(output.masks, arrays[f"s{number}_mask_logits"]) < 1e-4
        given = (f"s{number}_kernels", f"s{number}_mask_logits")


@pytest.mark.parametrize("size", [(33, 47), (64, 96), (1, 1)])
def test_images_of_any_size_are_padded_to_whole_cells(
    narrow: Narrow, size: tuple[int, int]
) -> None:
    model = narrow("pan")
    with torch.no_grad():
        logits = model(torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8))
    height, width = (-(-side // 32) * 8 for side in size)
    assert logits.classes.shape == (2, 153, 133)
    assert logits.masks.shape == (2, 153, height, width)


def test_images_of_a_batch_do_not_touch_one_another(narrow: Narrow) -> None:
    images = torch.randint(0, 256, (3, 64, 64, 3), generator=torch.Generator().manual_seed(0))
    model = narrow("inst").double()
    with torch.no_grad():
        together, alone = model(images), model(images[2:])
    torch.testing.assert_close(together.classes[2:], alone.classes)
    torch.testing.assert_close(together.masks[2:], alone.masks)


def test_the_positional_code_begins_with_the_rows() -> None:
    code = positional_code(8, 3, 5)
    assert code.shape == (8, 3, 5)
    angles = torch.tensor([1 / 3, 2 / 3, 1.0]) * 2 * torch.pi
    torch.testing.assert_close(code[0, :, 0], angles.sin(), atol=1e-5, rtol=0)
    torch.testing.assert_close(code[1, :, 4], angles.cos(), atol=1e-5, rtol=0)
    torch.testing.assert_close(code[2, :, 2], (angles / 100).sin(), atol=1e-5, rtol=0)
    assert torch.equal(code[4, 0], code[4, 2])  # columns know nothing of rows
    assert torch.equal(code[0, :, 0], code[0, :, 4])


@pytest.mark.parametrize("things", [(0, 2), (1,), (2,)])
def test_things_may_stand_anywhere_among_the_classes(things: tuple[int, ...]) -> None:
    labels = LabelMap(("a", "b", "c"), distinct_palette(3), 255, things)
    small = (
        *('backbone="efficientnet_lite0"', "channels=32", "update_channels=32", "heads=2"),
        *("ffn_channels=32", "kernels=4", "stages=1"),
    )
    overrides = [*(f"model.{each}" for each in small), "loss.stage_weights=[1,1]"]
    model = build_segment_model(load_config("knet-r50-fpn-panoptic", overrides).model, labels)
    with torch.no_grad():
        logits = model.eval()(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
    assert model.stuff == tuple(index for index in range(3) if index not in things)
    assert logits.classes.shape == (1, 4 + 3 - len(things), 3)


def test_each_builder_takes_its_own_tasks_only() -> None:
    panoptic, instance = (
        load_config(f"knet-r50-fpn-{task}").model for task in ("panoptic", "instance")
    )
    with pytest.raises(ConfigError, match="panoptic segmentation"):
        build_model(panoptic, 133)
    with pytest.raises(ConfigError, match="semantic segmentation"):
        build_segment_model(load_config("knet-edge").model, COCO)
    with pytest.raises(ConfigError, match="no class is one"):
        build_segment_model(panoptic, LabelMap(("a",), distinct_palette(1), 255))
    with pytest.raises(ConfigError, match="things only"):
        build_segment_model(instance, COCO)
    assert COCO_THINGS.num_classes == len(COCO.things) == 80
