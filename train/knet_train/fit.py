"""One training run: a folder of labelled images in, a folder of checkpoints and logs out."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, WeightAveraging
from pytorch_lightning.loggers import Logger
from torch import Tensor

from knet_runtime.errors import ConfigError, DataError, KnetError, TrainingError
from knet_synthetic import CAMVID11
from knet_train.checkpoint import load_initial, load_pretrained
from knet_train.config import Config, ModelConfig
from knet_train.data.batches import AnyFolder, SegmentationData
from knet_train.data.census import doubts, names
from knet_train.data.dataset import LabelledFolder, check_pairs, open_folder
from knet_train.data.drives import divide
from knet_train.data.segment_folder import SegmentFolder
from knet_train.data.segments import open_segments
from knet_train.data.soft_labels import SoftLabels, open_soft_labels
from knet_train.devices import (
    check_processes,
    check_single_images,
    choose_precision,
    choose_strategy,
    device_count,
    environment_plugins,
    place_model,
)
from knet_train.finite import StopWhenNotFinite
from knet_train.history import History
from knet_train.loggers import USUAL, LoggerName, check_loggers, logged, make_loggers
from knet_train.loss import class_weights
from knet_train.models.build import build_model, build_segment_model
from knet_train.models.knet import KNet
from knet_train.models.segments import SegmentKNet
from knet_train.module import (
    KNetModule,
    TrainingModule,
    check_layers,
    freeze_layers,
    recompute_backbone,
)
from knet_train.run_folder import (
    BEST,
    LAST,
    PREVIOUS,
    STATE,
    AtomicCheckpointIO,
    SaveBest,
    SavedState,
    SaveResumeState,
    causes,
    prepare,
    state_to_resume,
)
from knet_train.run_report import ClassShares, RunReport
from knet_train.segment_module import InstanceModule, PanopticModule

_PROBES = 50  # images of objects that are read before a run starts
_log = logging.getLogger(__name__)

# What gloo or nccl says in a RuntimeError when another process is gone.
_LOST_CONTACT = ("gloo", "NCCL", "onnection closed", "onnection reset")
# Each is the start of a message (a regular expression), and the reason why it does not apply here.
_IGNORED_WARNINGS = (
    r".*treespec, LeafSpec",  # Lightning's own use of a deprecated torch function
    r".*does not have many workers",  # trainer.workers is the user's choice
    r".*number of training batches .* is smaller than the logging interval",  # short runs
    r".*resuming from a checkpoint that ended before the epoch ended",  # ours continue at the step
    r".*callbacks used to create the checkpoint need to be provided",  # progress bars come and go
    r".*callback states in the checkpoint",
    r".*module\(s\) in eval mode at the start of training",  # frozen norms are
    r".*use of fork\(\) may lead to deadlocks",  # torch's own way of starting workers
)


@dataclass(frozen=True)
class RunResult:
    """Where a run left its weights, and the best score that it saw (0 … 1) of ``metric``, mIoU, PQ
    or AP."""

    best: Path
    last: Path
    metric: str
    best_score: float
    scored_classes: int  # that this is the mean of, as no others were labelled or predicted
    classes: int
    rank: int  # of this process among those of the run; 0 is the one that wrote


class MemoryRanOut(ConfigError):
    """What is computed at once does not fit."""


@contextmanager
def _named_memory_errors() -> Iterator[None]:
    """Too little memory is the fault of a setting, whichever of many errors torch has for it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        ran_out = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not ran_out and "allocate memory" not in str(error):
            raise
        raise MemoryRanOut(
            "memory ran out: lower optim.batch_size (or raise optim.accumulate), data.crop, or the "
            "network's size (model.*)"
        ) from error


