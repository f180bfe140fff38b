"""What mmsegmentation calls a K-Net's weights and computes from them, small enough to commit.

    KNET_REFERENCE=FOLDER REFENV/bin/python tests/reference/make_fixture.py

writes ``tests/train/data/mmseg_names.json.gz``, the keys and shapes of the seven published
networks, and ``mmseg_tiny.npz``: for shrunk networks the keys and shapes, an image, and the float32
levels and logits of mmsegmentation's own modules. Weights are not stored: ``draw`` makes them.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DATA = Path(__file__).resolve().parents[1] / "train" / "mmseg" / "data"
SIZE = (59, 74)  # no multiple of anything
CLASSES = 7
CHANNELS = 16
STEP = 4  # of the levels every fourth channel is stored
TINY = ("r50_fcn", "r50_pspnet", "r50_deeplabv3", "r50_upernet", "swin_t_upernet")


def draw(name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """The weight ``name`` of a shrunk network; the same numbers on every machine."""
    random = np.random.RandomState(zlib.crc32(name.encode()))  # the stream that NumPy froze
    if not shape or name.endswith("relative_position_index"):
        return np.zeros(shape, np.int64)
    if name.endswith("relative_position_bias_table"):
        value = random.standard_normal(shape)
    elif len(shape) > 1:
        gain = (
            3.0 if "fc_mask" in name else 1.4
        )  # logits of a few units: maps neither flat nor hard
        value = random.standard_normal(shape) * gain / np.sqrt(np.prod(shape[1:]))
    elif name.endswith(("bias", "running_mean")):
        value = random.standard_normal(shape) * 0.1
    elif name.endswith("bn3.weight"):  # or the residual sums would grow with depth
        value = random.uniform(0.1, 0.3, shape)
    else:  # of norms: weight and running_var
        value = random.uniform(0.5, 1.5, shape)
    return value.astype(np.float32)


def shrink(model: Any) -> None:
    """A published configuration, in place, with all widths divided and seven classes."""
    if model.backbone.type == "ResNetV1c":
        model.backbone.update(base_channels=2, stem_channels=4)
        widths = [8, 16, 32, 64]
    else:
        model.backbone.update(embed_dims=4, depths=[2, 2, 2, 2], num_heads=[1, 2, 2, 4])
        widths = [4, 8, 16, 32]
    head = model.decode_head.kernel_generate_head
    several = isinstance(head.in_channels, (list, tuple))
    head.in_channels = widths if several else widths[-1]
    head.update(channels=CHANNELS, num_classes=CLASSES)
    model.auxiliary_head.update(in_channels=widths[2], channels=8, num_classes=CLASSES)
    for stage in model.decode_head.kernel_update_head:
        stage.update(num_classes=CLASSES, num_heads=2, feedforward_channels=32)
        stage.update(in_channels=CHANNELS, out_channels=CHANNELS)
        stage.kernel_updator_cfg.update(in_channels=8, feat_channels=8, out_channels=8)


def main() -> None:
    sys.path.insert(0, os.environ["KNET_REFERENCE"])
    import make_refs
    import torch
    from mmengine.config import Config
    from mmengine.registry import init_default_scope
    from mmseg.registry import MODELS

    names = {}
    for config in make_refs.CFG:
        state = make_refs.build(config)[1].state_dict()
        names[config] = {key: list(value.shape) for key, value in state.items()}
    DATA.mkdir(exist_ok=True)
    packed = gzip.compress(json.dumps(names).encode(), mtime=0)
    (DATA / "mmseg_names.json.gz").write_bytes(packed)

    image = make_refs.make_image(*SIZE, 3)
    arrays: dict[str, NDArray[Any]] = {"image": image.flip(-1).numpy()}
    for config in TINY:
        init_default_scope("mmseg")
        model = Config.fromfile(f"{make_refs.ROOT}/{make_refs.CFG[config]}").model
        model.pretrained = model.backbone.init_cfg = None
        shrink(model)
        net = make_refs.revert_sync_batchnorm(MODELS.build(model)).eval()
        shapes = {key: list(value.shape) for key, value in net.state_dict().items()}
        state = {key: torch.from_numpy(draw(key, tuple(shape))) for key, shape in shapes.items()}
        state |= {k: v for k, v in net.state_dict().items() if k.endswith("position_index")}
        net.load_state_dict(state)
        found = make_refs.reference(net, image, save_feats=True)
        arrays[f"{config}/shapes"] = np.frombuffer(json.dumps(shapes).encode(), np.uint8)
        for kind in ("feats", "stage_logits"):
            for index, value in enumerate(found[kind]):
                kept = value[0, :: STEP if kind == "feats" else 1]
                arrays[f"{config}/{kind}/{index}"] = kept.numpy()
                sys.stdout.write(
                    f"{config} {kind} {index} {tuple(value.shape)} {value.std():.2f}\n"
                )
        with torch.no_grad():
            auxiliary = net.auxiliary_head(net.extract_feat(found["input"]))
        arrays[f"{config}/auxiliary"] = auxiliary[0].numpy()
    np.savez_compressed(DATA / "mmseg_tiny.npz", **arrays)


if __name__ == "__main__":
    main()
