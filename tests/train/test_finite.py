"""Runs that diverge: they end soon, say so, and leave only what was finite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from knet_runtime.errors import CheckpointError, TrainingError
from knet_train.checkpoint import read_checkpoint
from knet_train.config import Config
from knet_train.finite import StopWhenNotFinite, all_finite
from knet_train.fit import RunResult
from knet_train.module import KNetModule
from knet_train.run_folder import SavedState, read_state

SAVING = ("trainer.save_every=1", "trainer.val_every=6", "optim.ema_decay=0.5")


class Poison(pl.Callback):
    """Puts NaN into a weight at the start of one step, as an exploding gradient does."""

    def __init__(self, step: int, value: float = float("nan")) -> None:
        self.step, self.value = step, value

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step + 1 == self.step:
            with torch.no_grad():
                module.model.conv_seg.weight[0, 0] = self.value


class PoisonAfter(Poison):
    """The same behind the step, when its loss has been seen."""

    def on_train_batch_start(self, *_: Any) -> None:
        pass

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                module.model.conv_seg.weight[0, 0] = self.value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run_at_once(
    go: Callable[..., RunResult], tmp_path: Path, value: float
) -> None:
    said = (
        r"^the loss is not finite at step 4 \(learning rate 0\.000536, precision 32-true\); "
        r".*resume\.ckpt, of step 3, is kept: start a new run with a lower optim\.lr"
    )
    with pytest.raises(TrainingError, match=said) as caught:
        go("run", *SAVING, callbacks=[Poison(4, value)])
    assert "\n" not in str(caught.value)
    state = read_state(tmp_path / "run" / "resume.ckpt")
    assert isinstance(state, SavedState)
    assert state.step == 3
    assert not (tmp_path / "run" / "last.safetensors").exists()


def test_a_run_that_diverged_resumes_from_what_was_finite(
    go: Callable[..., RunResult],
    whole: Callable[..., Any],
    different: Callable[[Path, Path], list[str]],
) -> None:
    expected = whole(*SAVING)
    with pytest.raises(TrainingError):
        go("parts", *SAVING, callbacks=[Poison(4)])
    result = go("parts", *SAVING, resume=True)
    assert not different(expected.last, result.last)
    assert all_finite(read_checkpoint(result.best).model.state_dict())


def test_weights_that_are_not_finite_are_never_saved(
    go: Callable[..., RunResult], tmp_path: Path
) -> None:
    """The loss of the step was fine; its gradient was not."""
    with pytest.raises(TrainingError, match=r"^the weights are not finite at step 2 .*of step 1"):
        go("run", *SAVING, callbacks=[PoisonAfter(2)])
    state = read_state(tmp_path / "run" / "resume.ckpt")
    assert isinstance(state, SavedState)
    assert state.step == 1


def test_no_best_weights_are_written_that_are_not_finite(
    go: Callable[..., RunResult], tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=r"weights are not finite at step 2 .*no state"):
        go("run", "trainer.val_every=2", "optim.ema_decay=0", callbacks=[PoisonAfter(2)])
    assert not list((tmp_path / "run").glob("*.safetensors"))
    assert not list((tmp_path / "run").glob("*.ckpt"))


def test_a_state_that_is_not_finite_is_not_resumed(
    go: Callable[..., RunResult], tmp_path: Path
) -> None:
    with pytest.raises(TrainingError):
        go("run", *SAVING, callbacks=[Poison(2)])
    path = tmp_path / "run" / "resume.ckpt"
    state = torch.load(path, weights_only=True)
    state["current_model_state"]["model.conv_seg.weight"][0, 0] = float("nan")
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"resume\.ckpt is damaged.*weights that are not fin"):
        go("run", *SAVING, resume=True)


def losses(
    tiny_config: Callable[..., Config], precision: str, values: list[float], *settings: str
) -> int | None:
    """The step behind which the run would end; None if behind none of these losses."""
    config = tiny_config(*settings)
    module = KNetModule.__new__(KNetModule)
    pl.LightningModule.__init__(module)
    trainer = SimpleNamespace(precision=precision, global_step=0)
    module.config, module.saved_step = config, None
    module._trainer = trainer  # type: ignore[assignment]
    stop = StopWhenNotFinite(Path("run"))
    parts = config.optim.accumulate
    for index, value in enumerate(values):
        trainer.callback_metrics = {"loss": torch.tensor(value)}
        trainer.global_step = (index + 1) // parts
        try:
            stop.on_train_batch_end(trainer, module, None, None, index)  # type: ignore[arg-type]
        except TrainingError:
            return trainer.global_step
    return None


NAN = float("nan")


@pytest.mark.parametrize(
    ("precision", "values", "end"),
    [
        ("32-true", [1, 1, NAN, 1], 3),
        ("bf16-mixed", [1, float("inf")], 2),
        ("16-mixed", [1, NAN, 1, NAN, NAN, NAN, NAN, 1], None),  # AMP looks for its scale
        ("16-mixed", [1, NAN, NAN, NAN, NAN, NAN, NAN], 6),
        ("32-true", [1, 1e30, 0], None),
    ],
)
def test_only_16_bit_amp_may_leave_out_steps(
    tiny_config: Callable[..., Config], precision: str, values: list[float], end: int | None
) -> None:
    assert losses(tiny_config, precision, values) == end


def test_parts_of_a_step_count_as_one(tiny_config: Callable[..., Config]) -> None:
    values = [1.0, 1.0, *[NAN] * 12]
    assert losses(tiny_config, "16-mixed", values, "optim.accumulate=2") == 5


def test_nested_values_are_all_looked_at() -> None:
    good = {"a": [torch.zeros(2), (torch.ones(1, dtype=torch.int64), "text", None)]}
    assert all_finite(good)
    assert not all_finite({"good": good, "bad": [{"x": (torch.tensor([1.0, NAN]),)}]})
