"""The parts of a step that fit into a GPU, which these tests stand in for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from knet_runtime.errors import ConfigError
from knet_train.batch_size import fit_accumulate
from knet_train.config import Config
from knet_train.module import KNetModule


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """A memory that holds so many images at once: training raises what torch raises above that.
    Gives the sizes that were tried."""

    def limit(images: int) -> list[int]:
        tried: list[int] = []
        step = KNetModule.training_step

        def training_step(self: Any, batch: Any, index: int) -> Any:
            tried.append(len(batch.images))
            if len(batch.images) > images:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return step(self, batch, index)

        monkeypatch.setattr(KNetModule, "training_step", training_step)
        # Only where the search looks; torch itself still finds none and computes on the processor.
        monkeypatch.setattr("knet_train.batch_size.torch.cuda.is_available", SeenOnce())
        return tried

    return limit


class SeenOnce:
    """A GPU that is there when the search asks for it, and for nobody after."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self) -> bool:
        self.asked += 1
        return self.asked == 1


def test_the_fewest_parts_that_fit_are_found_and_the_step_stays(
    fits: Callable[[int], list[int]],
    tiny_config: Callable[..., Config],
    data: Path,
    backbone_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = tmp_path / "tried"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    config = tiny_config("optim.batch_size=6", "optim.accumulate=6")
    tried = fits(2)
    found = fit_accumulate(config, data, backbone_weights=backbone_file)
    assert (found.optim.batch_size, found.optim.accumulate) == (6, 3)
    assert tried == [6, 3, *[2] * 6]  # too many, too many, and two steps of three parts
    assert found.trainer == config.trainer
    assert found.optim.steps == config.optim.steps
    assert not list(place.iterdir())


def test_not_even_one_image_is_said(
    fits: Callable[[int], list[int]],
    tiny_config: Callable[..., Config],
    data: Path,
    backbone_file: Path,
) -> None:
    tried = fits(0)
    with pytest.raises(ConfigError, match="memory ran out: lower"):
        fit_accumulate(tiny_config(), data, backbone_weights=backbone_file)
    assert tried == [2, 1]


def test_without_a_gpu_and_with_many_processes_it_is_refused(
    tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="this machine shows none: leave it out"):
            fit_accumulate(tiny_config(), tmp_path)
    monkeypatch.setattr("knet_train.batch_size.torch.cuda.is_available", SeenOnce())
    with pytest.raises(ConfigError, match=r"on one device: pass --set trainer\.devices=1"):
        fit_accumulate(tiny_config("trainer.devices=2"), tmp_path)
