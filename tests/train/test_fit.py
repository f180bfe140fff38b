"""Whole runs, of six steps on six small images."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file

from knet_runtime.errors import CheckpointError, ConfigError, DataError, OutputError
from knet_runtime.segmentation import Segmentation
from knet_train.checkpoint import Checkpoint, read_checkpoint
from knet_train.config import Config
from knet_train.data.dataset import open_folder
from knet_train.evaluate import Find, evaluate, together
from knet_train.fit import RunResult
from knet_train.inference import predict
from knet_train.run_folder import Stopped

MakeConfig = Callable[..., Config]
Different = Callable[[Path, Path], list[str]]


def finder(of: Checkpoint) -> Find:
    return lambda image: Segmentation(predict(of.model, image, of.config), of.labels)


class At(pl.Callback):
    """Does something at the end of one step; remembers every step's loss."""

    def __init__(self, step: int = 0, act: Callable[[], None] = lambda: None) -> None:
        self.step, self.act = step, act
        self.losses: dict[int, float] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step + 1 == self.step:
            self.act()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.losses[trainer.global_step] = float(outputs["loss"])


class Evaluations(pl.Callback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.steps.append(trainer.global_step)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_a_run_leaves_its_files_and_says_what_it_scored(
    go: Callable[..., RunResult],
    tiny_config: MakeConfig,
    data: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    level = logging.getLogger("pytorch_lightning").level
    handler = signal.getsignal(signal.SIGINT)
    seen = Evaluations()
    result = go("run", callbacks=[seen])
    run = tmp_path / "run"
    assert (result.best, result.last) == (run / "best.safetensors", run / "last.safetensors")
    assert {p.name for p in run.iterdir()} == {
        "best.safetensors",
        "last.safetensors",
        "report.html",
        "resume.ckpt",
        "config.json",
        "logs",
    }
    config = tiny_config()
    assert msgspec.json.decode((run / "config.json").read_bytes(), type=Config) == config
    logs = {p.name.split(".")[0] for p in (run / "logs" / "version_0").iterdir()}
    assert {"metrics", "events"} <= logs
    assert "val_miou" in (run / "logs" / "version_0" / "metrics.csv").read_text()
    assert seen.steps == [2, 4, 6]

    best = read_checkpoint(result.best)
    assert best.config == config
    scores = evaluate(finder(best), open_folder(data, "all"))
    assert together(scores, best.labels).miou == pytest.approx(result.best_score)
    assert read_checkpoint(result.last).labels.names == ("road", "sky", "car")

    assert logging.getLogger("pytorch_lightning").level == level
    assert signal.getsignal(signal.SIGINT) is handler
    assert not [r for r in caplog.records if r.name.startswith(("pytorch_", "lightning"))]


def test_what_is_kept_is_the_average_of_the_weights(go: Callable[..., RunResult]) -> None:
    class Follow(pl.Callback):
        """The average by its definition: e ← d·e + (1 - d)·w, from the first step's weights."""

        average: torch.Tensor | None = None

        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            weight = module.model.conv_seg.weight.detach().clone()
            before = self.average
            self.average = weight if before is None else 0.5 * before + 0.5 * weight

    follow = Follow()
    result = go("run", "optim.ema_decay=0.5", "optim.lr=0.01", callbacks=[follow])
    assert follow.average is not None
    torch.testing.assert_close(load_file(result.last)["conv_seg.weight"], follow.average)


def test_the_same_seed_gives_the_same_weights(
    go: Callable[..., RunResult], whole: Callable[..., Any], different: Different
) -> None:
    first = whole()
    assert not different(first.last, go("two").last)
    assert different(first.last, go("three", "trainer.seed=1").last)


@pytest.mark.parametrize("step", [3, 4])
def test_an_interrupted_run_resumes_as_if_nothing_had_been(
    go: Callable[..., RunResult],
    whole: Callable[..., Any],
    different: Different,
    reported: Callable[[Path], str],
    tmp_path: Path,
    step: int,
) -> None:
    """Equal to the last bit, dropout included: samples, dropout and rate depend on the step."""
    expected = whole()
    first, second = At(step, interrupt), At()
    handler = signal.getsignal(signal.SIGINT)
    begun, ended = Evaluations(), Evaluations()
    with pytest.raises(Stopped) as stopped:
        go("parts", callbacks=[first, begun])
    assert stopped.value.step == step
    assert signal.getsignal(signal.SIGINT) is handler
    assert max(first.losses, default=0) == step
    assert not (tmp_path / "parts" / "last.safetensors").exists()
    result = go("parts", resume=True, callbacks=[second, ended])
    assert {**first.losses, **second.losses} == expected.losses
    assert sorted([*first.losses, *second.losses]) == [1, 2, 3, 4, 5, 6]
    assert sorted({*begun.steps, *ended.steps}) == expected.evaluated
    assert not different(expected.last, result.last)
    assert not different(expected.best, result.best)
    assert result.best_score == expected.best_score
    assert reported(result.best) == reported(expected.best)


def test_a_crash_loses_no_more_than_the_steps_since_the_last_evaluation(
    go: Callable[..., RunResult], whole: Callable[..., Any], different: Different
) -> None:
    def crash() -> None:
        raise RuntimeError("the power went")

    expected = whole()
    with pytest.raises(RuntimeError, match="the power went"):
        go("parts", callbacks=[At(6, crash)])
    second = At()
    result = go("parts", resume=True, callbacks=[second])
    assert list(second.losses) == [5, 6]
    assert not different(expected.last, result.last)


def test_a_second_interrupt_ends_at_once(go: Callable[..., RunResult], tmp_path: Path) -> None:
    def twice() -> None:
        interrupt()
        interrupt()

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        go("run", callbacks=[At(1, twice)])
    assert not (tmp_path / "run" / "resume.ckpt").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_steps_behind_the_last_evaluation_are_scored_too(
    go: Callable[..., RunResult], different: Different, tiny_config: MakeConfig, data: Path
) -> None:
    result = go("run", "optim.steps=3", "trainer.val_every=10")
    assert not different(result.best, result.last)
    last = read_checkpoint(result.last)
    scores = evaluate(finder(last), open_folder(data, "all"))
    assert together(scores, last.labels).miou == pytest.approx(result.best_score)


def test_a_run_is_not_overwritten_nor_resumed_when_complete(go: Callable[..., RunResult]) -> None:
    result = go("run", "optim.steps=2")
    before = result.best.read_bytes()
    with pytest.raises(OutputError, match=r"already holds a run: pass --resume .* another --out"):
        go("run", "optim.steps=2")
    with pytest.raises(OutputError, match=r"is complete .*another --out"):
        go("run", "optim.steps=2", resume=True)
    assert result.best.read_bytes() == before


def test_a_run_is_resumed_with_its_own_configuration(
    go: Callable[..., RunResult], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        go("run", callbacks=[At(1, interrupt)])
    with pytest.raises(ConfigError, match=r"started with optim\.lr = 0\.001, not 0\.1"):
        go("run", "optim.lr=0.1", resume=True)
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json.*start a new one"):
        go("run", resume=True)


def test_a_damaged_state_is_named(go: Callable[..., RunResult], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        go("run", callbacks=[At(1, interrupt)])
    state = tmp_path / "run" / "resume.ckpt"
    state.write_bytes(state.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"resume\.ckpt is damaged: start a new run"):
        go("run", resume=True)


def test_resuming_what_has_no_state_yet_starts_it(
    go: Callable[..., RunResult],
    whole: Callable[..., Any],
    different: Different,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A job that is started again after every end always passes --resume."""
    expected = whole()
    first = go("never started", resume=True)
    assert "has no resume.ckpt yet: starting at step 0" in caplog.text
    assert not different(expected.last, first.last)

    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "config.json").write_bytes(
        expected.last.with_name("config.json").read_bytes()
    )
    (tmp_path / "killed" / ".resume.ckpt.123.part").write_bytes(b"half a state")
    assert not different(expected.last, go("killed", resume=True).last)
    assert not list((tmp_path / "killed").glob(".*"))


def test_another_seed_would_draw_other_samples_and_is_refused(go: Callable[..., RunResult]) -> None:
    with pytest.raises(KeyboardInterrupt):
        go("run", callbacks=[At(1, interrupt)])
    with pytest.raises(ConfigError, match=r"started with trainer\.seed = 0, not 1"):
        go("run", "trainer.seed=1", resume=True)


def test_a_hang_up_that_is_ignored_stays_ignored(go: Callable[..., RunResult]) -> None:
    """As for what nohup starts."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        go("run", callbacks=[At(3, lambda: os.kill(os.getpid(), signal.SIGHUP))])
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_save_as_ctrl_c_does_and_are_then_passed_on(
    go: Callable[..., RunResult],
    whole: Callable[..., Any],
    different: Different,
    number: signal.Signals,
) -> None:
    passed_on = []
    before = signal.signal(number, lambda *_: passed_on.append(True))
    try:
        with pytest.raises(Stopped):
            go("parts", callbacks=[At(3, lambda: os.kill(os.getpid(), number))])
    finally:
        signal.signal(number, before)
    assert passed_on == [True]
    assert not different(whole().last, go("parts", resume=True).last)


def test_the_state_is_saved_between_evaluations(go: Callable[..., RunResult]) -> None:
    def crash() -> None:
        raise RuntimeError("the power went")

    with pytest.raises(RuntimeError, match="the power went"):
        go("run", "trainer.val_every=6", "trainer.save_every=2", callbacks=[At(6, crash)])
    second = At()
    go("run", "trainer.val_every=6", "trainer.save_every=2", resume=True, callbacks=[second])
    assert list(second.losses) == [5, 6]


def test_synthetic_streets_are_left_out_where_classes_differ(
    go: Callable[..., RunResult],
    different: Different,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = go("without", "optim.steps=2")
    result = go("run", "optim.steps=2", "data.synthetic_share=0.5")
    assert "without synthetic streets: they have CamVid's eleven classes" in caplog.text
    assert not different(expected.last, result.last)
    config = msgspec.json.decode((tmp_path / "run" / "config.json").read_bytes(), type=Config)
    assert config.data.synthetic_share == 0


def test_a_run_says_what_looks_wrong_in_its_labels(
    go: Callable[..., RunResult], data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (data / "labels.json").write_text('["road", "sky", "car", "bus"]')
    result = go("run", "optim.steps=1", "trainer.val_every=1")
    assert caplog.text.count("no label has a pixel of bus") == 1
    # A class that is neither labelled nor predicted is in no mean; others may be predicted.
    assert result.classes == 4
    assert 3 <= result.scored_classes <= 4


def test_memory_that_runs_out_names_the_settings(go: Callable[..., RunResult]) -> None:
    def enormous(*_: object) -> Any:
        return torch.empty(2**60)

    with pytest.raises(ConfigError, match=r"memory ran out: lower optim\.batch_size"):
        go("run", build=enormous)


def test_a_place_that_cannot_be_written_is_named(
    go: Callable[..., RunResult], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"cannot write to .*file.*--out"):
        go("file")
    with pytest.raises(OutputError, match="cannot write to"):
        go("file/below")


def test_faulty_data_is_refused_before_anything_is_written(
    go: Callable[..., RunResult], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="no split 'absent'"):
        go("run", "data.val_split=absent")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_workers_change_nothing_and_interrupts_do_not_kill_them(
    go: Callable[..., RunResult], whole: Callable[..., Any], different: Different
) -> None:
    expected = whole()
    with pytest.raises(KeyboardInterrupt):
        go("one", "trainer.workers=1", callbacks=[At(3, interrupt)])
    result = go("one", "trainer.workers=1", resume=True)
    assert not different(expected.last, result.last)


@pytest.mark.slow
def test_it_learns(go: Callable[..., RunResult], data: Path, tiny_config: MakeConfig) -> None:
    result = go("run", "optim.steps=60", "optim.ema_decay=0.8", "trainer.val_every=60")
    assert result.best_score > 0.5  # one class everywhere scores below 0.2
