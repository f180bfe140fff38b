"""Our checkpoints (one safetensors file whose header carries the configuration as JSON), and the
weights that a new run starts from: one of these, or an ImageNet backbone."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import msgspec
import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from knet_runtime.atomic import check_folder, output_error, write_atomic
from knet_runtime.errors import CheckpointError, OutputError
from knet_runtime.labels import LabelMap
from knet_train.config import Config, ModelConfig
from knet_train.models.backbones import SwinBackbone
from knet_train.models.build import build_model, build_segment_model
from knet_train.models.knet import KNet
from knet_train.models.segments import SegmentKNet

FORMAT = "knet-deploy checkpoint 1"
# Modules with a row per class: those of another number of classes start afresh.
_CLASSIFIERS = re.compile(r"(auxiliary\.)?conv_seg|stages\.\d+\.fc_class")
# Where ImageNet weights stand under another name than the model's own.
_HUB = {
    "efficientnet_lite0": "timm/tf_efficientnet_lite0.in1k",
    "resnet50c": "timm/resnet50c.mm_in1k",
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A trained model in evaluation mode, with what is needed to use it."""

    model: KNet
    config: Config
    labels: LabelMap
    sha256: str


@dataclass(frozen=True)
class SegmentCheckpoint:
    """The same for a network for instances or panoptic segmentation."""

    model: SegmentKNet
    config: Config
    labels: LabelMap
    sha256: str


def save_checkpoint(path: Path, model: nn.Module, config: Config, labels: LabelMap) -> None:
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
    """Read what ``save_checkpoint`` wrote for a semantic network; nothing in the file is executed.
    ``build`` is the one that the network was trained with.

    Raises CheckpointError when it is missing, damaged, foreign, of another task, or does not fit
    its own configuration.
    """
    return _semantic(path, _read(path), build)


def read_segment_checkpoint(path: Path) -> SegmentCheckpoint:
    """The same for a network for instances or panoptic segmentation."""
    return _segments(path, _read(path))


def read_any_checkpoint(path: Path) -> Checkpoint | SegmentCheckpoint:
    """A network for whatever task; raises as ``read_checkpoint`` does."""
    stored = _read(path)
    if stored.config.model.task == "semantic":
        return _semantic(path, stored, build_model)
    return _segments(path, stored)


class _Stored(NamedTuple):
    """What a checkpoint's file holds."""

    config: Config
    labels: LabelMap
    state: dict[str, Tensor]
    sha256: str


def _semantic(path: Path, stored: _Stored, build: Callable[[ModelConfig, int], KNet]) -> Checkpoint:
    if stored.config.model.task != "semantic":
        raise CheckpointError(
            f"{path} is a network for {stored.config.model.task} segmentation, and this is for "
            "semantic ones"
        )
    model = build(stored.config.model, stored.labels.num_classes)
    _load(model, stored.state, path)
    return Checkpoint(model.eval(), stored.config, stored.labels, stored.sha256)


def _segments(path: Path, stored: _Stored) -> SegmentCheckpoint:
    if stored.config.model.task == "semantic":
        raise CheckpointError(
            f"{path} is a network for semantic segmentation, and this is for instance or panoptic "
            "ones"
        )
    model = build_segment_model(stored.config.model, stored.labels)
    _load(model, stored.state, path)
    return SegmentCheckpoint(model.eval(), stored.config, stored.labels, stored.sha256)


def _read(path: Path) -> _Stored:
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
    return _Stored(config, labels, state, hashlib.sha256(path.read_bytes()).hexdigest())


