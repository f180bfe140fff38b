"""A checkpoint of random weights: how fast a network is does not depend on what it has learned.

    python benchmarks/random_checkpoint.py r50-fcn r50-fcn.safetensors --size 512

With the classes of ADE20K, or of COCO where objects are found; the same weights each time. Those of
a published network for objects are written as its authors do, and imported.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from random_bundle import random_model, random_segment_model

from knet_runtime.types import Size
from knet_synthetic import Street
from knet_train.checkpoint import save_checkpoint
from knet_train.config import load_config
from knet_train.data.layouts import ADE20K, COCO, COCO_THINGS
from knet_train.foreign import is_patch_merging
from knet_train.models.knet import KNet
from knet_train.models.segments import SegmentKNet
from knet_train.published import import_published, published_name


def write_random_checkpoint(preset: str, path: Path, side: int | None = None) -> None:
    """``preset``'s network at ``side`` × ``side`` pixels, its own size without it (and where it is
    imported)."""
    config = load_config(preset, [f"data.eval_size={[side, side]}"] if side else [])
    if config.model.task == "semantic":
        model = random_model(preset, ADE20K.num_classes)
        _spread(model, config.data.eval_size)
        save_checkpoint(path, model, config, ADE20K)
        return
    labels = COCO if config.model.task == "panoptic" else COCO_THINGS
    found = random_segment_model(preset, labels)
    if "-fpn-" not in preset and "-swin-" not in preset:  # not a published network
        save_checkpoint(path, found, config, labels)
        return
    file = path.with_suffix(".pth")
    torch.save({"state_dict": published_state(found)}, file)
    import_published(file, path)
    file.unlink()


def published_state(model: SegmentKNet) -> dict[str, torch.Tensor]:
    """The weights of ``model`` by the names, and in the order, of the authors' checkpoints."""
    return {
        published_name(key): _unfolded(value) if is_patch_merging(key) else value
        for key, value in model.state_dict().items()
    }


def _unfolded(value: torch.Tensor) -> torch.Tensor:
    """The other way round than ``knet_train.foreign.merging_order``."""
    split = value.reshape(*value.shape[:-1], 2, 2, value.shape[-1] // 4)
    axes = (*range(value.dim() - 1), *(value.dim() + i for i in (1, 0, -1)))
    return split.permute(axes).reshape(value.shape)


@torch.no_grad()
def _spread(model: KNet, size: Size) -> None:
    """Random weights see one class everywhere, by a hair: take the mean out of what the masks are
    made from, so that maps have several classes to differ in."""
    images = torch.from_numpy(np.stack([Street(seed, size).frame(0)[0] for seed in range(3)]))
    features = model.head(model.levels(images))
    for stage in model.stages:
        stage.feat_transform.bias -= stage.feat_transform(features).mean((0, 2, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("preset", help="such as r50-fcn")
    parser.add_argument("output", type=Path, help="NAME.safetensors")
    parser.add_argument("--size", type=int, help="height and width; without it, the preset's own")
    options = parser.parse_args()
    write_random_checkpoint(options.preset, options.output, options.size)


if __name__ == "__main__":
    main()
