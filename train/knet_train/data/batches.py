"""Which process computes which samples at which step, and the images that score the run.

Step s of a run uses the samples s·B … (s + 1)·B - 1, whatever the number of processes: process r of
R takes the r-th slice of them, and computes it in ``optim.accumulate`` parts. So a run on many
devices sees the same batches as on one.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from knet_train.config import Config
from knet_train.data.augment import TrainingSamples
from knet_train.data.dataset import LabelledFolder

Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]


class Part(NamedTuple):
    """What one process computes at a time: 1 / ``optim.accumulate`` of its share of a step."""

    images: Tensor  # uint8 [b, H, W, 3]
    labels: Tensor  # uint8 [b, H, W]
    share_labels: Tensor  # labels of the process's whole share of the step: the loss is their mean
    part: int  # 0 … accumulate - 1


class StepIndices(Sampler[int]):
    """Sample indices of one process, from step ``start`` on.

    Its length is that of the whole run, which Lightning counts.
    """

    def __init__(self, start: int, steps: int, batch_size: int, rank: int, ranks: int) -> None:
        self.start, self.steps, self.batch_size = start, steps, batch_size
        self.share = batch_size // ranks
        self.offset = rank * self.share

    def __len__(self) -> int:
        return self.steps * self.share

    def __iter__(self) -> Iterator[int]:
        for step in range(self.start, self.steps):
            first = step * self.batch_size + self.offset
            yield from range(first, first + self.share)


class Parts:
    """A loader's batches, each cut into ``count`` equal parts."""

    def __init__(self, loader: DataLoader[tuple[Tensor, Tensor]], count: int) -> None:
        self.loader, self.count = loader, count

    def __len__(self) -> int:
        return len(self.loader) * self.count

    def __iter__(self) -> Iterator[Part]:
        for images, labels in self.loader:
            chunks = zip(images.chunk(self.count), labels.chunk(self.count), strict=True)
            for part, (image, label) in enumerate(chunks):
                yield Part(image, label, labels, part)

    def close(self) -> None:
        """End the processes that read images. They leave a first SIGTERM to this process, so at
        its exit, when Python sends them one, it would wait for them for ever."""
        reading: Any = self.loader._iterator
        if reading is None:
            return
        try:
            reading._shutdown_workers()
        finally:
            for worker in reading._workers:
                worker.kill()


class SegmentationData(pl.LightningDataModule):
    """Training samples from the step that the run has reached, and the images that score it."""

    def __init__(self, train: LabelledFolder, val: LabelledFolder, config: Config) -> None:
        super().__init__()
        self.train, self.val, self.config = train, val, config
        self.parts: Parts | None = None

    def train_dataloader(self) -> Parts:
        optim, settings = self.config.optim, self.config.trainer
        assert self.trainer is not None
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        length = optim.steps * optim.batch_size
        loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
            TrainingSamples(self.train, self.config.data, settings.seed, length),
            optim.batch_size // ranks,
            sampler=StepIndices(
                self.trainer.global_step, optim.steps, optim.batch_size, rank, ranks
            ),
            num_workers=settings.workers,
            persistent_workers=settings.workers > 0,
            worker_init_fn=_leave_signals_to_parent,
            pin_memory=torch.cuda.is_available(),
        )
        self.parts = Parts(loader, optim.accumulate)
        return self.parts

    def close(self) -> None:
        """End what reads images in the background. To be called however the run has ended."""
        if self.parts is not None:
            self.parts.close()

    def val_dataloader(self) -> DataLoader[int]:
        """The images of this process as they are, a ``Pair`` each."""
        assert self.trainer is not None
        own: Any = range(self.trainer.global_rank, len(self.val), self.trainer.world_size)
        read: Any = self.val.read  # without a batch, collate_fn gets what `own` holds: an index
        return DataLoader(own, batch_size=None, collate_fn=read)


def _leave_signals_to_parent(_worker: int) -> None:
    """A terminal sends Ctrl-C to workers too, and a cluster SIGTERM; the run still needs them to
    end its step, and ends them itself."""

    def heed_the_next(_signal: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, heed_the_next)
