"""What a run leaves on disk while it goes on: the best weights, and where to go on from."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl

from knet_runtime.metrics import ConfusionMatrix
from knet_train.checkpoint import save_checkpoint
from knet_train.lightning import KNetModule

log = logging.getLogger(__name__)


class KeepBest(pl.Callback):
    """Writes ``best.safetensors`` whenever the averaged weights score higher than before, and
    ``last.safetensors`` with the last step.

    It must stand before the weight averaging in the list of callbacks: it then still sees the
    averaged weights when an evaluation ends.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.best = -1.0

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, KNetModule)
        pl_module.log("val_miou", pl_module.confusion.miou, prog_bar=True)
        pl_module.log("val_pixel_accuracy", pl_module.confusion.pixel_accuracy)
        self.offer(pl_module, pl_module.confusion)
        if trainer.global_step >= pl_module.config.optim.steps:
            self.save(pl_module, "last.safetensors")

    def offer(self, module: KNetModule, confusion: ConfusionMatrix) -> None:
        """Keep the weights of ``module`` if ``confusion`` is the best score so far."""
        if confusion.miou > self.best:
            self.best = confusion.miou
            self.save(module, "best.safetensors")

    def save(self, module: KNetModule, name: str) -> None:
        save_checkpoint(self.run / name, module.model, module.config, module.label_map)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]


class _Stop(Exception):
    """Ends ``Trainer.fit``. Lightning turns a KeyboardInterrupt into SystemExit, and leaves
    SIGINT ignored; any other exception it lets through."""


class KeepState(pl.Callback):
    """Writes ``resume.ckpt`` after every evaluation, and when the user stops the run.

    Saved after the evaluation and not before: a resumed run would not repeat it, and would forget
    the best score. It must stand last in the list of callbacks: the average then holds the
    step that has just ended, and the others have seen it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked_to_stop = False

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, KNetModule)
        due = trainer.global_step % pl_module.config.trainer.val_every == 0
        if self.asked_to_stop and not due and trainer.global_step < pl_module.config.optim.steps:
            trainer.save_checkpoint(self.path)
            raise _Stop

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path)
        if self.asked_to_stop:
            raise _Stop

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside the block the first Ctrl-C ends the step (or evaluation) and saves, the second
        ends at once; either way the block raises KeyboardInterrupt."""

        def ask(_signal: int, _frame: FrameType | None) -> None:
            if self.asked_to_stop:
                raise KeyboardInterrupt
            self.asked_to_stop = True
            log.warning("stopping after this step; press Ctrl-C again to stop without saving")

        main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGINT)
        if main:
            signal.signal(signal.SIGINT, ask)
        try:
            yield
        except (_Stop, SystemExit) as end:
            raise KeyboardInterrupt from end
        finally:
            if main:
                signal.signal(signal.SIGINT, before)
