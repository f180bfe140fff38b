"""Training for Lightning: the step as a module, and the samples in their order."""

from __future__ import annotations

import signal
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from knet_runtime.metrics import ConfusionMatrix
from knet_train.augment import TrainingSamples
from knet_train.config import Config
from knet_train.dataset import LabelledFolder
from knet_train.evaluate import predict
from knet_train.knet import KNet
from knet_train.loss import stage_losses
from knet_train.optim import build_optimizer, lr_factor

Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]


class KNetModule(pl.LightningModule):
    """K-Net with its losses, its optimizer, and mIoU by the runtime's own metrics."""

    weights: Tensor

    def __init__(
        self, model: KNet, config: Config, folder: LabelledFolder, weights: NDArray[np.float32]
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.label_map = folder.labels
        self.register_buffer("weights", torch.from_numpy(weights), persistent=False)
        self.confusion = ConfusionMatrix(self.label_map.num_classes, self.label_map.ignore_index)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout too is a function of (seed, step), so that a resumed run repeats no other one.
        torch.manual_seed(self.config.trainer.seed * 1_000_003 + self.global_step)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch
        logits = self.model(images.contiguous(memory_format=torch.channels_last))
        loss = stage_losses(
            logits, labels, self.config.loss, self.weights, self.label_map.ignore_index
        )
        self.log("loss", loss, prog_bar=True, on_step=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        self.confusion = ConfusionMatrix(self.label_map.num_classes, self.label_map.ignore_index)

    def validation_step(self, batch: Pair, _: int) -> None:
        image, label = batch
        self.confusion.update(predict(self.model, image, self.config), label)

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.model, self.config.optim)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(step, self.config.optim)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Pictures(Dataset[Pair]):
    """The pictures of a split as they are, for evaluation."""

    def __init__(self, folder: LabelledFolder) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> Pair:
        return self.folder.read(index)


class _From(Sampler[int]):
    """Indices from ``start`` on; its length is that of the whole run, which Lightning counts."""

    def __init__(self, start: int, length: int) -> None:
        self.start = start
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Any:
        return iter(range(self.start, self.length))


class StreetData(pl.LightningDataModule):
    """Training samples from the step that the run has reached, and the pictures that score it."""

    def __init__(self, train: LabelledFolder, val: LabelledFolder, config: Config) -> None:
        super().__init__()
        self.train, self.val, self.config = train, val, config

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        optim, trainer = self.config.optim, self.config.trainer
        length = optim.steps * optim.batch_size
        done = self.trainer.global_step if self.trainer else 0
        return DataLoader(
            TrainingSamples(self.train, self.config.data, trainer.seed, length),
            optim.batch_size,
            sampler=_From(done * optim.batch_size, length),
            num_workers=trainer.workers,
            persistent_workers=trainer.workers > 0,
            worker_init_fn=_leave_interrupts_to_parent,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader[Pair]:
        return DataLoader(Pictures(self.val), batch_size=None, collate_fn=_as_it_is)


def _as_it_is(pair: Any) -> Any:
    return pair


def _leave_interrupts_to_parent(_worker: int) -> None:
    """A terminal sends Ctrl-C to workers too; the run still needs them to end its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