@_named_memory_errors()
def train(
    config: Config,
    data: Path,
    run: Path,
    *,
    backbone_weights: Path | None = None,
    init: Path | None = None,
    soft_labels: Sequence[Path] = (),
    unlabelled: Sequence[Path] = (),
    resume: bool = False,
    resume_command: str | None = None,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[LoggerName] = USUAL,
    build: Callable[[ModelConfig, int], KNet] = build_model,
) -> RunResult:
    """Train on ``data`` into ``run``: ``config.json``, ``best.safetensors`` (highest mIoU, PQ or AP
    on ``data.leave_out``'s drives, else on the validation split), ``last.safetensors`` (the end),
    ``resume.ckpt`` (and, until the end, the state before it), ``report.html``, and what ``loggers``
    write. ``init`` starts from one of our checkpoints instead of ImageNet's weights.
    ``soft_labels`` are folders of a teacher's probabilities (see ``knet_train.data.soft_labels``)
    of the training images, and of the images without labels in the folders ``unlabelled``.
    ``resume`` continues from ``resume.ckpt``, or where that is damaged from the state before it, or
    starts where there is none yet; ``resume_command`` is what a person types for that, as the
    report says.

    Ctrl-C, SIGTERM or SIGHUP ends the step, saves ``resume.ckpt`` and raises Stopped, a
    KeyboardInterrupt. Progress bars and the like come as ``callbacks``. In a run of many processes
    each calls this function; the first one writes. ``build`` makes the network, of a configuration
    and a number of classes; weights of another than ours are read with ``read_checkpoint`` and the
    same ``build``.

    Raises ModuleNotFoundError where a logger's library is missing, and ConfigError, DataError,
    CheckpointError or OutputError, before any work is done; MemoryRanOut, a ConfigError;
    OutputError, DataError, SourceError or TrainingError when the run cannot continue.
    """
    if init is not None and backbone_weights is not None:
        raise ConfigError("--init brings the backbone's weights too: leave out --backbone-weights")
    check_loggers(loggers)
    train_folder, val_folder = (
        _open(data, split, config) for split in (config.data.train_split, config.data.val_split)
    )
    left_out: AnyFolder | None = None
    if config.data.leave_out:
        train_folder, left_out = divide(train_folder, config.data.leave_out)
    config, notices = _fit_to_classes(config, train_folder)
    check_processes(config, len(val_folder), None if left_out is None else len(left_out))
    soft = None
    if soft_labels or unlabelled:
        soft = _soft_labels(config, train_folder, val_folder, soft_labels, unlabelled)
        notices += soft.notices
    state = state_to_resume(run, config, resume)
    _check_same_classes(run, state, train_folder)
    counts = soft.counts if soft else (0, 0)
    if state is not None and state.soft_labels != counts:
        raise DataError(
            f"{run} was started with soft labels of {state.soft_labels[0]} training images and of "
            f"{state.soft_labels[1]} images without labels, not of {counts[0]} and {counts[1]}: "
            "resume with the same --soft-labels and --unlabelled"
        )
    census = None
    if isinstance(train_folder, LabelledFolder) and isinstance(val_folder, LabelledFolder):
        # Class weights count all labels; to read all of a large split takes minutes for nothing.
        census = check_pairs(train_folder, every_label=config.loss.class_balance != 0)
        looked = {train_folder.split: census, val_folder.split: check_pairs(val_folder)}
        if isinstance(left_out, LabelledFolder):
            looked["data.leave_out"] = check_pairs(left_out)
        notices += doubts(train_folder.layout, looked)

    pl.seed_everything(config.trainer.seed, verbose=False)
    model: KNet | SegmentKNet
    if isinstance(train_folder, SegmentFolder):
        shares = _check_segments(config, train_folder, val_folder)
        notices += filter(None, [train_folder.summary()])
        model = build_segment_model(config.model, train_folder.labels)
    else:
        assert census is not None
        pixels = census.by_class(train_folder.layout)
        shares = ClassShares(pixels, census.files, census.total)
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
    best, history, states = SaveBest(run), History(), SaveResumeState(run)
    with _process_settings():
        stop = StopWhenNotFinite(run)
        report = RunReport(run, data, history, shares, resume_command)
        looking = [history, report, *callbacks, stop, states]
        logs = make_loggers(loggers, run)
        trainer = _trainer(config, run, [best, *_averaging(config), *looking], logs)
        if trainer.is_global_zero:
            if resume and state is None:
                _log.warning("%s has no %s yet: starting at step 0", run, STATE)
            if state is not None and state.instead_of is not None:
                text = "%s: continuing from %s, of step %d, instead"
                _log.warning(text, state.instead_of, state.path, state.step)
            for notice in notices:
                _log.warning("%s", notice)
            prepare(run, config, state)
        module: TrainingModule
        model = place_model(model, config.trainer, trainer)
        if isinstance(model, KNet):
            assert isinstance(train_folder, LabelledFolder)
            weights = class_weights(shares.pixels, config.loss.class_balance)
            module = KNetModule(model, config, train_folder, weights)
        else:
            assert isinstance(train_folder, SegmentFolder)
            kind = PanopticModule if config.model.task == "panoptic" else InstanceModule
            module = kind(model, config, train_folder)
        module.train()
        module.soft_labels = counts
        if state is not None:
            module.saved_step = state.step
        images = SegmentationData(train_folder, val_folder, config, left_out, soft)
        logging_it = logged(logs, config, run)
        with closing(images), states.interruptible(), _plain_errors(trainer), logging_it:
            trainer.fit(module, datamodule=images, ckpt_path=None if state is None else state.path)
            if config.optim.steps % config.trainer.val_every:  # else the last step was evaluated
                trainer.validate(module, datamodule=images, verbose=False)
        if trainer.is_global_zero:
            (run / PREVIOUS).unlink(missing_ok=True)
    return RunResult(
        run / BEST,
        run / LAST,
        module.metric,
        best.best,
        best.scored,
        train_folder.labels.num_classes,
        trainer.global_rank,
    )


def _open(data: Path, split: str, config: Config) -> AnyFolder:
    task = config.model.task
    return open_folder(data, split) if task == "semantic" else open_segments(data, split, task)