def _load(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise CheckpointError(f"{path} does not fit its own configuration: {first}") from error


def load_checkpoint(path: Path | str) -> KNet:
    """The network of a checkpoint that `train` or `import-mmseg` wrote, in evaluation mode.

    Raises CheckpointError when the file is missing, damaged or foreign.

        >>> from knet_deploy import load_checkpoint
        >>> type(load_checkpoint("best.safetensors")).__name__
        'KNet'
    """
    return read_checkpoint(Path(path)).model


def load_initial(model: nn.Module, path: Path) -> None:
    """All weights of a checkpoint of the same architecture into ``model``.

    Classifiers of another number of classes keep their new weights, and so does an auxiliary
    classifier that the checkpoint has not; both are logged. Raises CheckpointError naming the
    first weight that is missing, misshapen, foreign, or not finite.
    """
    metadata, state = read_tensors(
        path, "--init wants one that `knet-deploy train` or `import-mmseg` wrote"
    )
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no checkpoint of `knet-deploy train` or `import-mmseg`; weights of a "
            "backbone alone go to --backbone-weights"
        )
    needed = model.state_dict()
    auxiliary = any(key.startswith("auxiliary.") for key in state)
    fresh = []
    for key, like in needed.items():
        misshapen = key in state and state[key].shape != like.shape
        if (misshapen and _CLASSIFIERS.fullmatch(key.rpartition(".")[0])) or (
            key.startswith("auxiliary.") and not auxiliary
        ):
            fresh.append(key)
        elif key not in state:
            raise CheckpointError(f"{path} has no weight {key}: it is another architecture")
        elif misshapen:
            raise CheckpointError(
                f"{path} has {key} as {list(state[key].shape)}, the model as {list(like.shape)}: "
                "pass the preset and the settings it was trained with"
            )
        elif not torch.isfinite(state[key]).all():
            raise CheckpointError(f"{path}: {key} holds values that are not finite: it is broken")
    foreign = [key for key in state if key not in needed and not key.startswith("auxiliary.")]
    if foreign:
        raise CheckpointError(f"{path} has the weight {foreign[0]}, which the model has not")
    taken = {key: state[key] for key in needed if key not in fresh}
    model.load_state_dict(taken, strict=False)
    _log.info("%d of %d weights taken from %s", len(taken), len(needed), path)
    if fresh:
        _log.warning("%s does not hold these for this model, they start afresh: %s", path, fresh)


def load_pretrained(backbone: nn.Module, config: ModelConfig, weights: Path | None) -> None:
    """ImageNet weights into ``backbone``: from a safetensors file, else from timm's hub.

    A file may hold the whole classifier; what the features don't need is left out. Raises
    CheckpointError when the file is broken or lacks a weight, or the hub cannot be reached.
    """
    default = timm.get_pretrained_cfg(config.backbone)
    name = _HUB.get(config.backbone) or (default and default.hf_hub_id) or f"timm/{config.backbone}"
    if weights is not None:
        _, state = read_tensors(weights, f"pass {name}'s model.safetensors")
    else:
        state = _from_hub(config.backbone, name)
    needed = backbone.state_dict()
    if isinstance(backbone, SwinBackbone):  # its norms of the levels are K-Net's, not ImageNet's
        needed = {key: value for key, value in needed.items() if not key.startswith("norms.")}
    # timm's feature wrappers write "stages_0" where its files have "stages.0".
    plain = {key.replace(".", "_"): value for key, value in state.items()}
    state = {key: plain[k] for key in needed if (k := key.replace(".", "_")) in plain}
    missing = [key for key in needed if key not in state]
    wrong = [key for key in state if state[key].shape != needed[key].shape]
    if missing or wrong:
        raise CheckpointError(
            f"{weights or 'the hub'} does not hold {config.backbone}: "
            f"{len(missing)} weights missing, {len(wrong)} of another shape "
            f"(first: {(missing + wrong)[0]}); it wants {name}'s model.safetensors"
        )
    backbone.load_state_dict(state, strict=False)


def _from_hub(backbone: str, name: str) -> dict[str, Tensor]:
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        # Without a home that can be written to, what is fetched is not kept for the next time.
        with TemporaryDirectory() as folder:
            aside: dict[str, Any] = {} if _can_have(HF_HUB_CACHE) else {"cache_dir": folder}
            source = timm.create_model(f"hf_hub:{name}", pretrained=True, **aside)
    except Exception as error:  # the hub client raises many unrelated types
        raise CheckpointError(
            f"ImageNet weights of {backbone} could not be fetched from the hub "
            f"({type(error).__name__}): connect to the network, or pass "
            f"--backbone-weights FILE.safetensors ({name}'s model.safetensors)"
        ) from error
    state: dict[str, Tensor] = source.state_dict()
    return state


def _can_have(folder: str) -> bool:
    """Whether it is there, for reading at least, or can be made."""
    try:
        path = Path(folder).expanduser()
        if not path.is_dir():
            check_folder(path)
    except (OutputError, RuntimeError):  # the latter: there is no home
        return False
    return True
