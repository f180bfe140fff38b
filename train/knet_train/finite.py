"""A run whose loss or weights are no longer finite ends, and nothing of it is saved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from knet_runtime.errors import TrainingError
from knet_train.data.batches import Part, SegmentPart
from knet_train.module import TrainingModule, lr_factor

_STEPS_PER_LOOK = 5  # on a GPU, where to look at the loss is to wait for it
_FORGIVEN = 4  # steps in a row that 16-bit AMP may leave out while it looks for its scale


class StopWhenNotFinite(pl.Callback):
    """Raises TrainingError within a few steps of the first loss that is NaN or infinite, and before
    such weights or averages are evaluated or saved. All processes do so after the same step.

    It must stand behind the weight averaging in the list of callbacks, to see the averages.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.streak: Tensor | int = 0  # parts of steps in a row whose loss was not finite

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Part | SegmentPart,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        loss, parts = trainer.callback_metrics["loss"], pl_module.config.optim.accumulate
        self.streak = torch.where(torch.isfinite(loss), 0, self.streak + 1)
        if loss.is_cuda and (batch_idx + 1) % (parts * _STEPS_PER_LOOK):
            return
        streak, forgiven = int(self.streak), _FORGIVEN if trainer.precision == "16-mixed" else 0
        if streak > forgiven * parts:
            first = trainer.global_step - (streak - 1) // parts
            raise _diverged("the loss is not finite", pl_module, first, self.run)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_weights(pl_module, pl_module.state_dict())  # the averages, at this time

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._check_weights(pl_module, checkpoint)

    def _check_weights(self, module: pl.LightningModule, values: dict[str, Any]) -> None:
        assert isinstance(module, TrainingModule)
        if not all_finite(values):
            raise _diverged("the weights are not finite", module, module.global_step, self.run)


def _diverged(what: str, module: TrainingModule, step: int, run: Path) -> TrainingError:
    """The error that says ``what`` was seen at ``step``, what is kept, and what to try."""
    config, precision = module.config, module.trainer.precision
    rate = config.optim.lr * lr_factor(max(0, step - 1), config.optim)
    kept = "no state was saved before"
    if module.saved_step is not None:
        kept = f"{run / 'resume.ckpt'}, of step {module.saved_step}, is kept"
    advice = "start a new run with a lower optim.lr or more optim.warmup_steps"
    if precision != "32-true" and module.saved_step is not None:
        advice += ", or continue with --resume --set trainer.precision=32-true"
    return TrainingError(
        f"{what} at step {step} (learning rate {rate:.3g}, precision {precision}); {kept}: {advice}"
    )


def all_finite(value: Any) -> bool:
    """Whether no tensor in nested dicts, lists and tuples holds NaN or infinity."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in _floats(value))


def _floats(value: Any) -> Iterator[Tensor]:
    match value:
        case Tensor() if value.is_floating_point():
            yield value
        case dict():
            for inner in value.values():
                yield from _floats(inner)
        case list() | tuple():
            for inner in value:
                yield from _floats(inner)
