from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from knet_runtime.errors import CheckpointError, OutputError
from knet_runtime.labels import LabelMap
from knet_train.checkpoint import FORMAT, read_checkpoint, save_checkpoint
from knet_train.config import Config
from knet_train.models.knet import KNet


@pytest.fixture
def saved(
    tmp_path: Path, tiny_model: KNet, tiny_config: Callable[..., Config], tiny_labels: LabelMap
) -> Path:
    path = tmp_path / "best.safetensors"
    save_checkpoint(path, tiny_model, tiny_config(), tiny_labels)
    return path


def rewrite(path: Path, state: dict[str, torch.Tensor], **metadata: str) -> None:
    with safe_open(path, "pt") as file:
        before = file.metadata()
    save_file(state, path, {**before, **metadata})


def test_what_was_saved_comes_back(
    saved: Path, tiny_model: KNet, tiny_config: Callable[..., Config], tiny_labels: LabelMap
) -> None:
    loaded = read_checkpoint(saved)
    assert loaded.config == tiny_config()
    assert loaded.labels == tiny_labels
    assert loaded.sha256 == hashlib.sha256(saved.read_bytes()).hexdigest()
    assert not loaded.model.training
    expected = tiny_model.state_dict()
    state = loaded.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)
    images = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(loaded.model(images), tiny_model(images))
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_memory_layout_is_not_stored(
    saved: Path, tiny_model: KNet, tiny_config: Callable[..., Config], tiny_labels: LabelMap
) -> None:
    before = saved.read_bytes()
    model = tiny_model.to(memory_format=torch.channels_last)
    save_checkpoint(saved, model, tiny_config(), tiny_labels)
    assert load_file(saved).keys() == tiny_model.state_dict().keys()
    assert len(saved.read_bytes()) == len(before)
    loaded = read_checkpoint(saved).model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors is no file: pass"):
        read_checkpoint(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="is no file"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 200, -10])
def test_a_truncated_file_is_refused(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"best\.safetensors is not a readable"):
        read_checkpoint(saved)


def test_a_text_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.safetensors"
    path.write_text("just some notes, longer than a header's length\n" * 10)
    with pytest.raises(CheckpointError, match=r"notes\.safetensors is not a readable"):
        read_checkpoint(path)


def test_foreign_and_newer_files_are_refused(saved: Path) -> None:
    rewrite(saved, load_file(saved), format="knet-deploy checkpoint 9")
    with pytest.raises(CheckpointError, match=rf"checkpoint 9', expected '{FORMAT}'"):
        read_checkpoint(saved)
    save_file({"weight": torch.zeros(2)}, saved)
    with pytest.raises(CheckpointError, match=r"not written by this version.*unknown"):
        read_checkpoint(saved)


def test_a_configuration_that_is_not_ours_is_refused(
    saved: Path, tiny_config: Callable[..., Config]
) -> None:
    state = load_file(saved)
    raw = msgspec.to_builtins(tiny_config())
    raw["model"]["depth"] = 3
    rewrite(saved, state, config=json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"configuration is not readable: .*depth"):
        read_checkpoint(saved)
    rewrite(saved, state, config="{")
    with pytest.raises(CheckpointError, match="configuration is not readable"):
        read_checkpoint(saved)


def test_a_bad_label_map_is_refused(saved: Path) -> None:
    labels = {"names": ["a", "a"], "palette": [[0, 0, 0], [1, 1, 1]], "ignore_index": 255}
    rewrite(saved, load_file(saved), labels=json.dumps(labels))
    with pytest.raises(CheckpointError, match="class names must differ"):
        read_checkpoint(saved)


def test_weights_that_do_not_fit_their_configuration_are_named(saved: Path) -> None:
    state = load_file(saved)
    rewrite(saved, {**state, "conv_seg.weight": torch.zeros(7, 32, 1, 1)})
    with pytest.raises(CheckpointError, match=r"does not fit .*conv_seg\.weight"):
        read_checkpoint(saved)
    rewrite(saved, {key: value for key, value in state.items() if key != "conv_seg.bias"})
    with pytest.raises(CheckpointError, match=r"Missing key.*conv_seg\.bias"):
        read_checkpoint(saved)
    rewrite(saved, {**state, "extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"Unexpected key.*extra"):
        read_checkpoint(saved)


@pytest.mark.parametrize("end", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    saved: Path,
    tiny_model: KNet,
    tiny_config: Callable[..., Config],
    tiny_labels: LabelMap,
    end: BaseException,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def half(path: Path, _data: bytes) -> None:
        with path.open("wb") as file:
            file.write(b"half")
        raise end

    before = saved.read_bytes()
    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises((KeyboardInterrupt, OutputError)) as caught:
        save_checkpoint(saved, tiny_model, tiny_config(), tiny_labels)
    if caught.type is OutputError:
        assert "No space left" in str(caught.value)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_equal_weights_make_equal_files(
    saved: Path, tiny_model: KNet, tiny_config: Callable[..., Config], tiny_labels: LabelMap
) -> None:
    """The library itself writes the metadata in another order each time."""
    before = saved.read_bytes()
    for _ in range(8):
        save_checkpoint(saved, tiny_model, tiny_config(), tiny_labels)
        assert saved.read_bytes() == before
    with safe_open(saved, "pt") as file:
        for key, value in tiny_model.state_dict().items():
            assert torch.equal(file.get_tensor(key), value)


def test_a_folder_that_is_not_there_is_an_output_error(
    tmp_path: Path, tiny_model: KNet, tiny_config: Callable[..., Config], tiny_labels: LabelMap
) -> None:
    with pytest.raises(OutputError, match=r"x\.safetensors: No such file.*choose another place"):
        save_checkpoint(
            tmp_path / "absent" / "x.safetensors", tiny_model, tiny_config(), tiny_labels
        )
