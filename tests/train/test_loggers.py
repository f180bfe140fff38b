"""A run is logged where it was asked for, and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knet_train.config import Config
from knet_train.loggers import LoggerName


@pytest.fixture
def run(
    tiny_config: Callable[..., Config], data: Path, backbone_file: Path, tmp_path: Path
) -> Callable[..., Path]:
    def go(*loggers: LoggerName, **settings: Any) -> Path:
        from knet_train.fit import train

        folder = tmp_path / "my run"
        config = tiny_config("optim.steps=2")
        train(config, data, folder, backbone_weights=backbone_file, loggers=loggers, **settings)
        return folder

    return go


def written(folder: Path) -> set[str]:
    return {path.name.partition(".")[0] for path in (folder / "logs").rglob("*") if path.is_file()}


def test_csv_alone_and_tensorboard_alone(run: Callable[..., Path], tmp_path: Path) -> None:
    assert written(run("csv")) == {"metrics"}
    (tmp_path / "my run").rename(tmp_path / "other")
    assert written(run("tensorboard")) == {"events", "hparams"}


def test_a_library_that_is_missing_ends_the_run_before_it_begins(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError):
        run("wandb")
    assert not (tmp_path / "my run").exists()


@pytest.mark.filterwarnings("default")  # those of MLflow and what it brings
def test_mlflow_has_the_scores_images_and_settings(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    logs = run("mlflow") / "logs"
    client = mlflow.tracking.MlflowClient(f"sqlite:///{logs / 'mlflow.db'}")
    (experiment,) = [one for one in client.search_experiments() if one.name == "knet-deploy"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["optim/steps"] == "2"
    each = [found.data.metrics[f"IoU/{name}"] for name in ("road", "sky", "car")]
    assert np.mean(each) == pytest.approx(found.data.metrics["val_miou"], abs=1e-6)
    assert {path.name for path in logs.rglob("*.png")} == {"0000002.png"}
    assert len(list(logs.rglob("*.png"))) == 7  # six images and the confusion matrix


@pytest.mark.filterwarnings("default")
def test_weights_and_biases_offline(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="needs the extra wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = run("wandb")
    assert wandb.run is None  # the next run of this process is another one
    assert not (folder / "logs").exists()
    (offline,) = (folder / "wandb").glob("offline-run-*")
    assert list(offline.glob("*.wandb"))
    assert len(list(offline.rglob("*.png"))) == 7
