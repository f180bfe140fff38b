"""The folder of a run: what may be started in it, and what a killed process left there."""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from lightning_fabric.plugins import TorchCheckpointIO

from knet_runtime.errors import CheckpointError, ConfigError, OutputError
from knet_runtime.pending import output_error, write_whole
from knet_train.config import Config

STATE, LAST, CONFIG = "resume.ckpt", "last.safetensors", "config.json"
log = logging.getLogger(__name__)


def state_to_resume(run: Path, config: Config, resume: bool) -> Path | None:
    """The state that the run goes on from; None where it starts at step 0.

    A run is started once, and resumed with the configuration that it was started with; only
    ``trainer`` may differ, but for its seed. One that was ended before its first state was
    written starts again. Raises OutputError, CheckpointError or ConfigError; writes nothing.
    """
    state, last, settings = run / STATE, run / LAST, run / CONFIG
    if not resume:
        if state.exists() or last.exists():
            raise OutputError(
                f"{run} already holds a run: pass --resume to go on, or another --out"
            )
        return None
    if last.exists():
        raise OutputError(f"{run} is complete ({last.name} is there): pass another --out")
    if state.is_file() or settings.is_file():
        _check_same(run, _began_with(settings), config)
    if not state.is_file():
        return None
    if not zipfile.is_zipfile(state):
        raise CheckpointError(f"{state} is damaged: start a new run with another --out")
    return state


def prepare(run: Path, config: Config) -> None:
    """Make the folder, remove what killed processes left in it, and write the configuration.

    Raises OutputError.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        for leftover in run.glob(".*.part"):
            leftover.unlink(missing_ok=True)
        write_whole(run / CONFIG, msgspec.json.format(msgspec.json.encode(config)))
    except OSError as error:
        raise OutputError(
            f"can not write to {run}: {error.strerror}; pass another --out"
        ) from error


class WholeStates(TorchCheckpointIO):
    """Lightning's states, each written beside the last one and then put in its place: whatever
    happens meanwhile, one of the two is there and whole."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Raises OutputError; the state before is then as it was."""
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
            _sync_folder(target.parent)
        except (OSError, RuntimeError) as error:
            # torch hides a failed write behind a RuntimeError of its own.
            reason = next((e for e in causes(error) if isinstance(e, OSError)), None)
            if reason is None:
                raise
            raise output_error(target, reason) from error
        finally:
            partial.unlink(missing_ok=True)


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, then those that it was raised from or in the handling of, latest first."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _sync_folder(folder: Path) -> None:
    """Let the new name survive a power cut too, where folders can be synchronised."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _began_with(settings: Path) -> Config:
    try:
        return msgspec.json.decode(settings.read_bytes(), type=Config)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(
            f"{settings}: {error}; the run can not go on without it: start a new one"
        ) from error


def _check_same(run: Path, began: Config, config: Config) -> None:
    for section in ("model", "data", "loss", "optim", "trainer"):
        old, new = getattr(began, section), getattr(config, section)
        for key in ("seed",) if section == "trainer" else old.__struct_fields__:
            if getattr(old, key) != getattr(new, key):
                raise ConfigError(
                    f"{run} was started with {section}.{key} = {getattr(old, key)!r}, not "
                    f"{getattr(new, key)!r}: resume with the same, or start a new run"
                )
