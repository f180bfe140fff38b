"""A training run as a page: ``report.html`` in its folder, written anew after every evaluation.

It carries its images and needs no network. Whatever it shows is in the run's states too (see
``history``) or comes from the evaluation that has just ended, so a resumed run has it whole. It
draws no random number and changes nothing that is learnt.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import cv2
import msgspec
import numpy as np
import pytorch_lightning as pl
from numpy.typing import NDArray

from knet_runtime.atomic import write_atomic
from knet_runtime.drawing import encode_png
from knet_runtime.labels import LabelMap
from knet_runtime.markup import legend, swatch
from knet_runtime.metrics import ConfusionMatrix
from knet_runtime.segmentation import Instance, Segmentation
from knet_runtime.types import ClassMap, Rgb
from knet_train.config import Config
from knet_train.curves import chart, small_line
from knet_train.data.truth import Truth
from knet_train.figures import draw_confusion
from knet_train.history import History
from knet_train.inference import segment_rules
from knet_train.loggers import show as show_in
from knet_train.module import TrainingModule
from knet_train.page import OPACITY, STYLE, data_uri, in_red, pictures, shrunk, small_marks
from knet_train.run_facts import run_facts
from knet_train.segment_pairs import differing, numbered_alike

REPORT = "report.html"
_TEMPLATE = Path(__file__).with_name("run_report.html")
_IMAGES = 8
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassShares:
    """Labelled pixels of each class int64 [N], in ``files`` of a split's ``total`` labels."""

    pixels: NDArray[np.int64]
    files: int
    total: int


@dataclass(frozen=True, eq=False)
class Shown:
    """One validation image as the page has it, small."""

    name: str
    image: Rgb
    label: Rgb  # drawn over the image, as the next
    found: Rgb
    wrong: NDArray[np.bool_]
    right: float  # share of the known pixels
    classes: frozenset[int]


