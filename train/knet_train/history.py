"""What a run has measured from its first step on: losses, learning rates and scores.

It is a part of the run's states, so a resumed run has it whole, and repeated steps count once.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytorch_lightning as pl

from knet_train.data.batches import Part, SegmentPart
from knet_train.module import Scores, TrainingModule

_POINTS = 500  # of a curve, at the most


class LeftOut(msgspec.Struct, frozen=True):
    """The scores of the drives that are left out, as ``Evaluation`` has those of the split."""

    score: float
    scored: int
    classes: tuple[float | None, ...]


class Evaluation(msgspec.Struct, frozen=True):
    """The scores of the validation split after one ``step``, 0 … 1: the metric, which is the mean
    of ``scored`` classes, and the same of each class, None where it counts in no mean."""

    step: int
    score: float
    scored: int
    classes: tuple[float | None, ...]
    left_out: LeftOut | None = None

    @property
    def chosen_by(self) -> float:
        """The score that chooses the best weights: of the drives left out, if any."""
        return self.score if self.left_out is None else self.left_out.score


class Point(msgspec.Struct, frozen=True):
    """The mean loss of the steps since the point before, and the highest learning rate now."""

    step: int
    loss: float
    rate: float


class History(pl.Callback):
    """The curves of a run, at most 500 points of each, and its evaluations.

    It must stand behind ``SaveBest``, which scores, and before whatever reads it or saves states.
    """

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.evaluations: list[Evaluation] = []
        self._losses: list[Any] = []  # since the last point; on a GPU they are not waited for

    @property
    def best(self) -> Evaluation | None:
        """The evaluation that ``best.safetensors`` is of: the first with the highest score."""
        return max(self.evaluations, key=lambda one: one.chosen_by, default=None)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Part | SegmentPart,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        optim, step = pl_module.config.optim, trainer.global_step
        self._losses.append(trainer.callback_metrics["loss"])
        every = -(-optim.steps // _POINTS)
        if not pl_module.ends_step(batch) or (step % every and step < optim.steps):
            return
        loss = float(np.mean([float(one) for one in self._losses]))
        self.points.append(Point(step, loss, learning_rate(trainer)))
        self._losses.clear()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        val, *others = (_numbers(scores) for scores in pl_module.evaluated)
        left_out = [LeftOut(*numbers) for numbers in others]
        self.evaluations.append(Evaluation(trainer.global_step, *val, *left_out))

    def state_dict(self) -> dict[str, Any]:
        return {
            "points": msgspec.to_builtins(self.points),
            "evaluations": msgspec.to_builtins(self.evaluations),
            "losses": [float(one) for one in self._losses],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.points = msgspec.convert(state_dict["points"], list[Point])
        self.evaluations = msgspec.convert(state_dict["evaluations"], list[Evaluation])
        self._losses = list(state_dict["losses"])


def _numbers(scores: Scores) -> tuple[float, int, tuple[float | None, ...]]:
    score, scored, *_ = scores.logged.values()
    classes = tuple(None if np.isnan(one) else one for one in scores.classes.tolist())
    return score, int(scored), classes


def learning_rate(trainer: pl.Trainer) -> float:
    """The highest of all groups of parameters, which the next step will use."""
    return max(float(group["lr"]) for group in trainer.optimizers[0].param_groups)
