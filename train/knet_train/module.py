"""The training step, as Lightning wants it, with AdamW's groups and the learning-rate schedule.

With gradient checkpointing (arXiv 1604.06174) the backbone is computed twice, and its activations
are not kept in between.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from fnmatch import fnmatchcase
from typing import Any, ClassVar, NamedTuple

import msgspec
import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from timm.models import FeatureHookNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from knet_runtime.errors import ConfigError
from knet_runtime.labels import LabelMap
from knet_runtime.metrics import ConfusionMatrix
from knet_runtime.segmentation import Segmentation
from knet_train.config import Config, OptimConfig
from knet_train.data.batches import Pair, Part, SegmentPart
from knet_train.data.dataset import LabelledFolder
from knet_train.inference import predict
from knet_train.loss import distillation_divisor, distillation_loss, loss_divisors, training_loss
from knet_train.models.knet import KNet

RUN_KEY = "knet-deploy run"  # what a saved state says of the run that it is of


SCORED = ("val", "left_out")  # what is scored, by the names that logs have: the split, the drives


class Scores(NamedTuple):
    """What the images of a split score in all processes, 0 … 1.

    ``logged`` is first the metric that chooses the best weights, then the classes that it is the
    mean of, by the names that logs have for them, behind one of ``SCORED``. ``classes`` float64 [N]
    is the same metric of each class, NaN where it counts in no mean. ``confusion`` int64 [N, N]
    (rows are labels) is there in semantic segmentation.
    """

    logged: dict[str, float]
    classes: NDArray[np.float64]
    confusion: NDArray[np.int64] | None = None


class TrainingModule(pl.LightningModule, ABC):
    """A network with its optimizer and schedule; the losses and the score are the task's."""

    metric: ClassVar[str]  # that a run keeps the best weights by, as people write it
    config: Config
    model: nn.Module

    def __init__(self, model: nn.Module, config: Config, labels: LabelMap) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.label_map = labels
        self.held = HeldStatistics()
        self.saved_step: int | None = None  # of the state that the run folder holds
        # At the end of the last evaluation: of the validation split, and of the drives left out,
        # if any. The last of them chooses the best weights.
        self.evaluated: list[Scores] = []
        self.soft_labels = (0, 0)  # ``SoftLabels.counts`` of the run

    @abstractmethod
    def scores(self) -> list[Scores]:
        """What each of the splits scores, in all processes, which must all ask for it."""

    def ends_step(self, batch: Part | SegmentPart) -> bool:
        """Whether a batch is the last part of its step."""
        return batch.part + 1 == self.config.optim.accumulate

    def train(self, mode: bool = True) -> TrainingModule:
        super().train(mode)
        hold_norms(self.model, self.config.optim)
        return self

    def on_train_batch_start(self, batch: Part | SegmentPart, batch_idx: int) -> None:
        # Dropout too is a function of the seed and of what is computed, so that a resumed run
        # repeats no other one, and no two processes draw the same.
        place = (self.config.trainer.seed, self.global_step, self.global_rank, batch.part)
        (state,) = np.random.SeedSequence(place).generate_state(1)
        torch.manual_seed(int(state))

    def on_before_backward(self, loss: Tensor) -> None:
        if self.config.trainer.gradient_checkpointing:
            self.held.hold(self.model)

    def on_after_backward(self) -> None:
        self.held.release()

    def sum_over_processes(self, counts: NDArray[Any]) -> NDArray[Any]:
        """Counts of each process -> of all."""
        own = torch.from_numpy(counts).to(self.device)
        summed = self.trainer.strategy.reduce(own, reduce_op="sum")
        assert isinstance(summed, Tensor)
        return np.asarray(summed.cpu().numpy())

    def log_loss(self, loss: Tensor, size: int) -> None:
        """Log the loss of a part of ``size`` images."""
        self.log("loss", loss.detach(), prog_bar=True, sync_dist=True, batch_size=size)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[RUN_KEY] = {
            "config": msgspec.json.encode(self.config).decode(),
            "class_names": list(self.label_map.names),
            "soft_labels": list(self.soft_labels),
        }

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.model, self.config.optim)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(step, self.config.optim)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class KNetModule(TrainingModule):
    """The semantic K-Net with its losses, and mIoU by the runtime's own metrics."""

    metric = "mIoU"
    model: KNet
    weights: Tensor
    confusions: list[ConfusionMatrix]

    def __init__(
        self, model: KNet, config: Config, folder: LabelledFolder, weights: NDArray[np.float32]
    ) -> None:
        super().__init__(model, config, folder.labels)
        self.register_buffer("weights", torch.from_numpy(weights), persistent=False)

    def training_step(self, batch: Part, _: int) -> Tensor:
        logits, auxiliary = self.model.training_logits(batch.images)
        settings, ignored = self.config.loss, self.label_map.ignore_index
        divisors = self._of_step(self._divisors(batch.share_labels, batch.share_soft))
        loss = training_loss(
            logits, auxiliary, batch.labels, settings, self.weights, ignored, divisors
        )
        if batch.soft is not None and settings.distill_weight:
            assert batch.share_soft is not None
            divisor = self._of_step(distillation_divisor(batch.share_soft, self.weights))
            distilled = distillation_loss(logits, batch.soft, settings, self.weights, divisor)
            self.log("distillation", distilled.detach(), sync_dist=True, batch_size=len(logits))
            loss = loss + settings.distill_weight * distilled
        self.log_loss(loss, len(batch.images))
        return loss

    def _divisors(self, labels: Tensor, soft: Tensor | None) -> Tensor:
        """``loss_divisors`` of this process's share of the step."""
        ignored = self.label_map.ignore_index
        if soft is not None:  # an image without labels is no image with ignored pixels
            labels = labels[(labels != ignored).flatten(1).any(1)]
        return loss_divisors(labels, self.config.loss, self.weights, ignored)

    def _of_step(self, own: Tensor) -> Tensor:
        """A divisor of the whole step, divided by its number of parts: as gradients are averaged
        over parts and processes, they are those of one process with the whole batch."""
        mean = self.trainer.strategy.reduce(own, reduce_op="mean")
        assert isinstance(mean, Tensor)
        return mean / self.config.optim.accumulate

    def on_validation_epoch_start(self) -> None:
        self.confusions = [self._confusion() for _ in self.trainer.num_val_batches]

    def validation_step(
        self, batch: Pair, _: int, dataloader_idx: int = 0
    ) -> dict[str, Segmentation]:
        image, label = batch
        found = Segmentation(predict(self.model, image, self.config), self.label_map)
        self.confusions[dataloader_idx].update(found.class_map, label)
        return {"found": found}

    def scores(self) -> list[Scores]:
        return [self._scores(own) for own in self.confusions]

    def _confusion(self) -> ConfusionMatrix:
        return ConfusionMatrix(self.label_map.num_classes, self.label_map.ignore_index)

    def _scores(self, own: ConfusionMatrix) -> Scores:
        total = self._confusion()
        total.matrix = self.sum_over_processes(own.matrix)
        logged = {
            "miou": total.miou,
            "classes": float(total.scored_classes),
            "pixel_accuracy": total.pixel_accuracy,
        }
        return Scores(logged, total.iou, total.matrix)


