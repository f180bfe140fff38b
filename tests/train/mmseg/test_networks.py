"""Imported networks against stored names and numbers of mmsegmentation's own modules."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from knet_train import mmseg
from knet_train.config import load_config
from knet_train.foreign import drop_reason, is_patch_merging, map_state, merging_order
from knet_train.mmseg import guess_preset, mmseg_name
from knet_train.models.build import build_model

DATA = Path(__file__).resolve().parent / "data"
PRESETS = {
    "r50_fcn": "r50-fcn",
    "r50_pspnet": "r50-pspnet",
    "r50_deeplabv3": "r50-deeplabv3",
    "r50_upernet": "r50-upernet",
    "swin_t_upernet": "swin-t-upernet",
}
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def names() -> dict[str, dict[str, list[int]]]:
    """Keys and shapes of mmsegmentation's seven networks."""
    found: dict[str, dict[str, list[int]]] = json.loads(
        gzip.decompress((DATA / "mmseg_names.json.gz").read_bytes())
    )
    return found


@pytest.mark.parametrize("name", PRESETS)
def test_an_imported_network_computes_what_mmsegmentation_does(
    name: str, tiny: Mapping[str, np.ndarray], state_of: Callable[[str], State]
) -> None:
    config = mmseg.load_config(PRESETS[name])  # shrunk
    model = build_model(config.model, 7).eval()
    name_of = partial(mmseg_name, head=config.model.head)
    weights, dropped, absent = map_state(state_of(name), model.state_dict(), name_of)
    model.load_state_dict(weights)
    assert not absent
    assert all(key.endswith("relative_position_index") for key in dropped)
    image = torch.from_numpy(tiny["image"])[None]
    with torch.no_grad():
        levels = model.levels(image)
        stages, auxiliary = model.training_logits(image)
    assert auxiliary is not None
    found = {"feats": levels, "stage_logits": stages}
    for kind, tensors in found.items():
        assert len(tensors) == 4
        for index, tensor in enumerate(tensors):
            expected = torch.from_numpy(tiny[f"{name}/{kind}/{index}"])
            kept = tensor[0, :: 4 if kind == "feats" else 1]
            assert kept.shape == expected.shape
            assert expected.std() > 0.1
            difference = float((kept - expected).abs().max())
            bound = 1e-4 if kind == "feats" else 1e-3 * float(expected.abs().max())
            assert difference <= bound, f"{name} {kind} {index}"
    torch.testing.assert_close(
        auxiliary[0], torch.from_numpy(tiny[f"{name}/auxiliary"]), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        *PRESETS.items(),
        ("swin_l_upernet_512", "swin-l-upernet-512"),
        ("swin_l_upernet_640", "swin-l-upernet-640"),
    ],
)
def test_every_key_of_a_published_network_has_its_place(
    names: dict[str, dict[str, list[int]]], name: str, preset: str
) -> None:
    shapes = names[name]
    with torch.device("meta"):
        config = load_config(preset)
        model = build_model(config.model, 150)
        state = {key: torch.empty(shape) for key, shape in shapes.items()}
    ours = {mmseg_name(key, config.model.head): v for key, v in model.state_dict().items()}
    assert {key: list(value.shape) for key, value in ours.items()} == {
        key: shape for key, shape in shapes.items() if drop_reason(key) is None
    }
    assert guess_preset(state) == ("swin-l-upernet-512" if "swin_l" in name else preset)


def test_patch_merging_columns_are_put_into_timms_order() -> None:
    channels = 3
    mmseg_order = torch.tensor(
        [c * 4 + h * 2 + w for w in (0, 1) for h in (0, 1) for c in range(3)]
    )
    assert torch.equal(merging_order(torch.arange(4 * channels)), mmseg_order)
    rows = torch.arange(4 * channels) + torch.tensor([[0], [100]])
    assert torch.equal(merging_order(rows), torch.stack([mmseg_order, mmseg_order + 100]))
    assert is_patch_merging("backbone.layers.1.downsample.norm.bias")
    assert not is_patch_merging("backbone.layer1.0.downsample.0.weight")