def _soft_labels(
    config: Config, train: AnyFolder, val: AnyFolder, roots: Sequence[Path], images: Sequence[Path]
) -> SoftLabels:
    """The soft labels of a run, which are of the classes and of readable files by their headers."""
    if not isinstance(train, LabelledFolder):
        raise ConfigError(
            "--soft-labels is for semantic networks, and this is for "
            f"{config.model.task} segmentation: leave it out"
        )
    if not roots:
        raise ConfigError(
            "--unlabelled names images to learn from by their soft labels alone: pass "
            "--soft-labels too"
        )
    found = open_soft_labels(train, roots, images, config.data.leave_out)
    scored = {sample.image.stem for sample in val.samples}
    if both := [one.image.stem for one in found.unlabelled if one.image.stem in scored]:
        notice = (
            f"{len(both)} images of --unlabelled have the names of images of split {val.split} "
            f"({names(both)}): a score on images that were learnt says nothing"
        )
        return replace(found, notices=(*found.notices, notice))
    return found


def _check_segments(config: Config, train: SegmentFolder, val: AnyFolder) -> ClassShares:
    """Refuse two splits of other classes, settings that these losses have not, and, of some images
    that are spread over each split, what cannot be read. What those of ``train`` hold."""
    loss = config.loss
    if loss.class_balance or loss.auxiliary_weight or set(loss.stage_weights) != {1.0}:
        raise ConfigError(
            f"task {config.model.task} has the published losses: loss.class_balance and "
            "loss.auxiliary_weight are 0, and loss.stage_weights 1"
        )
    assert isinstance(val, SegmentFolder)
    if val.labels != train.labels:
        raise DataError(
            f"{val.file} has other categories than {train.file.name}: give both the same, or name "
            "the classes in labels.json"
        )
    pixels = np.zeros(train.labels.num_classes, np.int64)
    for folder in (train, val):
        order = np.random.default_rng(0).permutation(len(folder))[:_PROBES].tolist()
        with ThreadPoolExecutor() as pool:
            for _, truth in pool.map(folder.read, order):
                if folder is train:
                    areas = np.bincount(truth.ids.ravel(), minlength=len(truth.classes) + 1)
                    np.add.at(pixels, list(truth.classes), areas[1:])
    return ClassShares(pixels, min(_PROBES, len(train)), len(train))


def _check_same_classes(run: Path, state: SavedState | None, folder: AnyFolder) -> None:
    if state is not None and state.class_names != folder.labels.names:
        raise DataError(
            f"{run} was started with the classes {', '.join(state.class_names)}, and "
            f"{folder.root} has {', '.join(folder.labels.names)}: resume with the same, or start "
            "a new run"
        )


def _fit_to_classes(config: Config, folder: AnyFolder) -> tuple[Config, list[str]]:
    """The configuration without synthetic streets where they have other classes than the data,
    and what is to be said of that."""
    if isinstance(folder, SegmentFolder):
        fits = set(folder.labels.names) <= set(CAMVID11.names)
    else:
        fits = folder.labels.names == CAMVID11.names
    if config.data.synthetic_share == 0 or fits:
        return config, []
    data = msgspec.structs.replace(config.data, synthetic_share=0.0)
    notice = "without synthetic streets: they have CamVid's eleven classes, and this data others"
    return msgspec.structs.replace(config, data=data), [notice]


def _trainer(
    config: Config, run: Path, callbacks: list[Callback], loggers: list[Logger]
) -> pl.Trainer:
    optim, settings = config.optim, config.trainer
    return pl.Trainer(
        default_root_dir=run,
        max_steps=optim.steps,
        max_epochs=-1,
        accelerator="auto",
        devices=device_count(settings),
        num_nodes=settings.nodes,
        strategy=choose_strategy(settings),
        plugins=[AtomicCheckpointIO(), *environment_plugins()],
        use_distributed_sampler=False,  # ours shares the samples out itself
        deterministic=settings.deterministic,
        precision=choose_precision(settings),
        gradient_clip_val=optim.clip_norm,
        accumulate_grad_batches=optim.accumulate,
        val_check_interval=settings.val_every * optim.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        logger=loggers,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _averaging(config: Config) -> list[Callback]:
    """The exponential average of all weights and statistics; none for a decay of 0."""
    decay = config.optim.ema_decay

    def blend(average: Tensor, current: Tensor, _count: Tensor | int) -> Tensor:
        # Not d·e + (1 - d)·w, as Lightning has it, whose rounding moves even frozen weights.
        return average.lerp(current, 1 - decay) if average.is_floating_point() else current

    return [WeightAveraging(avg_fn=blend)] if decay > 0 else []


@contextmanager
def _process_settings() -> Iterator[None]:
    """Inside the block Lightning neither logs what it found ("GPU available: …", tips) nor warns
    about the things above, every other warning is shown as before, and ``trainer.deterministic``
    may change torch. After it the whole process is as before."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    deterministic = torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            for message in _IGNORED_WARNINGS:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        torch.use_deterministic_algorithms(deterministic)
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
                "a process that reads images was killed, as happens when memory runs out: "
                "lower trainer.workers or data.crop (or give a container more shared memory), "
                "then continue with --resume"
            ) from error
        lost = any(words in text for words in _LOST_CONTACT)
        if isinstance(error, RuntimeError) and trainer.world_size > 1 and lost:
            raise TrainingError(
                "another process of this run has ended: its own message says why; "
                "continue with --resume"
            ) from error
        raise
