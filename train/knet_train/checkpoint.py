"""Our checkpoints: one safetensors file whose header carries the configuration as JSON."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from knet_runtime.errors import CheckpointError, OutputError
from knet_runtime.labels import LabelMap
from knet_train.build import build_model
from knet_train.config import Config
from knet_train.knet import KNet

FORMAT = "knet-deploy checkpoint 1"


@dataclass(frozen=True)
class Checkpoint:
    """A trained model in evaluation mode, with what is needed to use it."""

    model: KNet
    config: Config
    labels: LabelMap
    sha256: str


def save_checkpoint(path: Path, model: KNet, config: Config, labels: LabelMap) -> None:
    """Write weights, configuration and labels to ``path``, which appears whole or not at all.

    Raises OutputError when it can not be written.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    metadata = {
        "format": FORMAT,
        "config": msgspec.json.encode(config).decode(),
        "labels": msgspec.json.encode(labels).decode(),
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(state, partial, metadata)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"can not write {path} ({error}): check the folder and the space on its disk"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read what ``save_checkpoint`` wrote; nothing in the file is executed.

    Raises CheckpointError when it is missing, damaged, foreign, or does not fit its own
    configuration.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is no file: pass a checkpoint such as RUN/best.safetensors")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors checkpoint ({error}): train writes them"
        ) from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} was not written by this version of `knet-deploy train` "
            f"(format {metadata.get('format', 'unknown')!r}, expected {FORMAT!r})"
        )
    try:
        config = msgspec.json.decode(metadata["config"], type=Config)
        labels = msgspec.json.decode(metadata["labels"], type=LabelMap)
    except (KeyError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{path}: its configuration is not readable: {error}") from error
    model = build_model(config.model, labels.num_classes)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise CheckpointError(f"{path} does not fit its own configuration: {first}") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Checkpoint(model.eval(), config, labels, digest)
