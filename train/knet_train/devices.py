"""How a run uses its machines: processes and devices, precision, and the memory of a CPU.

A run is one process, or one per device on one machine or many. torchrun and SLURM start them; with
more than one device on a single machine and neither of the two, Lightning starts the others itself,
by the command line that this process was started with.
"""

from __future__ import annotations

import ctypes
import platform
from datetime import timedelta
from typing import Any, Literal, TypeVar

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy, Strategy
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from knet_runtime.errors import ConfigError
from knet_train.config import Config, TrainerConfig
from knet_train.models.knet import KNet
from knet_train.models.segments import SegmentKNet

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]

# A process that hangs, and does not die, ends the run after this long.
_PATIENCE = timedelta(minutes=10)
Model = TypeVar("Model", bound=nn.Module)
_POOLING_HEADS = ("psp", "aspp", "uper")
_M_TRIM_THRESHOLD = -1  # from <malloc.h>
_M_MMAP_MAX = -4


def device_count(settings: TrainerConfig) -> int:
    """Processes on each machine: ``settings.devices``, or all GPUs, or one on a CPU."""
    return settings.devices or max(1, torch.cuda.device_count())


def process_count(settings: TrainerConfig) -> int:
    """Processes of the whole run."""
    return device_count(settings) * settings.nodes


def check_processes(config: Config, images: int, left_out: int | None = None) -> None:
    """Refuse, with ConfigError, what the processes of this run cannot share out.

    ``images`` is the number of validation images, ``left_out`` that of the drives left out.
    """
    settings, optim = config.trainer, config.optim
    devices, ranks = device_count(settings), process_count(settings)
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
    if images < ranks:
        raise ConfigError(
            f"split {config.data.val_split} has {images} images for {ranks} processes: "
            "lower trainer.devices, or pass a larger data.val_split"
        )
    if left_out is not None and left_out < ranks:
        raise ConfigError(
            f"data.leave_out has {left_out} images for {ranks} processes: lower trainer.devices, "
            "or name more drives"
        )
    launched = any(kind.detect() for kind in (TorchElasticEnvironment, SLURMEnvironment))
    if settings.nodes > 1 and not launched:  # Lightning would wait for the others for ever
        raise ConfigError(
            f"trainer.nodes is {settings.nodes}, but neither torchrun nor SLURM has started this "
            "process: start it with one of them on every machine"
        )
    if settings.sync_batchnorm and ranks > 1 and not torch.cuda.is_available():
        raise ConfigError(
            "torch synchronises BatchNorm between GPUs only: on CPUs pass "
            "--set trainer.sync_batchnorm=false"
        )


def check_single_images(model: KNet | SegmentKNet, config: Config) -> None:
    """Refuse, with ConfigError, BatchNorm over the single value that one pooled image gives."""
    settings, optim = config.trainer, config.optim
    ranks = process_count(settings)
    several = optim.batch_size > ranks * optim.accumulate or (settings.sync_batchnorm and ranks > 1)
    if several or config.model.head not in _POOLING_HEADS:
        return
    if any(isinstance(module, _BatchNorm) and module.training for module in model.head.modules()):
        raise ConfigError(
            f"head {config.model.head} pools an image to one value per channel, and BatchNorm "
            "needs two of them: let optim.batch_size be at least 2 × trainer.devices × "
            "trainer.nodes × optim.accumulate, or pass --set trainer.sync_batchnorm=true on GPUs"
        )


def choose_strategy(settings: TrainerConfig) -> Strategy | str:
    """How the processes meet: not at all, or as DDP (nccl between GPUs, gloo between CPUs)."""
    if process_count(settings) == 1:
        return "auto"
    return DDPStrategy(timeout=_PATIENCE, gradient_as_bucket_view=True)


def environment_plugins() -> list[Any]:
    """SLURM without Lightning's own requeueing: the job script requeues, and passes --resume."""
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


def choose_precision(settings: TrainerConfig) -> Precision:
    """What ``precision = "auto"`` means here: bf16 where the device computes in it, else fp32."""
    if settings.precision != "auto":
        return settings.precision
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    return "bf16-mixed" if _cpu_has_bf16() else "32-true"


def _cpu_has_bf16() -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def place_model(model: Model, settings: TrainerConfig, trainer: pl.Trainer) -> Model:
    """The model in the memory layout, and with the norms, that its devices train fastest with."""
    model = model.to(memory_format=torch.channels_last)
    if settings.sync_batchnorm and trainer.world_size > 1:
        # timm's conversion, as torch's would lose the activations that timm's norms carry.
        model = convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    if trainer.strategy.root_device.type == "cpu":
        keep_freed_memory()
    return model


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
