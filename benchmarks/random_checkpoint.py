"""A checkpoint of random weights: how fast a network is does not depend on what it has learned.

    python benchmarks/random_checkpoint.py r50-fcn r50-fcn.safetensors --size 512

With the classes of ADE20K; the same weights each time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from random_bundle import random_model

from knet_runtime.types import Size
from knet_synthetic import Street
from knet_train.checkpoint import save_checkpoint
from knet_train.config import load_config
from knet_train.data.layouts import ADE20K
from knet_train.models.knet import KNet


def write_random_checkpoint(preset: str, path: Path, side: int | None = None) -> None:
    """``preset``'s network at ``side`` × ``side`` pixels, its own size without it."""
    config = load_config(preset, [f"data.eval_size={[side, side]}"] if side else [])
    model = random_model(preset, ADE20K.num_classes)
    _spread(model, config.data.eval_size)
    save_checkpoint(path, model, config, ADE20K)


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
