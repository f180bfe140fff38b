"""Whole runs that learn from soft labels, and runs that leave drives out."""

from __future__ import annotations

import csv
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
from PIL import Image

from knet_runtime.errors import ConfigError, DataError
from knet_train.fit import RunResult
from knet_train.module import TrainingModule

Different = Callable[[Path, Path], list[str]]
SHORT = "optim.steps=3"


@pytest.fixture
def data(make_folder: Callable[..., Path]) -> Path:
    return make_folder(("a_1", "a_2", "a_3", "b_1", "b_2", "c_1"))


@pytest.fixture
def soft(data: Path, tmp_path: Path) -> Path:
    """Certain soft labels of the images, at half their size, void included."""
    folder = tmp_path / "soft"
    folder.mkdir()
    for path in (data / "labels").iterdir():
        label = np.asarray(Image.open(path))[1::2, 1::2]
        values = 255 * (label == np.arange(3)[:, None, None]).astype(np.uint8)
        Image.fromarray(values.reshape(-1, label.shape[1])).save(folder / path.name)
    return folder


@pytest.fixture
def street(soft: Path, data: Path, tmp_path: Path) -> Path:
    """Images without labels; their soft labels are among the others."""
    folder = tmp_path / "street"
    folder.mkdir()
    for name in ("a_1", "c_1"):
        image = Image.open(data / "images" / f"{name}.png")
        image.save(folder / f"street_{name}.jpg")
        (soft / f"street_{name}.png").write_bytes((soft / f"{name}.png").read_bytes())
    return folder


class Watch(pl.Callback):
    """What was learnt from at each step; stops as Ctrl-C does before one of them."""

    def __init__(self, stop: int | None = None) -> None:
        self.losses: list[float] = []
        self.labelled: list[bool] = []
        self.stop = stop

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.stop:
            os.kill(os.getpid(), signal.SIGINT)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, _: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        self.labelled.append(bool((batch.labels != 255).any()))


def test_soft_labels_change_what_is_learnt_and_a_run_repeats_itself(
    go: Callable[..., RunResult], soft: Path, street: Path, different: Different
) -> None:
    folders = {"soft_labels": [soft], "unlabelled": [street]}
    first = go("first", SHORT, **folders)
    assert different(first.last, go("hard", SHORT).last)
    with pytest.raises(KeyboardInterrupt):
        go("parts", SHORT, **folders, callbacks=[Watch(stop=1)])
    with pytest.raises(DataError, match="with soft labels of 6 training images and of 2 images"):
        go("parts", SHORT, soft_labels=[soft], resume=True)
    assert not different(first.last, go("parts", SHORT, **folders, resume=True).last)


def test_batches_without_any_label_teach_by_soft_labels_alone(
    go: Callable[..., RunResult], soft: Path, street: Path
) -> None:
    watch = Watch()
    for mean in ("labelled", "all"):
        result = go(
            mean,
            SHORT,
            "data.unlabelled_share=1",
            f"loss.mean_over={mean}",
            soft_labels=[soft],
            unlabelled=[street],
            callbacks=[watch],
        )
        assert result.best_score > 0
    assert not any(watch.labelled)
    assert np.isfinite(watch.losses).all()
    assert min(watch.losses) > 0


def test_a_weight_of_0_learns_from_labels_alone(
    go: Callable[..., RunResult], soft: Path, different: Different
) -> None:
    result = go("soft", SHORT, "loss.distill_weight=0", soft_labels=[soft])
    assert not different(result.last, go("hard", SHORT).last)


def test_every_stage_gets_a_gradient(go: Callable[..., RunResult], soft: Path) -> None:
    seen: dict[str, float] = {}

    class Gradients(pl.Callback):
        def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            for name, parameter in pl_module.named_parameters():
                if parameter.grad is not None:
                    seen[name] = max(seen.get(name, 0.0), float(parameter.grad.abs().max()))

    go("run", "optim.steps=2", soft_labels=[soft], callbacks=[Gradients()])
    for part in ("conv_seg.", "stages.0.fc_mask.", "head.", "backbone."):
        assert max(value for name, value in seen.items() if f"model.{part}" in name) > 0


def test_soft_labels_need_class_maps_and_images_need_soft_labels(
    go: Callable[..., RunResult], soft: Path, street: Path
) -> None:
    with pytest.raises(ConfigError, match="pass --soft-labels too"):
        go("run", unlabelled=[street])
    with pytest.raises(DataError, match="is not a folder: --soft-labels"):
        go("run", soft_labels=[street / "x"])


def test_a_drive_that_is_left_out_is_scored_and_chooses_the_best(
    go: Callable[..., RunResult], data: Path, tmp_path: Path, reported: Callable[[Path], str]
) -> None:
    found: list[TrainingModule] = []
    images: list[Any] = []

    class Look(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            found.append(pl_module)
            images.append(trainer.datamodule)  # type: ignore[attr-defined]

    result = go("run", 'data.leave_out=["b"]', callbacks=[Look()])
    assert [sample.name for sample in images[0].train.samples] == ["a_1", "a_2", "a_3", "c_1"]
    assert [sample.name for sample in images[0].left_out.samples] == ["b_1", "b_2"]
    table = max((tmp_path / "run" / "logs").glob("*/metrics.csv"))
    with table.open() as file:
        rows = [row for row in csv.DictReader(file) if row["left_out_miou"]]
    assert len(rows) == 3
    scores = [float(row["left_out_miou"]) for row in rows]
    assert result.best_score == pytest.approx(max(scores), abs=1e-6)
    assert any(row["val_miou"] != row["left_out_miou"] for row in rows)
    page = reported(result.best)
    assert "mIoU of the drives left out" in page
    assert "now, b" in page


def test_soft_labels_of_a_drive_left_out_are_left_out_too(
    go: Callable[..., RunResult], soft: Path, street: Path
) -> None:
    images: list[Any] = []

    class Look(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            images.append(trainer.datamodule)  # type: ignore[attr-defined]

    leave = 'data.leave_out=["c"]'
    (street / "street_c_1.jpg").rename(street / "c_7.jpg")
    (soft / "street_c_1.png").rename(soft / "c_7.png")
    go("run", leave, "optim.steps=2", soft_labels=[soft], unlabelled=[street], callbacks=[Look()])
    known = images[0].soft
    assert [path.name for path in known.labelled] == [
        "a_1.png", "a_2.png", "a_3.png", "b_1.png", "b_2.png",
    ]  # fmt: skip
    assert [one.soft.name for one in known.unlabelled] == ["street_a_1.png"]


def test_an_unknown_drive_ends_a_run_before_it_begins(
    go: Callable[..., RunResult], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"names 'B'.*its drives are a \(3 images\)"):
        go("run", 'data.leave_out=["B"]')
    assert not (tmp_path / "run").exists()
