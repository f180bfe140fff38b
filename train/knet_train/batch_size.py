"""How many parts the images of a step are computed in, so that a GPU's memory holds them.

A step learns from ``optim.batch_size`` images whatever the number of its parts, so that learning
rate and schedule stay right; only the statistics of BatchNorms that learn are of one part.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytorch_lightning as pl
import torch

from knet_runtime.errors import ConfigError
from knet_train.config import Config
from knet_train.data.batches import Part, SegmentPart
from knet_train.devices import process_count
from knet_train.fit import MemoryRanOut, RunResult, train
from knet_train.module import TrainingModule

_STEPS = 2  # the first one makes the optimizer's state, and the second one meets it


def fit_accumulate(
    config: Config,
    data: Path,
    *,
    backbone_weights: Path | None = None,
    init: Path | None = None,
    soft_labels: Sequence[Path] = (),
    unlabelled: Sequence[Path] = (),
) -> Config:
    """The configuration with the smallest ``optim.accumulate`` whose parts fit into the GPU.

    Two steps are done with each, in folders that are removed again. Raises what ``train`` raises:
    ConfigError where not even single images fit, without a GPU, and for a run of more than one
    process.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "--batch auto tries what fits into a GPU, and this machine shows none: leave it out, "
            "and set optim.batch_size and optim.accumulate"
        )
    if process_count(config.trainer) > 1:
        raise ConfigError(
            "--batch auto tries a run on one device: pass --set trainer.devices=1 --set "
            "trainer.nodes=1, or set optim.accumulate"
        )
    begin = partial(
        train,
        data=data,
        backbone_weights=backbone_weights,
        init=init,
        soft_labels=soft_labels,
        unlabelled=unlabelled,
        loggers=(),
    )
    size = config.optim.batch_size
    for parts in [count for count in range(1, size + 1) if size % count == 0]:
        tried = msgspec.structs.replace(
            config, optim=msgspec.structs.replace(config.optim, accumulate=parts)
        )
        try:
            _try(tried, begin)
        except MemoryRanOut:
            if parts == size:
                raise
        else:
            return tried
        finally:  # outside of the handler, which would keep the tensors
            gc.collect()
            torch.cuda.empty_cache()
    raise AssertionError("the last number of parts fits, or raises")


def _try(config: Config, begin: Callable[..., RunResult]) -> None:
    optim = msgspec.structs.replace(config.optim, steps=max(config.optim.steps, _STEPS + 1))
    trainer = msgspec.structs.replace(config.trainer, val_every=_STEPS + 1, save_every=_STEPS + 1)
    tried = msgspec.structs.replace(config, optim=optim, trainer=trainer)
    log = logging.getLogger("knet_train")
    level = log.level
    log.setLevel(logging.ERROR)  # the run itself says it again
    try:
        with tempfile.TemporaryDirectory(prefix="knet-batch-") as run, contextlib.suppress(_Fits):
            begin(tried, run=Path(run), callbacks=[_Enough()])
    finally:
        log.setLevel(level)


class _Fits(Exception):
    """Ends a run that was only tried."""


class _Enough(pl.Callback):
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Part | SegmentPart,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        if pl_module.ends_step(batch) and trainer.global_step == _STEPS:
            raise _Fits
