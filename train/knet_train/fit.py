"""One training run: folder of pictures in, folder of checkpoints and logs out."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from pytorch_lightning.callbacks import Callback, EMAWeightAveraging
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger

from knet_runtime.errors import CheckpointError, ConfigError, OutputError
from knet_runtime.labels import CAMVID11
from knet_train.allocator import keep_freed_memory
from knet_train.backbones import load_pretrained
from knet_train.build import build_model
from knet_train.config import Config
from knet_train.dataset import LabelledFolder, open_folder, read_label
from knet_train.evaluate import evaluate
from knet_train.keep import KeepBest, KeepState
from knet_train.lightning import KNetModule, StreetData
from knet_train.loss import class_weights
from knet_train.quiet import quiet_lightning

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


@dataclass(frozen=True)
class RunResult:
    """Where a run left its weights, and the best score that it saw (mIoU, 0 … 1)."""

    best: Path
    last: Path
    best_miou: float


def train(
    config: Config,
    data: Path,
    run: Path,
    *,
    backbone_weights: Path | None = None,
    resume: bool = False,
    callbacks: list[Callback] | None = None,
) -> RunResult:
    """Train on ``data`` into ``run``: ``config.json``, ``best.safetensors`` (highest mIoU on the
    validation split), ``last.safetensors`` (the end), ``resume.ckpt``, and CSV and TensorBoard
    logs. ``resume`` goes on from ``resume.ckpt``.

    Ctrl-C ends the step, saves ``resume.ckpt`` and raises KeyboardInterrupt. Progress bars and
    the like come as ``callbacks``.

    Raises ConfigError, DataError, CheckpointError or OutputError before any work is done.
    """
    train_folder = open_folder(data, config.data.train_split)
    val_folder = open_folder(data, config.data.val_split)
    _check_classes(config, train_folder)
    state = run / "resume.ckpt"
    _check_run(run, config, resume)
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(config)))
    except OSError as error:
        raise OutputError(
            f"can not write to {run}: {error.strerror}; pass another --out"
        ) from error

    pl.seed_everything(config.trainer.seed, verbose=False)
    model = build_model(config.model, train_folder.labels.num_classes)
    if not resume:
        load_pretrained(model.backbone, config.model, backbone_weights)
    model = model.to(memory_format=torch.channels_last)
    pixels = count_pixels(train_folder)
    module = KNetModule(
        model, config, train_folder, class_weights(pixels, config.loss.class_balance)
    )

    best, keep = KeepBest(run), KeepState(state)
    average = EMAWeightAveraging(decay=config.optim.ema_decay)
    with quiet_lightning():
        trainer = pl.Trainer(
            max_steps=config.optim.steps,
            max_epochs=-1,
            accelerator="auto",
            devices=1,
            precision=_precision(config),
            gradient_clip_val=config.optim.clip_norm,
            val_check_interval=config.trainer.val_every,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            log_every_n_steps=10,
            logger=_loggers(run),
            callbacks=[best, average, *(callbacks or []), keep],
            enable_checkpointing=False,
            enable_progress_bar=any("ProgressBar" in type(c).__name__ for c in callbacks or []),
            enable_model_summary=False,
        )
        if trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        with keep.interruptible():
            trainer.fit(
                module,
                datamodule=StreetData(train_folder, val_folder, config),
                ckpt_path=state if resume else None,
            )
    if config.optim.steps % config.trainer.val_every:  # else the last step was evaluated
        model.eval()
        best.offer(module, evaluate(model, val_folder, config))
        best.save(module, "last.safetensors")
    return RunResult(run / "best.safetensors", run / "last.safetensors", best.best)


def _check_classes(config: Config, folder: LabelledFolder) -> None:
    names = folder.labels.names
    if config.data.synthetic_share > 0 and names != CAMVID11.names:
        raise ConfigError(
            "synthetic streets have CamVid's eleven classes and this data has others: "
            "pass --set data.synthetic_share=0"
        )


def _check_run(run: Path, config: Config, resume: bool) -> None:
    """A run is started once, and resumed with the configuration that it was started with."""
    state, last = run / "resume.ckpt", run / "last.safetensors"
    if resume and last.exists():
        raise OutputError(f"{run} is complete ({last.name} is there): pass another --out")
    if resume and not state.is_file():
        raise CheckpointError(f"nothing to resume: {state} does not exist; leave out --resume")
    if resume and not zipfile.is_zipfile(state):
        raise CheckpointError(f"{state} is damaged: start a new run with another --out")
    if not resume and any((run / name).exists() for name in (state.name, last.name)):
        raise OutputError(f"{run} already holds a run: pass --resume to go on, or another --out")
    if not resume:
        return
    try:
        began = msgspec.json.decode((run / "config.json").read_bytes(), type=Config)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(
            f"{run / 'config.json'}: {error}; the run can not go on without it: start a new one"
        ) from error
    for section in ("model", "data", "loss", "optim"):
        old, new = getattr(began, section), getattr(config, section)
        for key in old.__struct_fields__:
            if getattr(old, key) != getattr(new, key):
                raise ConfigError(
                    f"{run} was started with {section}.{key} = {getattr(old, key)!r}, not "
                    f"{getattr(new, key)!r}: resume with the same, or start a new run"
                )


def _loggers(run: Path) -> list[Logger]:
    """CSV and TensorBoard, together in ``run/logs/version_N``; a resumed run starts a new N."""
    table = CSVLogger(run, "logs")
    return [table, TensorBoardLogger(run, "logs", version=table.version)]


def count_pixels(folder: LabelledFolder) -> NDArray[np.int64]:
    """Labelled pixels of each class over a split."""
    pixels = np.zeros(256, np.int64)
    for sample in folder.samples:
        pixels += np.bincount(read_label(sample.label, folder.labels).ravel(), minlength=256)
    return pixels[: folder.labels.num_classes]


def _precision(config: Config) -> Precision:
    """What ``precision = "auto"`` means here: bf16 where the device computes in it, else fp32."""
    if config.trainer.precision != "auto":
        return config.trainer.precision
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    return "bf16-mixed" if _cpu_has_bf16() else "32-true"


def _cpu_has_bf16() -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
