"""What optim.* and trainer.* promise, held by whole runs of six steps."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file

from knet_runtime.errors import ConfigError
from knet_train.fit import RunResult
from knet_train.module import recompute_backbone

Different = Callable[[Path, Path], list[str]]
# All BatchNorms of knet-edge, and the rest of its head.
FROZEN_NORMS = (
    'optim.layers=[{pattern="backbone*.bn*", lr_scale=0.0}, {pattern="head.*", lr_scale=0.0}]'
)


class At(pl.Callback):
    """Does something at the start of one step; Ctrl-C unless told otherwise."""

    def __init__(self, step: int, act: Callable[[], object] | None = None) -> None:
        self.step = step
        self.act = act or (lambda: os.kill(os.getpid(), signal.SIGINT))

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step + 1 == self.step:
            self.act()


def test_without_an_average_the_weights_themselves_are_kept(
    go: Callable[..., RunResult], different: Different
) -> None:
    class Last(pl.Callback):
        weight = torch.zeros(())

        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            self.weight = module.model.conv_seg.weight.detach().clone()

    last = Last()
    settings = ("optim.ema_decay=0", "trainer.val_every=3")
    expected = go("whole", *settings, callbacks=[last])
    assert torch.equal(load_file(expected.last)["conv_seg.weight"], last.weight)
    with pytest.raises(KeyboardInterrupt):
        go("parts", *settings, callbacks=[At(4)])
    assert not different(expected.last, go("parts", *settings, resume=True).last)


def test_accumulated_parts_make_the_same_step(go: Callable[..., RunResult]) -> None:
    """With norms that do not see how a batch is cut, which are the frozen ones."""

    class Parts(pl.Callback):
        def __init__(self) -> None:
            self.losses: list[float] = []

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            self.losses.append(float(outputs["loss"]))

    whole, parts = Parts(), Parts()
    settings = ("optim.batch_size=4", "model.dropout=0", FROZEN_NORMS, "trainer.val_every=6")
    go("whole", *settings, callbacks=[whole])
    go("parts", *settings, "optim.accumulate=2", callbacks=[parts])
    assert len(parts.losses) == 2 * len(whole.losses) == 12
    sums = np.reshape(parts.losses, (6, 2)).sum(1)  # Lightning gives each part's share
    np.testing.assert_allclose(sums[0], whole.losses[0], rtol=1e-6)
    np.testing.assert_allclose(sums, whole.losses, rtol=1e-3)


def test_an_interrupted_run_of_accumulated_parts_resumes_too(
    go: Callable[..., RunResult], different: Different
) -> None:
    settings = ("optim.accumulate=2", "optim.batch_size=4")
    expected = go("whole", *settings)
    with pytest.raises(KeyboardInterrupt):
        go("parts", *settings, callbacks=[At(3)])
    assert not different(expected.last, go("parts", *settings, resume=True).last)


def test_frozen_layers_stay_as_they_were(go: Callable[..., RunResult], backbone_file: Path) -> None:
    result = go("run", 'optim.layers=[{pattern="backbone.*", lr_scale=0.0}]')
    before, after = load_file(backbone_file), load_file(result.last)
    assert all(torch.equal(after[f"backbone.{key}"], value) for key, value in before.items())


def test_recomputing_the_backbone_changes_nothing(
    go: Callable[..., RunResult], whole: Callable[..., Any], different: Different
) -> None:
    """Losses, gradients, and what BatchNorm counts: all weights after six steps are equal."""
    again = go("again", "trainer.gradient_checkpointing=true")
    assert not different(whole().last, again.last)


def test_deterministic_mode_ends_with_the_run(go: Callable[..., RunResult]) -> None:
    seen = []
    watch = At(1, lambda: seen.append(torch.are_deterministic_algorithms_enabled()))
    go("run", "optim.steps=2", "trainer.deterministic=true", callbacks=[watch])
    assert seen == [True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_cannot_be_recomputed_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"odd cannot be recomputed.*gradient_checkpointing"):
        recompute_backbone(torch.nn.Conv2d(3, 3, 1), "odd")


def test_the_backbone_really_is_computed_twice(go: Callable[..., RunResult]) -> None:
    """And the kernels' stages are not."""

    class Count(pl.Callback):
        backbone = stages = 0

        def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
            def backbone(*_: Any) -> None:
                self.backbone += 1

            def stages(*_: Any) -> None:
                self.stages += 1

            module.model.backbone.blocks[2][0].register_forward_pre_hook(backbone)
            module.model.stages[0].register_forward_pre_hook(stages)

    count, short = Count(), ("optim.steps=1", "trainer.val_every=2")
    go("run", *short, "trainer.gradient_checkpointing=true", callbacks=[count])
    images = 6  # of the evaluation
    assert (count.backbone, count.stages) == (2 + images, 1 + images)
