"""One training run: folder of pictures in, folder of checkpoints and logs out.

How the C library hands out large tensors, which decides the speed of training on a CPU.

Lightning's advice, silenced where it does not apply to our runs.
"""

from __future__ import annotations

import ctypes
import logging
import platform
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from pytorch_lightning.callbacks import Callback, WeightAveraging
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor

from knet_runtime.errors import ConfigError, KnetError, TrainingError
from knet_synthetic import CAMVID11
from knet_train.callbacks import (
    STATE,
    KeepBest,
    KeepState,
    WholeStates,
    causes,
    prepare,
    state_to_resume,
)
from knet_train.config import Config, ModelConfig
from knet_train.data.batches import StreetData
from knet_train.data.dataset import LabelledFolder, check_pairs, open_folder
from knet_train.distributed import (
    check_processes,
    check_single_images,
    device_count,
    environment_plugins,
    strategy,
)
from knet_train.initial import load_initial, load_pretrained
from knet_train.loss import class_weights
from knet_train.models.build import build_model
from knet_train.models.knet import KNet
from knet_train.module import KNetModule, recompute_backbone
from knet_train.optim import check_layers, freeze_layers

_M_TRIM_THRESHOLD = -1  # from <malloc.h>
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Let glibc reuse large blocks instead of returning them to the kernel; True where it could.

    By default glibc maps every large tensor afresh and unmaps it when it is freed. The kernel then
    clears all its pages again at every step, which took half of a training step's time. The price
    is that the process keeps its peak of memory until it ends. Does nothing without glibc.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    # 2³¹ - 1 is the largest int; glibc compares the free top of the heap, 2 GiB, against it.
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


# Each is the start of a message (a regular expression), and the reason why it is no news here.
_IGNORED_WARNINGS = (
    r".*treespec, LeafSpec",  # Lightning's own use of a deprecated torch function
    r".*does not have many workers",  # trainer.workers is the user's choice
    r".*number of training batches .* is smaller than the logging interval",  # short runs
    r".*resuming from a checkpoint that ended before the epoch ended",  # ours go on at the step
    r".*callbacks used to create the checkpoint need to be provided",  # progress bars come and go
    r".*callback states in the checkpoint",
    r".*module\(s\) in eval mode at the start of training",  # frozen norms are
    r".*use of fork\(\) may lead to deadlocks",  # torch's own way of starting workers
)


@contextmanager
def ignore_lightning_advice() -> Iterator[None]:
    """Inside the block Lightning neither logs what it found ("GPU available: …", tips) nor warns
    about the things above; every other warning is shown as before."""
    logs = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [log.level for log in logs]
    try:
        for log in logs:
            log.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            for message in _IGNORED_WARNINGS:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """Where a run left its weights, and the best score that it saw (mIoU, 0 … 1)."""

    best: Path
    last: Path
    best_miou: float
    rank: int  # of this process among those of the run; 0 is the one that wrote


def train(
    config: Config,
    data: Path,
    run: Path,
    *,
    backbone_weights: Path | None = None,
    init: Path | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    build: Callable[[ModelConfig, int], KNet] = build_model,
) -> RunResult:
    """Train on ``data`` into ``run``: ``config.json``, ``best.safetensors`` (highest mIoU on the
    validation split), ``last.safetensors`` (the end), ``resume.ckpt``, and CSV and TensorBoard
    logs. ``init`` starts from one of our checkpoints instead of ImageNet's weights. ``resume``
    goes on from ``resume.ckpt``, or starts where there is none yet.

    Ctrl-C (or SIGTERM) ends the step, saves ``resume.ckpt`` and raises KeyboardInterrupt. Progress
    bars and the like come as ``callbacks``. In a run of many processes each calls this function;
    the first one writes. ``build`` makes the network, of a configuration and a number of classes;
    weights of another than ours are read with ``read_checkpoint`` and the same ``build``.

    Raises ConfigError, DataError, CheckpointError or OutputError before any work is done;
    OutputError, DataError, SourceError or TrainingError when the run can not go on.
    """
    if init is not None and backbone_weights is not None:
        raise ConfigError("--init brings the backbone's weights too: leave out --backbone-weights")
    train_folder = open_folder(data, config.data.train_split)
    val_folder = open_folder(data, config.data.val_split)
    _check_classes(config, train_folder)
    check_processes(config, len(val_folder))
    state = state_to_resume(run, config, resume)
    check_pairs(train_folder)
    check_pairs(val_folder)

    pl.seed_everything(config.trainer.seed, verbose=False)
    model = build(config.model, train_folder.labels.num_classes)
    check_layers(model, config.optim)
    freeze_layers(model, config.optim)
    check_single_images(model, config)
    if config.trainer.gradient_checkpointing:
        recompute_backbone(model.backbone, config.model.backbone)
    if state is None and init is not None:
        load_initial(model, init)
    elif state is None:
        load_pretrained(model.backbone, config.model, backbone_weights)
    best, keep = KeepBest(run), KeepState(run / STATE)
    with _global_settings(), ignore_lightning_advice():
        trainer = _trainer(config, run, [best, *_averaging(config), *callbacks, keep])
        if trainer.is_global_zero:
            if resume and state is None:
                log.warning("%s has no %s yet: starting at step 0", run, STATE)
            prepare(run, config)
        module = KNetModule(
            _for_devices(model, config, trainer),
            config,
            train_folder,
            _class_weights(config, train_folder),
        )
        module.train()
        pictures = StreetData(train_folder, val_folder, config)
        with closing(pictures), keep.interruptible(), _plain_errors(trainer):
            trainer.fit(module, datamodule=pictures, ckpt_path=state)
            if config.optim.steps % config.trainer.val_every:  # else the last step was evaluated
                trainer.validate(module, datamodule=pictures, verbose=False)
    return RunResult(
        run / "best.safetensors", run / "last.safetensors", best.best, trainer.global_rank
    )


