"""The folder of a run: the weights and states that a run writes into it, and what it may be started
in or resumed from."""

from __future__ import annotations

import logging
import signal
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.trainer.states import TrainerFn

from knet_runtime.atomic import AtomicFile, output_error, write_atomic
from knet_runtime.errors import CheckpointError, ConfigError, OutputError
from knet_train.checkpoint import save_checkpoint
from knet_train.config import Config
from knet_train.data.batches import Part
from knet_train.module import KNetModule

BEST, LAST = "best.safetensors", "last.safetensors"
STATE, CONFIG = "resume.ckpt", "config.json"
_log = logging.getLogger(__name__)


def state_to_resume(run: Path, config: Config, resume: bool) -> Path | None:
    """The state that the run continues from; None where it starts at step 0.

    A run is started once, and resumed with the configuration that it was started with; only
    ``trainer`` may differ, but for its seed. One that was stopped before its first state was
    written starts again. Raises OutputError, CheckpointError or ConfigError; writes nothing.
    """
    state, last, settings = run / STATE, run / LAST, run / CONFIG
    if not resume:
        if state.exists() or last.exists():
            raise OutputError(
                f"{run} already holds a run: pass --resume to continue it, or another --out"
            )
        return None
    if last.exists():
        raise OutputError(f"{run} is complete ({last.name} is there): pass another --out")
    if state.is_file() or settings.is_file():
        _check_same(run, _began_with(settings), config)
    if not state.is_file():
        return None
    if not zipfile.is_zipfile(state):
        raise CheckpointError(f"{state} is damaged: start a new run with another --out")
    return state


def _began_with(settings: Path) -> Config:
    try:
        return msgspec.json.decode(settings.read_bytes(), type=Config)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(
            f"{settings}: {error}; the run cannot be resumed without it: start a new one"
        ) from error


def _check_same(run: Path, began: Config, config: Config) -> None:
    for section in ("model", "data", "loss", "optim", "trainer"):
        old, new = getattr(began, section), getattr(config, section)
        for key in ("seed",) if section == "trainer" else old.__struct_fields__:
            if getattr(old, key) != getattr(new, key):
                raise ConfigError(
                    f"{run} was started with {section}.{key} = {getattr(old, key)!r}, not "
                    f"{getattr(new, key)!r}: resume with the same, or start a new run"
                )


def prepare(run: Path, config: Config) -> None:
    """Make the folder, remove what killed processes left in it, and write the configuration.

    Raises OutputError.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        for leftover in run.glob(".*.part"):
            leftover.unlink(missing_ok=True)
        write_atomic(run / CONFIG, msgspec.json.format(msgspec.json.encode(config)))
    except OSError as error:
        raise OutputError(f"cannot write to {run}: {error.strerror}; pass another --out") from error


class SaveBest(pl.Callback):
    """Writes ``best.safetensors`` whenever the averaged weights score higher than before, and
    ``last.safetensors`` with the last step; the first of the processes does.

    It must stand before the weight averaging in the list of callbacks: it then still sees the
    averaged weights when an evaluation ends.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.best = -1.0

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, KNetModule)
        confusion = pl_module.gather_confusion()
        scores = {"val_miou": confusion.miou, "val_pixel_accuracy": confusion.pixel_accuracy}
        for name, score in scores.items():
            pl_module.log(name, score, prog_bar=name == "val_miou", sync_dist=True, batch_size=1)
        if confusion.miou > self.best:
            self.best = confusion.miou
            self._save(pl_module, BEST)
        if trainer.global_step >= pl_module.config.optim.steps:
            self._save(pl_module, LAST)

    def _save(self, module: KNetModule, name: str) -> None:
        if module.trainer.is_global_zero:
            save_checkpoint(self.run / name, module.model, module.config, module.label_map)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]


class _Stop(Exception):
    """Ends ``Trainer.fit``. Lightning turns a KeyboardInterrupt into SystemExit, and leaves
    SIGINT ignored; any other exception it lets through."""


class SaveResumeState(pl.Callback):
    """Writes ``resume.ckpt`` every ``trainer.save_every`` steps, after every evaluation, and when
    the user stops the run.

    Where an evaluation is due the state is saved after it and not before: a resumed run would not
    repeat it, and would forget the best score. It must stand last in the list of callbacks: the
    average then holds the step that has just ended, and the others have seen it.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / STATE
        self.asked_to_stop: signal.Signals | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning has put its own SIGTERM handler in place by now, which would end the run at
        # once (and talk to the other processes in the middle of whatever they say).
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._ask)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Part,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, KNetModule)
        config, step = pl_module.config, trainer.global_step
        if batch.part + 1 < config.optim.accumulate:
            return
        if step % config.trainer.val_every == 0 or step >= config.optim.steps:
            return  # an evaluation follows
        stop = self._somebody_asked(trainer)
        if stop or step % config.trainer.save_every == 0:
            trainer.save_checkpoint(self.path)
        if stop:
            raise _Stop

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            trainer.save_checkpoint(self.path)
        if self._somebody_asked(trainer):
            raise _Stop

    def _somebody_asked(self, trainer: pl.Trainer) -> bool:
        """Whether any process was asked to stop; all of them get the same answer."""
        asked = self.asked_to_stop is not None
        return trainer.strategy.reduce_boolean_decision(asked, all=False)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self.asked_to_stop is not None:
            raise KeyboardInterrupt
        self.asked_to_stop = signal.Signals(number)
        _log.warning("stopping after this step; press Ctrl-C again to stop without saving")

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside the block the first Ctrl-C or SIGTERM ends the step (or evaluation) and saves,
        the second ends at once. The block then raises KeyboardInterrupt; after a SIGTERM, that
        signal is sent once more to whoever handled it before."""
        main = threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        if main:
            signal.signal(signal.SIGINT, self._ask)
        try:
            yield
        except (_Stop, SystemExit) as end:
            raise KeyboardInterrupt from end
        finally:
            if main:
                for number, handler in before.items():
                    signal.signal(number, handler)
                if self.asked_to_stop == signal.SIGTERM:
                    signal.raise_signal(signal.SIGTERM)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's states, each written beside the last one and then put in its place: whatever
    happens meanwhile, one of the two is there and complete."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Raises OutputError; the state before is then as it was."""
        with AtomicFile(Path(path)) as file:
            try:
                with file.temporary.open("wb") as temporary:
                    torch.save(checkpoint, temporary)
            except (OSError, RuntimeError) as error:
                # torch hides a failed write behind a RuntimeError of its own.
                reason = next((e for e in causes(error) if isinstance(e, OSError)), None)
                if reason is None:
                    raise
                raise output_error(file.target, reason) from error
            file.commit(complete=True)


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, then those that it was raised from or in the handling of, latest first."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
