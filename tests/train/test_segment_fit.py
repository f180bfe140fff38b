from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_folders import write_panoptic
from safetensors.torch import load_file, save_file

from knet_runtime.errors import DataError
from knet_train.checkpoint import read_segment_checkpoint
from knet_train.config import load_config
from knet_train.models.backbones import build_backbone

TINY = (
    "model.channels=32",
    "model.stages=1",
    "model.heads=2",
    "model.update_channels=32",
    "model.ffn_channels=32",
    "model.kernels=2",
    "data.eval_size=[64, 96]",
    "data.crop=[60, 90]",
    "loss.stage_weights=[1.0, 1.0]",
    "data.synthetic_share=0",
    "data.val_split=train",
    "optim.steps=4",
    "optim.batch_size=2",
    "optim.warmup_steps=1",
    "trainer.val_every=2",
    "trainer.save_every=1",
    "trainer.workers=0",
    "trainer.precision=32-true",
)


@pytest.mark.parametrize(("task", "metric"), [("panoptic", "PQ"), ("instance", "AP")])
def test_a_run_with_more_objects_than_kernels_scores_and_can_break_off(
    tmp_path: Path, task: Any, metric: str, reported: Callable[[Path], str]
) -> None:
    import pytorch_lightning as pl

    from knet_train.fit import train

    class Break(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                raise ValueError("broken off")

    write_panoptic(tmp_path / "data", images=3)
    config = load_config(f"knet-edge-{task}", TINY)
    weights = tmp_path / "backbone.safetensors"
    torch.manual_seed(1)
    save_file(build_backbone(config.model).state_dict(), weights)
    whole = train(config, tmp_path / "data", tmp_path / "whole", backbone_weights=weights)
    assert whole.metric == metric
    assert 0 <= whole.best_score <= 1
    expected = load_file(whole.last)
    assert all(torch.isfinite(value).all() for value in expected.values())
    assert read_segment_checkpoint(whole.best).config.model.task == task

    parts, data = tmp_path / "parts", tmp_path / "data"
    with pytest.raises(ValueError, match="broken off"):
        train(config, data, parts, backbone_weights=weights, callbacks=[Break()])
    resumed = train(config, data, parts, backbone_weights=weights, resume=True)
    assert resumed.best_score == whole.best_score
    page = reported(resumed.best)
    assert page == reported(whole.best)
    assert page.count("<figure class='objects'>") == 3
    assert f"<h1>{metric} {100 * whole.best_score:.2f} %</h1>" in page
    assert "Confusion matrix" not in page
    assert len(re.findall(r"person</th><td>\d+\.\d\d</td>", page)) == 1
    assert all(torch.equal(v, expected[key]) for key, v in load_file(resumed.last).items())


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_accumulated_parts_make_the_same_step(tmp_path: Path, task: Any) -> None:
    """A step's means are over all of its objects, of which its parts have different numbers."""
    import pytorch_lightning as pl

    from knet_train.fit import train

    class Losses(pl.Callback):
        def __init__(self) -> None:
            self.found: list[float] = []

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            self.found.append(float(trainer.callback_metrics["loss"]))

    write_panoptic(tmp_path / "data", images=4)
    # Crops that hold this object or that one, and no norms of a batch, which are of a part.
    settings = (*TINY, "model.kernels=20", "optim.batch_size=4", "optim.steps=1")
    settings += ("data.scale=[2.5, 3.5]",)
    settings += ('optim.held_norms=["*"]', "trainer.val_every=1")
    runs = {}
    weights = tmp_path / "backbone.safetensors"
    for parts in (1, 2):
        config = load_config(f"knet-edge-{task}", [*settings, f"optim.accumulate={parts}"])
        if not weights.exists():
            torch.manual_seed(1)
            save_file(build_backbone(config.model).state_dict(), weights)
        watch, folder = Losses(), tmp_path / f"{parts}"
        train(config, tmp_path / "data", folder, backbone_weights=weights, callbacks=[watch])
        assert len(watch.found) == parts
        runs[parts] = watch.found
    assert sum(runs[2]) / 2 == pytest.approx(runs[1][0], rel=1e-5)


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_a_split_of_other_categories_is_refused(tmp_path: Path, task: Any) -> None:
    from knet_train.fit import train

    write_panoptic(tmp_path)
    path = write_panoptic(tmp_path, "val")
    path.write_text(path.read_text().replace('"car"', '"lorry"'))
    config = load_config(f"knet-edge-{task}", [*TINY, "data.val_split=val"])
    text = "panoptic_val.json has other categories than panoptic_train.json: give both the same"
    with pytest.raises(DataError, match=text):
        train(config, tmp_path, tmp_path / "run")
    assert not (tmp_path / "run").exists()
