"""What a run will take: a few of its steps are done, and a few of its images evaluated."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec
import pytorch_lightning as pl
import torch

from knet_runtime.errors import ConfigError
from knet_train.checkpoint import save_checkpoint
from knet_train.config import Config
from knet_train.data.batches import Part, SegmentPart
from knet_train.devices import process_count
from knet_train.fit import train
from knet_train.module import TrainingModule
from knet_train.run_facts import run_facts
from knet_train.run_folder import STATE

_WARM, _STEPS = 2, 6  # the first ones, which take longer; and those that are done
_IMAGES = 8  # that are evaluated
_STATES, _WEIGHTS = 3, 2  # files of a run: the last state, the one before, the next; best and last


class Estimate(msgspec.Struct, frozen=True):
    """``facts`` are ``run_facts``. ``step`` and ``evaluation`` are seconds of one, ``total`` of the
    whole run. ``memory`` is the peak in bytes: of the GPU, or of this process (without those that
    read images), None where it is not known; ``disk`` is the most that the run folder holds."""

    facts: dict[str, str]
    step: float
    evaluation: float
    evaluations: int
    total: float
    memory: int | None
    disk: int


def estimate(
    config: Config,
    data: Path,
    *,
    backbone_weights: Path | None = None,
    init: Path | None = None,
    soft_labels: Sequence[Path] = (),
    unlabelled: Sequence[Path] = (),
) -> Estimate:
    """Begin the run that ``train`` would do, in a folder of its own that is removed again.

    The time to start, to save states and to judge AP is not in it. Raises what ``train`` raises:
    ConfigError where memory runs out, and for a run of more than one process.
    """
    if process_count(config.trainer) > 1:
        raise ConfigError(
            "--estimate tries a run on one device: pass --set trainer.devices=1 --set "
            "trainer.nodes=1, and optim.batch_size divided by their number"
        )
    optim = msgspec.structs.replace(config.optim, steps=max(config.optim.steps, _STEPS + 2))
    trainer = msgspec.structs.replace(config.trainer, val_every=_STEPS + 1, save_every=_STEPS)
    tried = msgspec.structs.replace(config, optim=optim, trainer=trainer)
    with tempfile.TemporaryDirectory(prefix="knet-estimate-") as folder:
        probe = _Probe(Path(folder))
        with contextlib.suppress(_Enough):
            train(
                tried,
                data,
                Path(folder),
                backbone_weights=backbone_weights,
                init=init,
                soft_labels=soft_labels,
                unlabelled=unlabelled,
                callbacks=[probe],
            )
    evaluations = -(-config.optim.steps // config.trainer.val_every)
    return Estimate(
        facts=probe.facts,
        step=probe.step,
        evaluation=probe.evaluation,
        evaluations=evaluations,
        total=config.optim.steps * probe.step + evaluations * probe.evaluation,
        memory=probe.memory,
        disk=probe.disk,
    )


class _Enough(Exception):
    """Ends the run that was only tried."""


class _Probe(pl.Callback):
    """Measures, and raises _Enough once a few images were evaluated."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.facts: dict[str, str] = {}
        self.step = self.evaluation = self._began = 0.0
        self.memory: int | None = None
        self.disk = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        self.facts = run_facts(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Part | SegmentPart,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        if not pl_module.ends_step(batch):
            return
        if trainer.global_step == _WARM:
            self._began = _now()
        if trainer.global_step == _STEPS:
            self.step = (_now() - self._began) / (_STEPS - _WARM)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = _now()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        counts = [int(count) for count in trainer.num_val_batches]
        done, images = sum(counts[:dataloader_idx]) + batch_idx + 1, sum(counts)
        if done < min(_IMAGES, images):
            return
        assert isinstance(pl_module, TrainingModule)
        self.evaluation = (_now() - self._began) / done * images
        self.memory = peak_memory()
        weights = self.run / "weights.safetensors"
        save_checkpoint(weights, pl_module.model, pl_module.config, pl_module.label_map)
        state = (self.run / STATE).stat().st_size
        self.disk = _STATES * state + _WEIGHTS * weights.stat().st_size
        raise _Enough


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return monotonic()


def peak_memory() -> int | None:
    """The most bytes so far: of the GPU, as torch has reserved them, or else of this process; None
    where neither is known."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    if sys.platform == "win32":
        return None
    import resource

    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib if sys.platform == "darwin" else 1024 * kib  # which counts bytes
