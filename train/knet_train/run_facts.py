"""What a run computes on and with, in words."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
import torch

from knet_runtime.engines.hardware import processor_name
from knet_train.data.soft_labels import SoftLabels
from knet_train.module import TrainingModule

_GIB = 2**30


def run_facts(trainer: pl.Trainer, module: TrainingModule) -> dict[str, str]:
    """Device, precision, images, classes, parameters and memory of a run that starts."""
    device, data = trainer.strategy.root_device, module.config.data
    if device.type == "cuda":
        named = torch.cuda.get_device_name(device)
        free, total = torch.cuda.mem_get_info(device)
        memory = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
    else:
        threads = torch.get_num_threads()
        named = f"{processor_name()}, {threads} thread{'s' * (threads > 1)}"
        memory = _free_memory()
    if trainer.world_size > 1:
        named = f"{trainer.world_size} × {named}"
    images = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it in fit
    counts = (
        f"{len(images.train)} to learn from ({data.train_split}), "
        f"{len(images.val)} to score ({data.val_split})"
    )
    if images.left_out is not None:
        counts += f", {len(images.left_out)} left out and scored ({', '.join(data.leave_out)})"
    sizes = [(one.numel(), one.requires_grad) for one in module.parameters()]
    whole, learnt = sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns)
    parameters = f"{whole / 1e6:.2f} M"
    if learnt < whole:
        parameters += f", of which {learnt / 1e6:.2f} M learn"
    return {
        "device": named,
        "precision": str(trainer.precision),
        "images": counts,
        **_soft_labels(images.soft),
        "classes": str(module.label_map.num_classes),
        "parameters": parameters,
        "memory": memory,
    }


def _soft_labels(soft: SoftLabels | None) -> dict[str, str]:
    if soft is None:
        return {}
    labelled, unlabelled = soft.counts
    return {"soft labels": f"of {labelled} of them, and of {unlabelled} images without labels"}


def _free_memory() -> str:
    """What Linux has left for programs, of how much; elsewhere nothing is known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return "unknown"
    kib = {name: int(rest.split()[0]) for name, _, rest in (one.partition(":") for one in lines)}
    return f"{kib['MemAvailable'] / 2**20:.1f} of {kib['MemTotal'] / 2**20:.1f} GiB free"