class RunReport(pl.Callback):
    """Writes the page after every evaluation; the first of the processes does, with images of its
    own share of the split. It must stand behind ``history`` in the list of callbacks."""

    def __init__(
        self, run: Path, data: Path, history: History, shares: ClassShares, resume: str | None
    ) -> None:
        self.run, self.data, self.history, self.shares = run, data, history, shares
        self.resume = resume  # the command that continues the run
        self._facts: dict[str, str] = {}
        self._shown: list[Shown] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        facts = run_facts(trainer, pl_module)
        self._facts = {**facts, "memory": f"{facts['memory']} at the start"}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._shown.clear()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        count = int(trainer.num_val_batches[0])
        places = np.linspace(0, count - 1, _IMAGES).round().astype(int).tolist()
        if not trainer.is_global_zero or dataloader_idx or batch_idx not in places:
            return
        assert isinstance(pl_module, TrainingModule)
        images = trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it in fit
        name = images.val.samples[batch_idx * trainer.world_size].name
        image, label = batch
        self._shown.append(show(name, image, label, outputs["found"], pl_module.config))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, TrainingModule)
        try:
            write_atomic(self.run / REPORT, self.render(pl_module).encode())
        except OSError as error:  # no reason to lose the run
            _log.warning("%s cannot be written: %s", self.run / REPORT, error)
        scores, images = self._logged(pl_module)
        for logger in trainer.loggers:
            show_in(logger, scores, images, self.history.evaluations[-1].step)

    def render(self, module: TrainingModule) -> str:
        """The whole page as HTML."""
        best, last = self.history.best, self.history.evaluations[-1]
        assert best is not None
        steps, metric, labels = module.config.optim.steps, module.metric, module.label_map
        done = last.step >= steps
        data = module.config.data
        drives = ", ".join(data.leave_out)
        on = f" on {drives}, which is left out" if drives else ""
        summary = f"The best {'of the run' if done else 'so far'}{on}, at step {best.step:,}"
        if best.step != last.step:
            summary += f"; {100 * last.chosen_by:.2f} % at step {last.step:,}"
        summary += (
            f" of {steps:,}." if done else f". The run was at step {last.step:,} of {steps:,}."
        )
        if drives:
            summary += f" On {data.val_split} these weights score {100 * best.score:.2f} %."
        facts = {"run": str(self.run), "data": str(self.data), **self._facts}
        shares, scores = self.shares, module.evaluated[0]
        about = f"The mean is over {last.scored} of {labels.num_classes} classes. "
        about += "All in percent; shares are of the labelled pixels of split " + data.train_split
        if shares.files < shares.total:
            about += f", in {shares.files} of its {shares.total} images"
        confusion = ""
        if scores.confusion is not None:
            drawing = encode_png(_confusion(scores.confusion, labels, last.step))
            confusion = (
                "<h2>Confusion matrix</h2>\n<img class='matrix' alt='Confusion matrix' "
                f'src="{data_uri(drawing, "png")}">\n'
            )
        return Template(_TEMPLATE.read_text("utf-8")).substitute(
            style=STYLE,
            title=f"{metric} {100 * best.chosen_by:.2f} %",
            run=escape(self.run.name),
            summary=escape(summary),
            facts="\n".join(
                f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items()
            ),
            charts="\n".join(self._charts(metric, steps)),
            about=escape(f"{about}."),
            left_out=f"<th>now, {escape(drives)}</th>" if drives else "",
            metric=_of_class(metric),
            classes="\n".join(self._classes(labels, steps)),
            legend=legend(labels, {one for shown in self._shown for one in shown.classes}),
            images="\n".join(
                pictures(
                    shown.name,
                    f"{shown.name}: {100 * shown.right:.1f} % of the labelled pixels agree",
                    {
                        "image": shown.image,
                        "label": shown.label,
                        "prediction": shown.found,
                        "difference": in_red(shown.image, shown.wrong),
                    },
                    objects=module.config.model.task != "semantic",
                )
                for shown in self._shown
            ),
            confusion=confusion,
            commands=escape("\n".join(self._commands(done))),
            configuration=escape("\n".join(settings(module.config))),
        )

    def _logged(self, module: TrainingModule) -> tuple[dict[str, float], dict[str, Rgb]]:
        """What the loggers show of the last evaluation."""
        last, scores, labels = self.history.evaluations[-1], module.evaluated[0], module.label_map
        numbers = {
            f"{_of_class(module.metric)}/{name}": score
            for name, score in zip(labels.names, last.classes, strict=True)
            if score is not None
        }
        images: dict[str, Rgb] = {}
        for shown in self._shown:
            row = np.hstack(
                [shown.image, shown.label, shown.found, in_red(shown.image, shown.wrong)]
            )
            half: Any = cv2.resize(row, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
            images[f"images/{shown.name}"] = half
        if scores.confusion is not None:
            images["confusion"] = _confusion(scores.confusion, labels, last.step)
        return numbers, images

    def _charts(self, metric: str, steps: int) -> Iterator[str]:
        history, best = self.history, self.history.best
        assert best is not None
        loss = [(point.step, point.loss) for point in history.points]
        rate = [(point.step, point.rate) for point in history.points]
        score = [(one.step, 100 * one.score) for one in history.evaluations]
        yield f"<div><h3>Loss</h3>{chart('Loss', loss, steps)}</div>"
        dot = (best.step, 100 * best.score)
        yield f"<div><h3>{metric}, %</h3>{chart(metric, score, steps, dot)}</div>"
        left = [(one.step, 100 * one.chosen_by) for one in history.evaluations if one.left_out]
        if left:
            name = f"{metric} of the drives left out"
            dot = (best.step, 100 * best.chosen_by)
            yield f"<div><h3>{name}, %</h3>{chart(name, left, steps, dot)}</div>"
        yield f"<div><h3>Learning rate</h3>{chart('Learning rate', rate, steps)}</div>"

    def _classes(self, labels: LabelMap, steps: int) -> Iterator[str]:
        shares = self.shares.pixels / max(1, int(self.shares.pixels.sum()))
        for index, (name, colour) in enumerate(zip(labels.names, labels.palette, strict=True)):
            curve = [
                (one.step, score)
                for one in self.history.evaluations
                if (score := one.classes[index]) is not None
            ]
            last = self.history.evaluations[-1]
            best = max((score for _, score in curve), default=None)
            shown = [last.classes[index], best]
            shown += [last.left_out.classes[index]] if last.left_out else []
            cells = ("–" if one is None else f"{100 * one:.1f}" for one in shown)
            yield (
                f"<tr><th scope='row'>{swatch(colour)}{escape(name)}</th>"
                f"<td>{100 * shares[index]:.2f}</td><td>{small_line(curve, steps)}</td>"
                f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
            )

    def _commands(self, done: bool) -> Iterator[str]:
        best, data = shlex.quote(str(self.run / "best.safetensors")), shlex.quote(str(self.data))
        bundle = shlex.quote(f"{self.run.name}.knet")
        if not done and self.resume is not None:
            yield "# if it was stopped"
            yield f"{self.resume}\n"
        yield f"knet-deploy eval {best} --data {data}"
        yield f"knet-deploy export {best} -o {bundle} --data {data}"
        yield f"knet-deploy verify {bundle} --against {best} --data {data}"


def show(
    name: str, image: Rgb, label: ClassMap | Truth, found: Segmentation, config: Config
) -> Shown:
    """What is shown of an image uint8 [H, W, 3], its label and the prediction."""
    small = shrunk(image)
    if isinstance(label, Truth):
        flat = label.flat()
        truth = Segmentation.from_panoptic(
            flat.ids, flat.classes, [None] * len(flat.classes), found.labels
        )
        if found.task == "instance":  # AP ranks objects of every score
            found = _sure(found, segment_rules(config).score)
        known = ~(label.void | np.isin(label.ids, list(label.crowds)).any(0))
        wrong = differing(truth, found) & known
        found = numbered_alike(truth, found)
    else:
        truth = Segmentation(label, found.labels)
        known = label != found.labels.ignore_index
        wrong = differing(truth, found) & known
    return Shown(
        name,
        small,
        truth.overlay(small, OPACITY),
        found.overlay(small, OPACITY),
        small_marks(wrong, small.shape[:2]),
        1 - int(wrong.sum()) / max(1, int(known.sum())),
        frozenset(int(one) for each in (truth, found) for one in np.unique(each.class_map)),
    )


def _sure(found: Segmentation, score: float) -> Segmentation:
    objects = [
        Instance(one.class_id, one.score, one.box[0], one.box[1], mask)
        for one, mask in found.masks()
        if one.score is not None and one.score >= score
    ]
    return Segmentation.from_instances(objects, found.size, found.labels)


def _of_class(metric: str) -> str:
    return "IoU" if metric == "mIoU" else metric


def _confusion(matrix: NDArray[np.int64], labels: LabelMap, step: int) -> Rgb:
    confusion = ConfusionMatrix(labels.num_classes, labels.ignore_index)
    confusion.matrix = matrix
    return draw_confusion(confusion, labels, f"Pixels of each label, % (step {step})")


def settings(config: Config) -> Iterator[str]:
    """Every setting in the form that ``--set`` takes."""
    yield f"preset={config.preset}"
    for section in ("model", "data", "loss", "optim", "trainer"):
        for key, value in msgspec.to_builtins(getattr(config, section)).items():
            yield f"{section}.{key}={msgspec.json.encode(value).decode()}"
