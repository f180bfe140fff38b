"""Runs that die: killed at any step, out of disk, out of workers, over broken files."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import pickle
import resource
import signal
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytorch_lightning as pl
import torch

from knet_runtime.errors import CheckpointError, DataError, OutputError, SourceError, TrainingError
from knet_train.fit import RunResult
from knet_train.module import RUN_KEY
from knet_train.run_folder import AtomicCheckpointIO, SavedState, read_state

Different = Callable[[Path, Path], list[str]]


class At(pl.Callback):
    """Does something at the start of one step."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self.step, self.act = step, act

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step + 1 == self.step:
            self.act()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "workers"),
    [(2, 0), (4, 0), (6, 0), (6, 1)],
    ids=["before the first save", "after a save", "after an evaluation", "with a worker"],
)
def test_a_killed_run_ends_as_if_nothing_had_been(
    go: Callable[..., RunResult],
    start: Callable[..., Any],
    whole: Callable[..., Any],
    different: Different,
    tmp_path: Path,
    step: int,
    workers: int,
) -> None:
    """SIGKILL at the start of ``step``; saved were steps 2 and 4, the last by an evaluation."""
    settings = ("trainer.save_every=2", "trainer.val_every=4", f"trainer.workers={workers}")
    expected = whole("trainer.val_every=4")
    killed = start("parts", *settings, die_at=step)
    assert [code for code, _ in killed.ended()] == [-signal.SIGKILL]
    assert (tmp_path / "parts" / "resume.ckpt").exists() == (step > 2)
    (tmp_path / "parts" / ".resume.ckpt.1.part").write_bytes(b"half a state")
    result = go("parts", *settings, resume=True)
    assert not different(expected.last, result.last)
    assert not different(expected.best, result.best)
    assert result.best_score == expected.best_score
    assert not list((tmp_path / "parts").glob(".*.part"))


def limit_files(size: int) -> Callable[[], None]:
    """The next file that grows beyond ``size`` bytes cannot be written, as on a full disk."""

    def limit() -> None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    return limit


@pytest.fixture
def _no_limit_afterwards() -> Any:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("_no_limit_afterwards")
def test_a_full_disk_leaves_the_state_before_whole(tmp_path: Path) -> None:
    path = tmp_path / "resume.ckpt"
    states = AtomicCheckpointIO()
    states.save_checkpoint({"weights": torch.zeros(100_000)}, path)
    before = path.read_bytes()
    limit_files(50_000)()
    with pytest.raises(OutputError, match=r"resume\.ckpt: .*free some space"):
        states.save_checkpoint({"weights": torch.ones(100_000)}, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["resume.ckpt"]


def test_a_disk_that_is_full_only_when_the_file_is_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "resume.ckpt"
    states = AtomicCheckpointIO()
    states.save_checkpoint({"weights": torch.zeros(10)}, path)
    before = path.read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"No space left on device; free some space"):
        states.save_checkpoint({"weights": torch.ones(10)}, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["resume.ckpt"]


def test_what_is_no_fault_of_the_disk_is_not_called_one(tmp_path: Path) -> None:
    with pytest.raises((TypeError, AttributeError)):
        AtomicCheckpointIO().save_checkpoint({"odd": lambda: None}, tmp_path / "resume.ckpt")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("_no_limit_afterwards")
def test_a_run_on_a_full_disk_says_so_and_continues_from_the_state_before(
    go: Callable[..., RunResult], whole: Callable[..., Any], different: Different
) -> None:
    settings = ("trainer.save_every=1", "trainer.val_every=6")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    expected = whole(*settings)
    with pytest.raises(OutputError, match=r"resume\.ckpt.*free some space"):
        go("parts", *settings, callbacks=[At(4, limit_files(1_000_000))])
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert not different(expected.last, go("parts", *settings, resume=True).last)


@pytest.mark.slow
# Torch's handler of SIGCHLD raises wherever the process is: now and then in a callback of the
# garbage collector, which lets nothing out; then the next batch shows that the worker is gone.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_killed_worker_is_named_and_the_run_can_be_resumed(
    go: Callable[..., RunResult], whole: Callable[..., Any], different: Different
) -> None:
    def kill() -> None:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid or 0, signal.SIGKILL)

    settings = ("trainer.save_every=1", "trainer.workers=1", "optim.steps=12")
    settings += ("trainer.val_every=12",)
    with pytest.raises(TrainingError, match=r"process that reads images was killed.*--resume"):
        go("parts", *settings, callbacks=[At(3, kill)])
    expected = whole("optim.steps=12", "trainer.val_every=12")
    assert not different(expected.last, go("parts", *settings, resume=True).last)


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["by itself", "by a broken image", "by SIGTERM"])
def test_a_run_with_workers_lets_its_process_end(
    start: Callable[..., Any], data: Path, ends: str
) -> None:
    settings = ["trainer.workers=2", "optim.steps=2", "trainer.val_every=2"]
    if ends == "by SIGTERM":
        settings += ["optim.steps=1000", "trainer.val_every=1000"]
    if ends == "by a broken image":
        broken = data / "images" / "d.png"
        broken.write_bytes(broken.read_bytes()[:200])
    run = start("run", *settings, fresh=True)
    if ends == "by SIGTERM":
        while not run.losses_file.exists():
            assert run.processes[0].poll() is None
            time.sleep(0.1)
        run.processes[0].terminate()
    ((code, _),) = run.ended(seconds=120)
    assert code == {"by itself": 0, "by a broken image": 1, "by SIGTERM": -signal.SIGTERM}[ends]


