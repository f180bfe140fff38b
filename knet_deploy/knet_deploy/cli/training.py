"""What `knet-deploy train` says while it runs: a header, one live line on a terminal or plain lines
elsewhere, and a line for each evaluation."""

from __future__ import annotations

from collections import deque
from time import monotonic

import pytorch_lightning as pl
from rich.console import Console
from rich.live import Live
from rich.text import Text
from typer import echo

from knet_deploy.cli.console import clock, one_line, say
from knet_train.data.batches import Part, SegmentPart
from knet_train.history import Evaluation, History, LeftOut, learning_rate
from knet_train.module import TrainingModule
from knet_train.run_facts import run_facts

_MEASURED = 50  # steps that the speed is the mean of


class Lines(pl.Callback):
    """Says how a run goes; the first of its processes does."""

    def __init__(self) -> None:
        console = Console()
        self.live = Live(console=console, transient=True) if console.is_terminal else None
        self.best: Evaluation | None = None
        self._metric = ""
        self._history = History()
        self._seconds: deque[float] = deque(maxlen=_MEASURED)
        self._last: float | None = None  # when the last step ended; an evaluation is no step
        self._evaluation: float | None = None  # seconds of one
        self._began = 0.0
        self._line = ""

    def standing(self, step: int, steps: int) -> str:
        """Where the run is, in words."""
        at = f"step {step} of {steps}"
        if self.best is None:
            return f"{at}, before the first evaluation"
        return (
            f"{at}, best {self._metric} {100 * self.best.chosen_by:.2f} % at step {self.best.step}"
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        self._metric = pl_module.metric
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning has no type for it
        self._history = next(one for one in callbacks if isinstance(one, History))
        self.best = self._history.best
        if not trainer.is_global_zero:
            return
        for label, value in run_facts(trainer, pl_module).items():
            say(label, value)
        if self.live is not None:
            self.live.start()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: Part | SegmentPart,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, TrainingModule)
        step, steps = trainer.global_step, pl_module.config.optim.steps
        if not pl_module.ends_step(batch):
            return
        now = monotonic()
        if self._last is not None:
            self._seconds.append(now - self._last)
        self._last = now
        every = 10 if self.live is not None else max(1, steps // 100)
        if not trainer.is_global_zero or (step % every and step < steps):
            return
        self._line = self._progress(trainer, pl_module)
        if self.live is None:
            echo(self._line)
        else:
            self.live.update(_text(self._line))

    def _progress(self, trainer: pl.Trainer, module: TrainingModule) -> str:
        config, step = module.config, trainer.global_step
        parts = [
            f"step {step}/{config.optim.steps}",
            f"loss {float(trainer.callback_metrics['loss']):.3g}",
            f"lr {_short(learning_rate(trainer))}",
        ]
        if self._seconds:
            each = sum(self._seconds) / len(self._seconds)
            left = each * (config.optim.steps - step)
            if self._evaluation is not None:
                every = config.trainer.val_every
                left += self._evaluation * (-(-config.optim.steps // every) - step // every)
            parts += [f"{config.optim.batch_size / each:.3g} img/s", f"ETA {clock(left)}"]
        if self.best is not None:
            parts.append(f"best {self._metric} {100 * self.best.chosen_by:.1f} @ {self.best.step}")
        return " · ".join(parts)

    def on_validation_start(self, *_: object) -> None:
        self._began = monotonic()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.live is not None and trainer.is_global_zero:
            counts = [int(count) for count in trainer.num_val_batches]
            done = sum(counts[:dataloader_idx]) + batch_idx + 1
            self.live.update(_text(f"{self._line} · evaluating {done}/{sum(counts)}"))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        self.best, self._last = self._history.best, None
        self._evaluation = monotonic() - self._began
        if not trainer.is_global_zero:
            return
        last, steps = self._history.evaluations[-1], pl_module.config.optim.steps
        classes = pl_module.label_map.num_classes
        line = f"step {last.step}/{steps} · {self._metric} {_score(last, classes)}"
        if last.left_out is not None:
            drives = ", ".join(pl_module.config.data.leave_out)
            line += f" · {drives}, left out: {_score(last.left_out, classes)}"
        if self.live is None:
            echo(line)
        else:  # above the live line
            self.live.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def on_exception(self, *_: object) -> None:
        self._end()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._end()

    def _end(self) -> None:
        if self.live is not None:
            self.live.stop()


def _score(found: Evaluation | LeftOut, classes: int) -> str:
    return f"{100 * found.score:.2f} % over {found.scored} of {classes} classes"


def _short(rate: float) -> str:
    """9.3e-4 of 0.00093."""
    return f"{rate:.1e}".replace("e-0", "e-").replace("e+00", "")


def _text(line: str) -> Text:
    return Text(one_line(line), no_wrap=True, overflow="ellipsis")
