"""An imported checkpoint computes what mmsegmentation computes from it.

The reference outputs are made here, once per configuration, by mmsegmentation's own K-Nets. Two
environment variables say with what: KNET_REFERENCE_PYTHON, the python of an environment with
mmsegmentation, and KNET_REFERENCE, the folder with ``make_refs.py`` (by default ``reference``
beside the shared data). KNET_REFERENCE_CONFIGS names the configurations, with commas between them,
or "all"; KNET_REFERENCE_SEED draws the weights.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from knet_train.checkpoint import load_checkpoint
from knet_train.mmseg import import_mmseg
from knet_train.models.knet import KNet

pytestmark = [pytest.mark.reference, pytest.mark.slow, pytest.mark.timeout(1800)]

PRESETS = {
    "r50_fcn": "r50-fcn",
    "r50_upernet": "r50-upernet",
    "swin_t_upernet": "swin-t-upernet",
    "r50_pspnet": "r50-pspnet",
    "r50_deeplabv3": "r50-deeplabv3",
    "swin_l_upernet_512": "swin-l-upernet-512",
    "swin_l_upernet_640": "swin-l-upernet-640",
}
SIZES = ("256x256", "256x341")


@dataclass(frozen=True)
class Reference:
    """A folder with ``checkpoint.pth`` and ``ref_HxW.pt`` for each size, and the preset's name."""

    folder: Path
    preset: str


@pytest.fixture(scope="session")
def reference_script(request: pytest.FixtureRequest) -> Path:
    folder = os.environ.get("KNET_REFERENCE")
    home = Path(folder) if folder else request.getfixturevalue("shared_data").parent / "reference"
    if not (home / "make_refs.py").is_file():
        pytest.skip(f"no make_refs.py in {home}: set KNET_REFERENCE to its folder")
    return home / "make_refs.py"


@pytest.fixture(scope="session")
def reference_python() -> str:
    python = os.environ.get("KNET_REFERENCE_PYTHON")
    if not python:
        pytest.skip("KNET_REFERENCE_PYTHON does not name the python of the reference environment")
    return python


def _chosen() -> list[str]:
    names = os.environ.get("KNET_REFERENCE_CONFIGS", "r50_fcn,r50_upernet,swin_t_upernet")
    return list(PRESETS) if names == "all" else names.split(",")


@pytest.fixture(scope="session", params=_chosen())
def reference(
    request: pytest.FixtureRequest,
    reference_python: str,
    reference_script: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Reference]:
    name: str = request.param
    out = tmp_path_factory.mktemp("reference")
    seed = os.environ.get("KNET_REFERENCE_SEED", "0")
    words = ["--out", str(out), "--configs", name, "--sizes", *SIZES, "--seed", seed]
    done = subprocess.run(
        [reference_python, str(reference_script), *words, "--save-feats"],
        capture_output=True,
        text=True,
        timeout=1500,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    yield Reference(out / name, PRESETS[name])
    shutil.rmtree(out)  # up to a gigabyte


@pytest.fixture(scope="module")
def model(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> KNet:
    """The reference checkpoint, imported without being told what it is."""
    path: Path = tmp_path_factory.mktemp("imported") / "checkpoint.safetensors"
    guessable = reference.preset != "swin-l-upernet-640"
    found = import_mmseg(
        reference.folder / "checkpoint.pth", path, preset=None if guessable else reference.preset
    )
    assert found.config.preset == reference.preset
    assert found.auxiliary
    assert not found.absent
    loaded = load_checkpoint(path)
    path.unlink()
    return loaded


def largest(difference: Tensor) -> float:
    return float(difference.abs().max())


@pytest.mark.parametrize("size", SIZES)
def test_levels_logits_and_classes_are_mmsegmentations(
    reference: Reference, model: KNet, size: str
) -> None:
    expected: dict[str, Any] = torch.load(
        reference.folder / f"ref_{size}.pt", weights_only=True, map_location="cpu"
    )
    rgb = expected["image_bgr"].flip(-1)[None]
    with torch.no_grad():
        levels = model.levels(rgb)
        stages = model.decode(levels)
        full = F.interpolate(stages[-1], rgb.shape[1:3], mode="bilinear", align_corners=False)
    assert [level.shape for level in levels] == [level.shape for level in expected["feats"]]
    assert [stage.shape for stage in stages] == [stage.shape for stage in expected["stage_logits"]]
    features = [largest(a - b) for a, b in zip(levels, expected["feats"], strict=True)]
    logits = [
        largest(a - b) / largest(b) for a, b in zip(stages, expected["stage_logits"], strict=True)
    ]
    equal = float((full.argmax(1) == expected["full_logits"].argmax(1)).float().mean())
    sys.stdout.write(
        f"{reference.preset} {size}: levels differ by {max(features):.1e}, "
        f"logits by {max(logits):.1e} of the largest, {100 * equal:.4f} % of pixels equal\n"
    )
    assert max(features) <= 1e-4
    assert max(logits) <= 1e-3
    assert equal >= 0.9999
    assert torch.equal(stages[-1], model(rgb).detach())
