"""Where the numbers and images of a run go besides its report, by Lightning's own loggers.

CSV and TensorBoard write into ``RUN/logs/version_N``, a new N for a run that is resumed. MLflow
writes a database and its images there too, unless MLFLOW_TRACKING_URI names a server. Weights &
Biases follows its own settings (WANDB_MODE, WANDB_PROJECT), and keeps its files in ``RUN/wandb``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Literal

import msgspec
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.mlflow import MLFlowLogger

from knet_runtime.types import Rgb
from knet_train.config import Config

LoggerName = Literal["csv", "tensorboard", "wandb", "mlflow"]
USUAL: tuple[LoggerName, ...] = ("csv", "tensorboard")
_PROJECT = "knet-deploy"
_HOSTED = (WandbLogger, MLFlowLogger)  # which list runs by their settings


def check_loggers(names: Sequence[LoggerName]) -> None:
    """Raise ModuleNotFoundError where the library of one is missing."""
    for name in names:
        if name in ("wandb", "mlflow"):
            import_module(name)


def make_loggers(names: Sequence[LoggerName], run: Path) -> list[Logger]:
    """The loggers of a run in this folder; nothing is written yet."""
    made: list[Logger] = []
    version: int | str | None = None
    if "csv" in names:
        table = CSVLogger(run, "logs")
        made.append(table)
        version = table.version
    if "tensorboard" in names:
        made.append(TensorBoardLogger(run, "logs", version=version))
    if "wandb" in names:
        project = os.environ.get("WANDB_PROJECT", _PROJECT)
        made.append(WandbLogger(name=run.name, save_dir=run, project=project))
    if "mlflow" in names:
        server = os.environ.get("MLFLOW_TRACKING_URI")
        logs = run.absolute() / "logs"
        made.append(
            MLFlowLogger(
                _PROJECT,
                run_name=run.name,
                tracking_uri=server or f"sqlite:///{logs / 'mlflow.db'}",
                artifact_location=None if server else (logs / "mlflow").as_uri(),
            )
        )
    return made


@contextmanager
def logged(loggers: Sequence[Logger], config: Config, run: Path) -> Iterator[None]:
    """Inside the block a run is logged; its settings go to those that list runs by them."""
    hosted = [logger for logger in loggers if isinstance(logger, _HOSTED)]
    if any(isinstance(logger, MLFlowLogger) for logger in hosted):
        (run / "logs").mkdir(parents=True, exist_ok=True)  # MLflow makes no folders
    for logger in hosted:
        logger.log_hyperparams(msgspec.to_builtins(config))
    try:
        yield
    finally:
        for logger in hosted:
            if isinstance(logger, WandbLogger):
                logger.experiment.finish()


def show(logger: Logger, scores: Mapping[str, float], images: Mapping[str, Rgb], step: int) -> None:
    """Log the scores and images uint8 [H, W, 3] RGB of an evaluation. CSV, whose table has the
    columns of its first lines, takes none of them."""
    if isinstance(logger, CSVLogger):
        return
    logger.log_metrics(dict(scores), step)
    for name, image in images.items():
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, image, step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [image], step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_image(logger.run_id, image, f"{name}/{step:07}.png")
