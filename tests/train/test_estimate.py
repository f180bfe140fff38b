"""What a run will take, said before it begins."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from knet_runtime.errors import ConfigError
from knet_train.config import Config


def test_an_estimate_counts_all_steps_and_evaluations_and_the_files_of_a_run(
    tiny_config: Callable[..., Config],
    data: Path,
    backbone_file: Path,
    whole: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from knet_train.estimate import estimate

    tried = tmp_path / "tried"
    tried.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tried))
    config = tiny_config("optim.steps=1000", "trainer.val_every=300")
    found = estimate(config, data, backbone_weights=backbone_file)
    assert not list(tried.iterdir())
    assert found.facts["classes"] == "3"
    assert found.evaluations == 4  # after 300, 600, 900 and 1000
    assert 0 < found.step < 60
    assert 0 < found.evaluation < 60
    assert found.total == pytest.approx(1000 * found.step + 4 * found.evaluation)
    run = whole().best.parent
    state, best = ((run / name).stat().st_size for name in ("resume.ckpt", "best.safetensors"))
    assert found.disk == pytest.approx(3 * state + 2 * best, rel=0.01)
    assert found.memory is not None
    assert found.memory > found.disk / 10


def test_an_estimate_of_many_processes_is_refused(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    from knet_train.estimate import estimate

    with pytest.raises(ConfigError, match=r"on one device: pass --set trainer\.devices=1"):
        estimate(tiny_config("trainer.devices=2"), tmp_path)