class HeldStatistics:
    """Keeps BatchNorms in training from updating their statistics during the backward pass: what
    is computed there for the second time must not count twice."""

    def __init__(self) -> None:
        self._held: list[tuple[_BatchNorm, float | None, Tensor]] = []

    def hold(self, model: nn.Module) -> None:
        """To be called before the backward pass."""
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.training:
                counted = module.num_batches_tracked
                if counted is not None:
                    self._held.append((module, module.momentum, counted))
        if self._held:
            nowhere = self._held[0][2].clone()
            for module, _, _ in self._held:
                module.momentum = 0.0
                module.num_batches_tracked = nowhere

    def release(self) -> None:
        """To be called after the backward pass."""
        for module, momentum, counted in self._held:
            module.momentum = momentum
            module.num_batches_tracked = counted
        self._held.clear()


def recompute_backbone(backbone: nn.Module, name: str) -> None:
    """Switch gradient checkpointing on; ConfigError when this kind of backbone has none."""
    enable = getattr(backbone, "set_grad_checkpointing", None)
    # timm never recomputes the first module of such a network, and this one has no other.
    whole = isinstance(backbone, FeatureHookNet) and len(backbone) == 1
    if enable is None or whole:
        raise ConfigError(
            f"model.backbone: {name} cannot be recomputed: pass "
            "--set trainer.gradient_checkpointing=false"
        )
    enable(True)


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that learn: each with the learning rate of the first rule of
    ``config.layers`` that matches its name, and with or without weight decay."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        scale = lr_scale(name, config)
        if scale == 0:
            continue
        plain = any(fnmatchcase(name, pattern) for pattern in config.no_decay)
        decayed = not plain and (config.decay_vectors or parameter.ndim > 1)
        groups.setdefault((scale, decayed), []).append(parameter)
    settings = []
    for (scale, decayed), parameters in groups.items():
        decay = config.weight_decay if decayed else 0.0
        settings.append({"params": parameters, "lr": config.lr * scale, "weight_decay": decay})
    return torch.optim.AdamW(settings)


def lr_scale(name: str, config: OptimConfig) -> float:
    """What ``config.lr`` is multiplied by for the parameter ``name``; 0 is frozen."""
    for rule in config.layers:
        if fnmatchcase(name, rule.pattern):
            return rule.lr_scale
    return 1.0


def freeze_layers(model: nn.Module, config: OptimConfig) -> None:
    """Parameters with an ``lr_scale`` of 0 get no gradients, and ``hold_norms``."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(lr_scale(name, config) > 0)
    hold_norms(model, config)


def hold_norms(model: nn.Module, config: OptimConfig) -> None:
    """BatchNorms whose parameters are all frozen, or match ``config.held_norms``, keep their
    statistics: they stay in evaluation mode. To be called whenever ``model`` has been switched to
    training mode."""
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm) or not module.affine:
            continue
        frozen = not any(parameter.requires_grad for parameter in module.parameters())
        if frozen or any(fnmatchcase(f"{name}.weight", each) for each in config.held_norms):
            module.eval()


def check_layers(model: nn.Module, config: OptimConfig) -> None:
    """Refuse patterns that match nothing, and rules that freeze everything, with ConfigError."""
    names = [name for name, _ in model.named_parameters()]
    patterns = {
        **{rule.pattern: "optim.layers" for rule in config.layers},
        **dict.fromkeys(config.no_decay, "optim.no_decay"),
        **dict.fromkeys(config.held_norms, "optim.held_norms"),
    }
    for pattern, key in patterns.items():
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"{key}: {pattern!r} matches no parameter; names look like {names[0]}"
            )
    if not any(lr_scale(name, config) for name in names):
        raise ConfigError("optim.layers freezes every parameter: leave one to train")


def lr_factor(step: int, config: OptimConfig) -> float:
    """Linear warm-up, then "poly": decay to zero at ``config.steps``; or "step": a tenth after
    each milestone."""
    start, warm = config.warmup_start, config.warmup_steps
    factor = start + (1 - start) * min(1.0, step / warm) if warm else 1.0
    match config.schedule:
        case "poly":
            return float(factor * max(0.0, 1.0 - step / config.steps) ** config.power)
        case "step":
            return factor * 0.1 ** sum(step >= milestone for milestone in config.milestones)
