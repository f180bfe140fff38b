"""The processes of a run: one, or one per device on one machine or many.

torchrun and SLURM start them; with more than one device on a single machine and neither of the
two, Lightning starts the others itself, by the command line that this process was started with.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy, Strategy
from torch.nn.modules.batchnorm import _BatchNorm

from knet_runtime.errors import ConfigError
from knet_train.config import Config, TrainerConfig
from knet_train.models.knet import KNet

# A process that hangs, and does not die, ends the run after this long.
_PATIENCE = timedelta(minutes=10)
_POOLING_HEADS = ("psp", "aspp", "uper")


def device_count(settings: TrainerConfig) -> int:
    """Processes on each machine: ``settings.devices``, or all GPUs, or one on a CPU."""
    return settings.devices or max(1, torch.cuda.device_count())


def check_processes(config: Config, pictures: int) -> None:
    """Refuse, with ConfigError, what the processes of this run can not share out.

    ``pictures`` is the number of validation pictures.
    """
    settings, optim = config.trainer, config.optim
    devices = device_count(settings)
    ranks = devices * settings.nodes
    if torch.cuda.is_available() and devices > torch.cuda.device_count():
        raise ConfigError(
            f"trainer.devices is {devices}, but this machine shows {torch.cuda.device_count()} GPUs"
        )
    for environment in (TorchElasticEnvironment, SLURMEnvironment):
        if environment.detect() and (started := environment().world_size()) != ranks:
            raise ConfigError(
                f"{started} processes were started, but trainer.devices × trainer.nodes is "
                f"{devices} × {settings.nodes}: pass --set trainer.devices=(processes on each "
                "machine) --set trainer.nodes=(machines)"
            )
    if optim.batch_size % (ranks * optim.accumulate):
        raise ConfigError(
            f"optim.batch_size {optim.batch_size} must be a multiple of trainer.devices × "
            f"trainer.nodes × optim.accumulate = {devices} × {settings.nodes} × {optim.accumulate}"
        )
    if pictures < ranks:
        raise ConfigError(
            f"split {config.data.val_split} has {pictures} pictures for {ranks} processes: "
            "lower trainer.devices, or pass a larger data.val_split"
        )
    if settings.sync_batchnorm and ranks > 1 and not torch.cuda.is_available():
        raise ConfigError(
            "torch synchronises BatchNorm between GPUs only: on CPUs pass "
            "--set trainer.sync_batchnorm=false"
        )


def check_single_images(model: KNet, config: Config) -> None:
    """Refuse, with ConfigError, BatchNorm over the single value that one pooled image gives."""
    settings, optim = config.trainer, config.optim
    ranks = device_count(settings) * settings.nodes
    if optim.batch_size > ranks * optim.accumulate or config.model.head not in _POOLING_HEADS:
        return
    if settings.sync_batchnorm and ranks > 1:
        return
    if any(isinstance(module, _BatchNorm) and module.training for module in model.head.modules()):
        raise ConfigError(
            f"head {config.model.head} pools an image to one value per channel, and BatchNorm "
            "needs two of them: let optim.batch_size be at least 2 × trainer.devices × "
            "trainer.nodes × optim.accumulate, or pass --set trainer.sync_batchnorm=true on GPUs"
        )


def strategy(settings: TrainerConfig) -> Strategy | str:
    """How the processes meet: not at all, or as DDP (nccl between GPUs, gloo between CPUs)."""
    if device_count(settings) * settings.nodes == 1:
        return "auto"
    return DDPStrategy(timeout=_PATIENCE, gradient_as_bucket_view=True)


def environment_plugins() -> list[Any]:
    """SLURM without Lightning's own requeueing: the job script requeues, and passes --resume."""
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