def _trainer(config: Config, run: Path, callbacks: list[Callback]) -> pl.Trainer:
    optim, settings = config.optim, config.trainer
    return pl.Trainer(
        default_root_dir=run,
        max_steps=optim.steps,
        max_epochs=-1,
        accelerator="auto",
        devices=device_count(settings),
        num_nodes=settings.nodes,
        strategy=strategy(settings),
        plugins=[WholeStates(), *environment_plugins()],
        use_distributed_sampler=False,  # ours shares the samples out itself
        deterministic=settings.deterministic,
        precision=_precision(config),
        gradient_clip_val=optim.clip_norm,
        accumulate_grad_batches=optim.accumulate,
        val_check_interval=settings.val_every * optim.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        logger=_loggers(run),
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=any("ProgressBar" in type(c).__name__ for c in callbacks),
        enable_model_summary=False,
    )


def _for_devices(model: KNet, config: Config, trainer: pl.Trainer) -> KNet:
    model = model.to(memory_format=torch.channels_last)
    if config.trainer.sync_batchnorm and trainer.world_size > 1:
        # timm's conversion, as torch's would lose the activations that timm's norms carry.
        model = convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    if trainer.strategy.root_device.type == "cpu":
        keep_freed_memory()
    return model


def _averaging(config: Config) -> list[Callback]:
    """The exponential average of all weights and statistics; none for a decay of 0."""
    decay = config.optim.ema_decay

    def blend(average: Tensor, current: Tensor, _count: Tensor | int) -> Tensor:
        # Not d·e + (1 - d)·w, as Lightning has it, whose rounding moves even frozen weights.
        return average.lerp(current, 1 - decay) if average.is_floating_point() else current

    return [WeightAveraging(avg_fn=blend)] if decay > 0 else []


@contextmanager
def _global_settings() -> Iterator[None]:
    """Inside the block ``trainer.deterministic`` may change torch for the whole process."""
    before = torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = benchmark


@contextmanager
def _plain_errors(trainer: pl.Trainer) -> Iterator[None]:
    """Errors out of other processes become ours; whatever ends this process ends those that it
    has started, instead of letting them wait for it."""
    try:
        yield
    except BaseException as error:
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGKILL)
        text = str(error)
        if isinstance(error, KnetError) and text.startswith("Caught "):  # by a DataLoader worker
            raise type(error)(text.strip().splitlines()[-1].partition(": ")[2]) from error
        # Torch notices it in a signal handler, in the middle of anything, a save included: what
        # is interrupted may raise an error of its own.
        if not isinstance(error, KnetError) and any(
            str(cause).startswith("DataLoader worker") for cause in causes(error)
        ):
            raise TrainingError(
                "a process that reads pictures was killed, as happens when memory runs out: "
                "lower trainer.workers or data.crop (or give a container more shared memory), "
                "then go on with --resume"
            ) from error
        if isinstance(error, RuntimeError) and trainer.world_size > 1 and _lost_contact(text):
            raise TrainingError(
                "another process of this run has ended: its own message says why; "
                "go on with --resume"
            ) from error
        raise


def _lost_contact(text: str) -> bool:
    """Whether a RuntimeError is what gloo or nccl says when another process is gone."""
    return any(word in text for word in ("gloo", "NCCL", "onnection closed", "onnection reset"))


def _check_classes(config: Config, folder: LabelledFolder) -> None:
    names = folder.labels.names
    if config.data.synthetic_share > 0 and names != CAMVID11.names:
        raise ConfigError(
            "synthetic streets have CamVid's eleven classes and this data has others: "
            "pass --set data.synthetic_share=0"
        )


def _loggers(run: Path) -> list[Logger]:
    """CSV and TensorBoard, together in ``run/logs/version_N``; a resumed run starts a new N."""
    table = CSVLogger(run, "logs")
    return [table, TensorBoardLogger(run, "logs", version=table.version)]


def _class_weights(config: Config, folder: LabelledFolder) -> NDArray[np.float32]:
    if config.loss.class_balance == 0:  # reading every label of a large split takes minutes
        return np.ones(folder.labels.num_classes, np.float32)
    return class_weights(count_pixels(folder), config.loss.class_balance)


def count_pixels(folder: LabelledFolder) -> NDArray[np.int64]:
    """Labelled pixels of each class over a split."""
    pixels = np.zeros(256, np.int64)
    for index in range(len(folder)):
        pixels += np.bincount(folder.read_label(index).ravel(), minlength=256)
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
