"""Our checkpoints: one safetensors file whose header carries the configuration as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from knet_runtime.atomic import output_error, write_atomic
from knet_runtime.errors import CheckpointError
from knet_runtime.labels import LabelMap
from knet_train.config import Config, ModelConfig
from knet_train.models.build import build_model
from knet_train.models.knet import KNet

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

    Raises OutputError when it cannot be written.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    metadata = {
        "format": FORMAT,
        "config": msgspec.json.encode(config).decode(),
        "labels": msgspec.json.encode(labels).decode(),
    }
    try:
        write_atomic(path, _in_order(save(state, metadata)))
    except OSError as error:
        raise output_error(path, error) from error


def _in_order(file: bytes) -> bytes:
    """The bytes of a safetensors file with its metadata sorted by key, in place of the order of
    the day: equal weights make equal files."""
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned
    return len(text).to_bytes(8, "little") + text + file[8 + length :]


def read_tensors(path: Path, advice: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file.

    Raises CheckpointError, which ends in ``advice``, where it cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, tensors
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error}): {advice}"
        ) from error


def read_checkpoint(
    path: Path, build: Callable[[ModelConfig, int], KNet] = build_model
) -> Checkpoint:
    """Read what ``save_checkpoint`` wrote; nothing in the file is executed. ``build`` is the one
    that the network was trained with.

    Raises CheckpointError when it is missing, damaged, foreign, or does not fit its own
    configuration.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is no file: pass a checkpoint such as RUN/best.safetensors")
    metadata, state = read_tensors(path, "train writes them")
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
    model = build(config.model, labels.num_classes)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise CheckpointError(f"{path} does not fit its own configuration: {first}") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Checkpoint(model.eval(), config, labels, digest)


def load_checkpoint(path: Path | str) -> KNet:
    """The network of a checkpoint that `train` or `import-mmseg` wrote, in evaluation mode.

    Raises CheckpointError when the file is missing, damaged or foreign.

        >>> from knet_deploy import load_checkpoint
        >>> type(load_checkpoint("best.safetensors")).__name__
        'KNet'
    """
    return read_checkpoint(Path(path)).model
