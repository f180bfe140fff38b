"""The folder of a run: the weights and states that a run writes into it, and what it may be started
in or resumed from."""

from __future__ import annotations

import logging
import signal
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from knet_train.data.batches import Part, SegmentPart
from knet_train.finite import all_finite
from knet_train.module import RUN_KEY, SCORED, TrainingModule

BEST, LAST = "best.safetensors", "last.safetensors"
STATE, PREVIOUS, CONFIG = "resume.ckpt", "resume.previous.ckpt", "config.json"
_DAMAGED = "resume.damaged.ckpt"
_TERMINATIONS = {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedState:
    """A whole state of a run."""

    path: Path
    step: int
    class_names: tuple[str, ...]
    config: Config
    soft_labels: tuple[int, int] = (0, 0)  # ``SoftLabels.counts`` of the run
    instead_of: str | None = None  # why it is the one before the last, in words


def state_to_resume(run: Path, config: Config, resume: bool) -> SavedState | None:
    """The state that the run continues from; None where it starts at step 0.

    A run is started once, and resumed with the configuration that it was started with; only
    ``trainer`` may differ, but for its seed. One that was stopped before its first state was
    written starts again. Where the last state is damaged, the one before it is taken. Raises
    OutputError, CheckpointError or ConfigError; writes nothing.
    """
    state, previous, last = run / STATE, run / PREVIOUS, run / LAST
    saved = [path for path in (state, previous) if path.exists()]
    if not resume:
        if saved or last.exists():
            raise OutputError(
                f"{run} already holds a run: pass --resume to continue it, or another --out"
            )
        return None
    if last.exists():
        raise OutputError(f"{run} is complete ({last.name} is there): pass another --out")
    if saved or (run / CONFIG).is_file():
        _check_same(run, began_with(run), config)
    faults = []
    for path in saved:
        found = read_state(path)
        if isinstance(found, str):
            faults.append(found)
            continue
        _check_same(run, found.config, config)
        if faults:
            reason = f"{state} is damaged ({faults[0]}) and kept as {_DAMAGED}"
            return replace(found, instead_of=reason)
        return found
    if faults:
        both = f", and so is {previous}" if len(faults) > 1 else ""
        raise CheckpointError(
            f"{saved[0]} is damaged{both}: start a new run with another --out ({faults[0]})"
        )
    return None


def read_state(path: Path) -> SavedState | str:
    """The state in a file, or why it is none, in words. Nothing in the file is executed."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch itself compares no checksums
                return "a checksum does not match"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except Exception as error:  # a damaged archive raises nearly anything
        _log.info("%s: %s", path, error)
        return "it is cut off, or was changed"
    try:
        # Tensors stay in the file until they are looked at.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        about = state[RUN_KEY]
        config = msgspec.json.decode(about["config"], type=Config)
        labelled, unlabelled = about.get("soft_labels", (0, 0))
        found = SavedState(
            path,
            int(state["global_step"]),
            tuple(about["class_names"]),
            config,
            (labelled, unlabelled),
        )
    except Exception as error:  # and so does a foreign one
        _log.info("%s: %s", path, error)
        return "this version of train has not written it"
    return found if all_finite(state) else "it holds weights that are not finite"


def began_with(run: Path) -> Config:
    """The configuration that a run was started with. Raises CheckpointError."""
    settings = run / CONFIG
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


def prepare(run: Path, config: Config, state: SavedState | None) -> None:
    """Make the folder, remove what killed processes left in it, put a damaged state aside, and
    write the configuration.

    Raises OutputError.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        for leftover in run.glob(".*.part"):
            leftover.unlink(missing_ok=True)
        if state is not None and state.instead_of is not None:
            (run / STATE).replace(run / _DAMAGED)
        write_atomic(run / CONFIG, msgspec.json.format(msgspec.json.encode(config)))
    except OSError as error:
        raise OutputError(f"cannot write to {run}: {error.strerror}; pass another --out") from error


class SaveBest(pl.Callback):
    """Writes ``best.safetensors`` whenever the averaged weights score higher than before (on the
    drives left out, if there are any, else on the validation split), and
    ``last.safetensors`` with the last step; the first of the processes does.

    It must stand before the weight averaging in the list of callbacks: it then still sees the
    averaged weights when an evaluation ends.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.best = -1.0
        self.scored = 0  # classes that the mean is over

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        evaluated = pl_module.evaluated = pl_module.scores()
        for of, scores in zip(SCORED, evaluated, strict=False):
            for place, (name, score) in enumerate(scores.logged.items()):
                first = place == 0
                pl_module.log(f"{of}_{name}", score, prog_bar=first, sync_dist=True, batch_size=1)
        best, scored, *_ = evaluated[-1].logged.values()
        if best > self.best:
            self.best, self.scored = best, int(scored)
            self._save(pl_module, BEST)
        if trainer.global_step >= pl_module.config.optim.steps:
            self._save(pl_module, LAST)

    def _save(self, module: TrainingModule, name: str) -> None:
        if module.trainer.is_global_zero:
            save_checkpoint(self.run / name, module.model, module.config, module.label_map)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "scored": self.scored}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.scored = state_dict["best"], state_dict["scored"]


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and has saved its state at ``step``."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped at step {step}")
        self.step = step


class _Stop(Exception):
    """Ends ``Trainer.fit`` behind ``step``. Lightning turns a KeyboardInterrupt into SystemExit,
    and leaves SIGINT ignored; any other exception it lets through."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


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
            for number in _TERMINATIONS:
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves SIGHUP
                    signal.signal(number, self._ask)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Part | SegmentPart,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        config, step = pl_module.config, trainer.global_step
        if not pl_module.ends_step(batch):
            return
        if step % config.trainer.val_every == 0 or step >= config.optim.steps:
            return  # an evaluation follows
        stop = self._somebody_asked(trainer)
        if stop or step % config.trainer.save_every == 0:
            self._save(trainer, pl_module)
        if stop:
            raise _Stop(step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        step = trainer.global_step
        if trainer.state.fn == TrainerFn.FITTING:
            self._save(trainer, pl_module)
        if self._somebody_asked(trainer) and step < pl_module.config.optim.steps:
            raise _Stop(step)

    def _save(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        trainer.save_checkpoint(self.path)
        module.saved_step = trainer.global_step

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
        """Inside the block the first Ctrl-C, SIGTERM or SIGHUP ends the step (or evaluation) and
        saves, the second ends at once. The block then raises Stopped, or KeyboardInterrupt; all but
        Ctrl-C is then sent once more to whoever handled it before."""
        main = threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, *_TERMINATIONS)}
        if main:
            signal.signal(signal.SIGINT, self._ask)
        try:
            yield
        except _Stop as end:
            raise Stopped(end.step) from end
        except SystemExit as end:
            raise KeyboardInterrupt from end
        finally:
            if main:
                for number, handler in before.items():
                    signal.signal(number, handler)
                asked = self.asked_to_stop
                if asked is not None and asked in _TERMINATIONS:
                    signal.raise_signal(asked)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's states, each written beside the last one, which then becomes the one before:
    whatever happens meanwhile, one of the two is there and complete."""

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
            with _as_previous(file.target):
                file.commit(complete=True)


@contextmanager
def _as_previous(state: Path) -> Iterator[None]:
    """Inside the block the last state has the name of the one before; it keeps it where the block
    has put another in its place."""
    previous = state.with_name(PREVIOUS)
    moved = state.exists()
    if moved:
        state.replace(previous)
    try:
        yield
    finally:
        if moved and not state.exists():
            previous.replace(state)


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, then those that it was raised from or in the handling of, latest first."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