def test_a_worker_killed_in_the_middle_of_a_save_is_named_too(go: Callable[..., RunResult]) -> None:
    """Torch's handler of SIGCHLD raises wherever the process is; a save that it interrupts can
    not close its archive, and that error hides the first one."""

    def interrupted() -> None:
        try:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64")

    with pytest.raises(TrainingError, match=r"process that reads images was killed.*--resume"):
        go("run", callbacks=[At(2, interrupted)])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_in_the_middle_is_named(
    go: Callable[..., RunResult], data: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    broken = data / "images" / "d.png"
    broken.write_bytes(broken.read_bytes()[:200])
    caplog.set_level(logging.ERROR)
    with pytest.raises(SourceError, match=r"d\.png") as raised:
        go("run", f"trainer.workers={workers}")
    assert "\n" not in str(raised.value)
    assert "Traceback" not in str(raised.value)


def killed_at(go: Callable[..., RunResult], step: int, *settings: str) -> None:
    def crash() -> None:
        raise RuntimeError("the power went")

    with pytest.raises(RuntimeError, match="the power went"):
        go(
            "parts",
            "trainer.save_every=1",
            "trainer.val_every=6",
            *settings,
            callbacks=[At(step, crash)],
        )


def flip(path: Path) -> None:
    """One bit in the middle, as a bad disk or cable does."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def foreign_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "not a state")


class Gadget:
    """What unpickling would run."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.proof,))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip,
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "a foreign zip": foreign_zip,
    "a foreign torch file": lambda path: torch.save({"weight": torch.zeros(3)}, path),
    "a gadget": lambda path: torch.save(Gadget(path.with_name("executed")), path),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Gadget(path.with_name("executed")))),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_noticed_and_nothing_in_it_is_executed(
    tmp_path: Path, damage: str, tiny_config: Callable[..., Any]
) -> None:
    path = tmp_path / "resume.ckpt"
    config = msgspec.json.encode(tiny_config()).decode()
    about = {"config": config, "class_names": ["road", "sky"]}
    weights = {"state_dict": {"w": torch.randn(100, 100)}, "global_step": 7, RUN_KEY: about}
    AtomicCheckpointIO().save_checkpoint(weights, path)
    whole = read_state(path)
    assert isinstance(whole, SavedState)
    assert (whole.step, whole.class_names) == (7, ("road", "sky"))
    DAMAGE[damage](path)
    fault = read_state(path)
    assert isinstance(fault, str)
    assert "weights_only" not in fault
    assert "\n" not in fault
    assert not (tmp_path / "executed").exists()


def test_no_flipped_bit_changes_what_is_resumed(
    tmp_path: Path, tiny_config: Callable[..., Any]
) -> None:
    """Each is either noticed or harmless (in a date, or in the padding of the archive)."""
    path = tmp_path / "resume.ckpt"
    config = msgspec.json.encode(tiny_config()).decode()
    weights = {"w": torch.arange(50.0), "v": torch.arange(9.0)}
    about = {"config": config, "class_names": ["road", "sky"]}
    state = {"state_dict": weights, "global_step": 7, RUN_KEY: about}
    AtomicCheckpointIO().save_checkpoint(state, path)
    whole, noticed = path.read_bytes(), 0
    for place in range(0, len(whole), 17):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        found = read_state(path)
        if isinstance(found, str):
            noticed += 1
            continue
        assert (found.step, found.class_names) == (7, ("road", "sky"))
        loaded = torch.load(path, weights_only=True)["state_dict"]
        assert all(torch.equal(loaded[key], value) for key, value in weights.items())
    assert noticed > len(whole) // 17 // 2


def test_a_run_continues_from_the_state_before_a_damaged_one(
    go: Callable[..., RunResult],
    whole: Callable[..., Any],
    different: Different,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = ("trainer.save_every=1", "trainer.val_every=6")
    expected = whole(*settings)
    assert not expected.last.with_name("resume.previous.ckpt").exists()
    killed_at(go, 5)
    run = tmp_path / "parts"
    flip(run / "resume.ckpt")
    damaged = (run / "resume.ckpt").read_bytes()
    result = go("parts", *settings, resume=True)
    assert (
        f"{run / 'resume.ckpt'} is damaged (a checksum does not match) and kept as "
        f"resume.damaged.ckpt: continuing from {run / 'resume.previous.ckpt'}, of step 3, instead"
    ) in caplog.text
    assert not different(expected.last, result.last)
    assert (run / "resume.damaged.ckpt").read_bytes() == damaged


def test_two_damaged_states_are_both_named(go: Callable[..., RunResult], tmp_path: Path) -> None:
    killed_at(go, 4)
    for name in ("resume.ckpt", "resume.previous.ckpt"):
        flip(tmp_path / "parts" / name)
    said = r"resume\.ckpt is damaged, and so is .*resume\.previous\.ckpt: start a new run"
    with pytest.raises(CheckpointError, match=said):
        go("parts", "trainer.save_every=1", "trainer.val_every=6", resume=True)
    with pytest.raises(OutputError, match="already holds a run"):
        go("parts")


def test_a_crash_between_two_renames_loses_no_state(
    go: Callable[..., RunResult], whole: Callable[..., Any], different: Different, tmp_path: Path
) -> None:
    settings = ("trainer.save_every=1", "trainer.val_every=6")
    expected = whole(*settings)
    killed_at(go, 4)
    run = tmp_path / "parts"
    (run / "resume.ckpt").replace(run / "resume.previous.ckpt")
    assert not different(expected.last, go("parts", *settings, resume=True).last)


def test_a_run_is_resumed_with_its_own_classes(
    go: Callable[..., RunResult], data: Path, tmp_path: Path
) -> None:
    killed_at(go, 4)
    (data / "labels.json").write_text('["road", "sky", "bus"]')
    with pytest.raises(DataError, match=r"started with the classes road, sky, car, and .* bus: "):
        go("parts", "trainer.save_every=1", "trainer.val_every=6", resume=True)
