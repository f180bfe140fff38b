"""The training step of instance and panoptic K-Nets, and their scores."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knet_runtime.panoptic_quality import PanopticQuality, segment_ids
from knet_runtime.segmentation import Segmentation
from knet_train.average_precision import AveragePrecision
from knet_train.config import Config
from knet_train.data.batches import SegmentPart
from knet_train.data.segment_folder import SegmentFolder
from knet_train.data.truth import Truth
from knet_train.inference import predict_segments, segment_rules
from knet_train.models.segments import SegmentKNet
from knet_train.module import Scores, TrainingModule
from knet_train.segment_loss import Divisors, loss_divisors, segment_losses


class PanopticModule(TrainingModule):
    """The panoptic K-Net with its losses, and panoptic quality."""

    metric = "PQ"
    model: SegmentKNet
    qualities: list[PanopticQuality]

    def __init__(self, model: SegmentKNet, config: Config, folder: SegmentFolder) -> None:
        super().__init__(model, config, folder.labels)

    def training_step(self, batch: SegmentPart, _: int) -> Tensor:
        return _loss(self, batch)

    def on_validation_epoch_start(self) -> None:
        self.qualities = [PanopticQuality(self.label_map) for _ in self.trainer.num_val_batches]

    def validation_step(
        self, batch: tuple[NDArray[np.uint8], Truth], _: int, dataloader_idx: int = 0
    ) -> dict[str, Segmentation]:
        image, truth = batch
        rules = segment_rules(self.config)
        found = predict_segments(self.model, image, self.config, self.label_map, rules)
        self.qualities[dataloader_idx].update(segment_ids(found), truth.flat())
        return {"found": found}

    def scores(self) -> list[Scores]:
        return [self._scores(own) for own in self.qualities]

    def _scores(self, own: PanopticQuality) -> Scores:
        total = PanopticQuality(self.label_map)
        total.iou = self.sum_over_processes(own.iou)
        counts = np.stack([own.tp, own.fp, own.fn])
        total.tp, total.fp, total.fn = self.sum_over_processes(counts)
        found = {"": total.all, "_things": total.things, "_stuff": total.stuff}
        pq, *others = ((f"pq{of}", _zero(one.pq)) for of, one in found.items())
        logged = dict([pq, ("classes", float(total.all.count)), *others])
        return Scores(logged, np.array([one.pq for one in total.per_class()]))


class InstanceModule(TrainingModule):
    """The instance K-Net with its losses, and average precision of masks."""

    metric = "AP"
    model: SegmentKNet
    precisions: list[AveragePrecision]

    def __init__(self, model: SegmentKNet, config: Config, folder: SegmentFolder) -> None:
        super().__init__(model, config, folder.labels)

    def training_step(self, batch: SegmentPart, _: int) -> Tensor:
        return _loss(self, batch)

    def on_validation_epoch_start(self) -> None:
        self.precisions = [AveragePrecision(self.label_map) for _ in self.trainer.num_val_batches]

    def validation_step(
        self, batch: tuple[NDArray[np.uint8], Truth], index: int, dataloader_idx: int = 0
    ) -> dict[str, Segmentation]:
        image, truth = batch
        # Average precision ranks all objects by their scores.
        rules = msgspec.structs.replace(segment_rules(self.config), score=0.0)
        found = predict_segments(self.model, image, self.config, self.label_map, rules)
        number = index * self.trainer.world_size + self.global_rank
        self.precisions[dataloader_idx].update(number, found.to_coco(), truth)
        return {"found": found}

    def scores(self) -> list[Scores]:
        return [self._scores(own) for own in self.precisions]

    def _scores(self, own: AveragePrecision) -> Scores:
        parts: list[Any] = [own]
        if self.trainer.world_size > 1:
            parts = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, own)
        total = AveragePrecision(self.label_map)
        for part in parts:
            total.found += part.found
            total.truth += part.truth
            total.images += part.images
        score, each = total.scores()
        logged = {"ap": _zero(score.ap), "classes": float(score.count), "ap50": _zero(score.ap50)}
        return Scores(logged, np.array([one.ap for one in each]))


def _loss(module: PanopticModule | InstanceModule, batch: SegmentPart) -> Tensor:
    model = module.model
    losses = segment_losses(
        model.training_outputs(batch.images),
        batch.targets,
        things=model.things,
        stuff=model.stuff,
        class_weight=module.config.loss.class_weight,
        rank_weight=module.config.loss.rank_weight,
        negative_iou=module.config.loss.negative_iou,
        divisors=_divisors(module, batch),
    )
    loss = torch.stack(list(losses.values())).sum()
    module.log_loss(loss, len(batch.images))
    return loss


def _divisors(module: PanopticModule | InstanceModule, batch: SegmentPart) -> Divisors | None:
    """``loss_divisors`` of the whole step, divided by its number of parts: as gradients are
    averaged over parts and processes, they are those of one process with the whole batch. None
    where the step is one part."""
    processes, parts = module.trainer.world_size, module.config.optim.accumulate
    if processes * parts == 1:
        return None
    own = loss_divisors(batch.share_counts, module.config.model.kernels)
    total = module.trainer.strategy.reduce(own, reduce_op="sum")
    assert isinstance(total, Tensor)
    return Divisors(*(total.clamp(min=1) / (processes * parts)))


def _zero(score: float) -> float:
    """What is not to be had counts as nothing, so that some weights are always the best."""
    return 0.0 if np.isnan(score) else score
